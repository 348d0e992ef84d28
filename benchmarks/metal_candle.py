"""Every row of metal-candle v1.2.0's published benchmark page, as published and as an honest workload, in float32.

As published, a call is waited for only if a value is read back. The honest workload allocates and writes real bytes in
the shapes of real Qwen2.5 models, and waits for every call.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import CONFIGS, adapted, made
from ops import CALLS, DRAWS, OPTIMIZERS, fill, parameters
from peers import kernels
from record import Case
from timing import Call, Columns, interleave, quartiles
from torch import Tensor, nn
from train import trained
from transformers import DynamicCache

from torch_fused import functional
from torch_fused.devices import synchronize
from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import rms_norm_reference

PUBLISHED, HONEST = "as published", "honest"
RUNS, SAMPLES = 5, 15  # samples of a run
Contenders = Mapping[str, Call]


@dataclass(frozen=True, eq=False)
class Workload(Case):
    """One of a row's two."""

    make: Callable[[], Contenders]  # on torch's default device

    def contenders(self, device: str) -> Contenders:
        torch.manual_seed(0)
        with torch.device(device):
            return self.make()

    def measure(self, contenders: Contenders, device: str) -> dict[str, Columns]:
        def waited(call: Call) -> Call:
            return lambda: (call(), synchronize(device))

        waits = self.kind == HONEST and device != "cpu"
        calls = {name: [waited(call) if waits else call] for name, call in contenders.items()}
        found = interleave(calls, device, rounds=RUNS * SAMPLES, target=0.002, wall=True)
        return {name: columns(samples) for name, samples in found.items()}


def columns(samples: Sequence[float]) -> Columns:
    """The median, how much the runs' medians vary, and the samples beyond 1.5 times the quartiles' distance."""
    each = -(-len(samples) // RUNS)
    medians = [statistics.median(samples[i : i + each]) for i in range(0, len(samples), each)]
    low, median, high = quartiles(samples)
    margin = 1.5 * (high - low)
    outliers = sum(not low - margin <= sample <= high + margin for sample in samples)
    variation = statistics.stdev(medians) / statistics.mean(medians)
    return {"ms": median * 1e3, "variation": variation, "outliers": str(outliers), "samples": str(len(samples))}


# ---- the cache ------------------------------------------------------------------------------------------------------

QWEN = "Qwen2.5-0.5B"
CONFIG = CONFIGS[QWEN]()


class Buffers:
    """The least that torch can do: two tensors per layer, written in place."""

    def __init__(self, layers: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.layers = [[torch.empty(shape, device=device) for _ in range(2)] for _ in range(layers)]
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
        end = self.length + keys.shape[2]
        for buffer, states in zip(self.layers[layer], (keys, values), strict=True):
            buffer[:, :, self.length : end] = states
        if layer == len(self.layers) - 1:
            self.length = end

    def crop(self, count: int) -> None:
        self.length += count


def caches(config: Any, states: Tensor, length: int, **sizes: int) -> dict[str, Callable[[], Any]]:
    """New ones of `length` tokens like these states."""
    batch, heads, _, head_dim = states.shape
    return {
        "DynamicCache": partial(DynamicCache, config=config),
        "copy_": partial(Buffers, config.num_hidden_layers, (batch, heads, length, head_dim), states.device),
        "torch_fused": partial(FusedKVCache, config, **sizes),
    }


def inserted(layers: int, config: Any, heads: int, held: int) -> Contenders:
    """The last of so many tokens, taken away and appended again, in some layers."""
    prompt, token = torch.randn(1, heads, held, 64), torch.randn(1, heads, 1, 64)

    def update(cache: Any) -> None:
        cache.crop(-1)
        fill(cache, token, layers)

    found = {name: new() for name, new in caches(config, token, held, expected_len=held).items()}
    for cache in found.values():
        fill(cache, prompt, config.num_hidden_layers)
    return {name: partial(update, cache) for name, cache in found.items()}


def insert_published(layers: int) -> Contenders:
    token, store = torch.randn(1, 14, 1, 64), {}

    def insert() -> None:
        store.clear()
        store.update((layer, (token, token)) for layer in range(layers))

    found = inserted(layers, CONFIG, 14, 1)
    return {"a dict, no copy": insert, **{name: found[name] for name in ("DynamicCache", "torch_fused")}}


def written(config: Any, heads: int, tokens: int, times: int, length: int) -> Contenders:
    """A new cache with room for `length` tokens, to which some are appended several times."""
    states = torch.randn(1, heads, tokens, config.head_dim)

    def write(new: Callable[[], Any]) -> None:
        cache = new()
        for _ in range(times):
            fill(cache, states, config.num_hidden_layers)

    return {name: partial(write, new) for name, new in caches(config, states, length, max_cache_len=length).items()}


def empty(config: Any) -> Contenders:
    found = caches(config, torch.empty(1, 2, 1, 64), 0, max_cache_len=2048)
    return {"a dict, nothing allocated": dict, **{name: found[name] for name in ("DynamicCache", "torch_fused")}}


# ---- sampling and ops -----------------------------------------------------------------------------------------------


def sampled(op: str, vocabulary: int, honest: bool) -> Contenders:
    """An id that is read back. As published, the host does the rest of the work too, as fast as torch can."""
    x, calls = torch.randn(1, vocabulary) * 2, {**DRAWS[op], **kernels(op)}
    if not honest:
        *_, fastest = DRAWS[op].values()
        calls = {"torch on the host": lambda x: fastest(x.cpu()), "torch_fused": DRAWS[op]["torch_fused"]}
    return {name: lambda call=call: int(call(x)) for name, call in calls.items()}


def softmax_of(*shape: int) -> Contenders:
    x = torch.randn(shape).flatten(0, -2)
    return {name: partial(call, x) for name, call in {**CALLS["softmax"], **kernels("softmax")}.items()}


def norm_of(op: str, shape: tuple[int, ...], weighted: bool) -> Contenders:
    x, size = torch.randn(shape), shape[-1:]
    weights = [torch.randn(size) for _ in range(2 if op == "layer_norm" else 1)] if weighted else []
    composed = {"layer_norm": layer_norm_reference, "rms_norm": rms_norm_reference}[op]
    calls = {"torch composed": composed, f"F.{op}": getattr(F, op), "torch_fused": getattr(functional, op)}
    peers = {name: partial(peer, x, *weights) for name, peer in kernels(op).items() if weighted}
    return {name: partial(call, x, size, *weights) for name, call in calls.items()} | peers


# ---- training -------------------------------------------------------------------------------------------------------


def trained_models(models: Mapping[str, nn.Module], loss: Callable[[nn.Module], Tensor]) -> Contenders:
    """With the optimizer of each. The loss is read back."""
    steps = {name: trained(model, OPTIMIZERS[name], loss) for name, model in models.items()}
    return {name: lambda step=step: step().item() for name, step in steps.items()}


def train_published() -> Contenders:
    x, targets = torch.randn(4, 64, 512), torch.randint(512, (256,))
    models = {name: adapted(nn.Sequential(nn.Linear(512, 512)), ["0"], rank=8) for name in OPTIMIZERS}
    return trained_models(models, lambda model: F.cross_entropy(model(x).view(256, 512), targets))


def train_honest() -> Contenders:
    ids = torch.randint(CONFIG.vocab_size, (4, 64))
    stock = adapted(made(QWEN, torch.float32, ids.device, num_hidden_layers=1).train(), ["q_proj", "v_proj"], rank=8)
    models = {name: copy.deepcopy(stock) for name in OPTIMIZERS}
    apply_torch_fused(models["torch_fused"])
    return trained_models(models, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss)


def adamw_of(model: nn.Module) -> Contenders:
    """For parameters of these shapes."""
    shapes = [param.shape for param in model.parameters()]
    return {name: make(parameters(shapes)).step for name, make in OPTIMIZERS.items()}


# ---- the page -------------------------------------------------------------------------------------------------------

Make = tuple[Any, ...]
"""The text of a workload, and what makes its contenders, with arguments."""


def page() -> Iterator[tuple[str, Make, Make]]:
    """The rows: as published, and honest."""
    for name, layers in (("KV cache, single layer", 1), ("KV cache, all 24 layers", 24)):
        text = f"clear, then insert k and v of (1, 14, 1, 64) in {layers} of 24 layers"
        real = f"one token of (1, 2, 1, 64) appended after 512 in {layers} layers"
        config = CONFIGS[QWEN](num_hidden_layers=layers)
        yield name, (text, insert_published, layers), (real, inserted, layers, config, 2, 513)
    for length in (512, 2048):
        text = f"{length // 2} tokens of (1, 14, 1, 64) appended one by one to 24 layers, capacity {length}"
        real = f"{length} tokens of (1, 2, 1, 64) appended one by one to 24 layers"
        published = text, written, CONFIG, 14, 1, length // 2, length
        yield f"full sequence {length}", published, (real, written, CONFIG, 2, 1, length, length)
    for size in ("0.5B", "1.5B", "3B"):
        config = CONFIGS[f"Qwen2.5-{size}"]()
        real = f"a cache of 2048 tokens, {config.num_hidden_layers} layers, allocated and written"
        published = "an empty cache object", empty, config
        yield f"KV allocation, Qwen {size}", published, (real, written, config, 2, 2048, 1, 2048)
    for op in ("greedy", "top-k 50", "top-p 0.9"):
        sizes = [(f"{op}, vocabulary {n}", n, n) for n in (1000, 10000, 32000, 100000, 151936)]
        for name, n, m in [(op, 32000, 151936), *sizes]:
            published = f"{n} logits copied to the host, all of the work there", sampled, op, n, False
            yield name, published, (f"an id drawn from {m} logits on the device, read back", sampled, op, m, True)
    shape, scores, hidden = (4, 16, 1024), (1, 14, 128, 128), (1, 128, 896)
    yield "softmax", (f"{shape}", softmax_of, *shape), (f"attention scores {scores}", softmax_of, *scores)
    for name, op in (("layer norm", "layer_norm"), ("RMS norm", "rms_norm")):
        published = f"{shape}, no weights", norm_of, op, shape, False
        yield name, published, (f"{hidden} with weights", norm_of, op, hidden, True)
    text = "LoRA of rank 8 on a (512, 512) linear, (4, 64, 512): forward, cross entropy, backward, AdamW"
    real = "LoRA of rank 8 on q and v of a Qwen2.5-0.5B of one layer, 4 x 64 tokens, loss over 151936"
    yield "full training step", (text, train_published), (real, train_honest)
    published = "one (512, 512) parameter", adamw_of, nn.Linear(512, 512, bias=False)
    layer = made(QWEN, torch.float32, "meta", num_hidden_layers=1).model.layers[0]
    yield "AdamW", published, ("the 12 parameters of a Qwen2.5-0.5B layer, 15 million", adamw_of, layer)


def rows(device: str = "cpu") -> list[Workload]:
    return [
        Workload(name, text, "f32", kind, partial(make, *arguments))
        for name, *two in page()
        for kind, (text, make, *arguments) in zip((PUBLISHED, HONEST), two, strict=True)
    ]
