"""Every row of metal-candle v1.2.0's published benchmark page, as published and as an honest workload, in float32.

As published, a call is waited for only if a value is read back. The honest workload allocates and writes real bytes in
the shapes of real Qwen2.5 models, and waits for every call. metal_candle.yaml has the rows.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from cases import Case
from models import adapted, config, made
from ops import CALLS, DRAWS, OPTIMIZERS, Contenders, fill, normed, parameters
from peers import kernels
from timing import Call, Columns, interleave, synchronize
from torch import Tensor, nn
from train import trained
from transformers import DynamicCache

from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.ops.rms_norm import rms_norm_reference

PAGE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
RUNS, SAMPLES = 5, 15  # samples of a run, where metal_candle.yaml does not say another number
PUBLISHED, HONEST, QWEN = "as published", "honest", "Qwen2.5-0.5B"
Work = tuple[Contenders, Callable[[], Sequence[Any]], Callable[..., Call]]  # contenders, operands, prepare: see Case


def runs(case: Case, device: str, samples: int) -> dict[str, Columns]:
    calls = case.calls(device)
    if case.kind == HONEST and device != "cpu":
        calls = {name: lambda call=call: (call(), synchronize(device)) for name, call in calls.items()}
    rings = {name: [call] for name, call in calls.items()}
    found = interleave(rings, device, rounds=RUNS * samples, target=0.002, wall=True)
    return {name: columns(times) for name, times in found.items()}


def columns(samples: Sequence[float]) -> Columns:
    """The median, how much the runs' medians vary, and the samples beyond 1.5 times the quartiles' distance."""
    medians = np.median(np.split(np.array(samples), RUNS), axis=1)
    low, median, high = np.percentile(samples, [25, 50, 75])
    outliers = sum(max(low - sample, sample - high) > 1.5 * (high - low) for sample in samples)
    variation = medians.std(ddof=1) / medians.mean()
    return {"ms": median * 1e3, "variation": variation, "outliers": str(outliers), "samples": str(len(samples))}


class Buffers:
    """The least that torch can do: two tensors per layer, written in place."""

    def __init__(self, layers: int, like: Tensor, length: int) -> None:
        shape = (*like.shape[:2], length, like.shape[3])
        self.layers = [[like.new_empty(shape) for _ in range(2)] for _ in range(layers)]
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
        end = self.length + keys.shape[2]
        for buffer, states in zip(self.layers[layer], (keys, values), strict=True):
            buffer[:, :, self.length : end] = states
        if layer == len(self.layers) - 1:
            self.length = end

    def crop(self, count: int) -> None:
        self.length += count


def caches(config: Any, length: int, **sizes: int) -> Contenders:
    """What makes new ones of `length` tokens like some states."""
    return {
        "DynamicCache": lambda states: DynamicCache(config=config),
        "copy_": lambda states: Buffers(config.num_hidden_layers, states, length),
        "torch_fused": lambda states: FusedKVCache(config, **sizes),
    }


def appended(layers: int, heads: int, held: int, of: int | None = None) -> Work:
    """The last of so many tokens, taken away and appended again, in some layers."""
    settings = config(QWEN, num_hidden_layers=of or layers)

    def prepare(new: Callable[[Tensor], Any], prompt: Tensor, token: Tensor) -> Call:
        cache = new(token)
        fill(cache, prompt, settings.num_hidden_layers)
        return lambda: (cache.crop(-1), fill(cache, token, layers))

    new = caches(settings, held, expected_len=held)
    return new, lambda: [torch.randn(1, heads, tokens, 64) for tokens in (held, 1)], prepare


def stored(layers: int) -> Work:
    found, states, prepare = appended(layers, 14, 1, of=24)

    def store(prompt: Tensor, token: Tensor) -> Call:
        held: dict[int, tuple[Tensor, Tensor]] = {}
        return lambda: (held.clear(), held.update((layer, (token, token)) for layer in range(layers)))

    rest = {name: partial(prepare, found[name]) for name in ("DynamicCache", "torch_fused")}
    return {"a dict, no copy": store} | rest, states, lambda make, *operands: make(*operands)


def written(model: str, layers: int, capacity: int, times: int = 1, tokens: int = 1, heads: int = 2) -> Work:
    """A new cache of this capacity, to which some tokens are appended several times."""
    settings = config(model)

    def write(new: Callable[[Tensor], Any], states: Tensor) -> None:
        cache = new(states)
        for _ in range(times):
            fill(cache, states, layers)

    new = caches(settings, capacity, max_cache_len=capacity)
    return new, lambda: [torch.randn(1, heads, tokens, settings.head_dim)], partial(partial, write)


def constructed(model: str) -> Work:
    found = caches(config(model), 0, max_cache_len=2048)
    new = {name: partial(found[name], None) for name in ("DynamicCache", "torch_fused")}
    return {"a dict, nothing allocated": dict} | new, list, partial


def drawn(op: str, vocabulary: int, on_host: bool = False) -> Work:
    """An id that is read back. On the host torch does all of the work there, as fast as it can."""
    calls = DRAWS[op]
    if on_host:
        *_, fastest = calls.values()
        calls = {"torch on the host": lambda x: fastest(x.cpu()), "torch_fused": calls["torch_fused"]}
    return calls, lambda: [torch.randn(1, vocabulary) * 2], lambda call, x: lambda: int(call(x))


def softmax(shape: Sequence[int]) -> Work:
    return {**CALLS["softmax"], **kernels("softmax")}, lambda: [torch.randn(shape).flatten(0, -2)], partial


def norm(op: str, shape: Sequence[int], weights: int = 0) -> Work:
    calls = {"torch composed": normed(rms_norm_reference), **CALLS[op]}
    found = {name: calls[name] for name in ("torch composed", f"F.{op}", "torch_fused")}
    sizes = [shape] + weights * [shape[-1:]]
    return found | (kernels(op) if weights else {}), lambda: [torch.randn(size) for size in sizes], partial


def train_linear() -> Work:
    def step(optimizer: Callable[..., Any], x: Tensor, targets: Tensor) -> Call:
        model = adapted(nn.Sequential(nn.Linear(512, 512)).to(x.device), ["0"], rank=8)
        step = trained(model, optimizer, lambda model: F.cross_entropy(model(x).view(256, 512), targets))
        return lambda: step().item()

    return OPTIMIZERS, lambda: [torch.randn(4, 64, 512), torch.randint(512, (256,))], step


def train_layer() -> Work:
    def step(optimizer: Callable[..., Any], ids: Tensor) -> Call:
        model = made(QWEN, torch.float32, ids.device, num_hidden_layers=1).train()
        model = adapted(model, ["q_proj", "v_proj"], rank=8)
        if optimizer is OPTIMIZERS["torch_fused"]:
            apply_torch_fused(model)
        step = trained(model, optimizer, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss)
        return lambda: step().item()

    return OPTIMIZERS, lambda: [torch.randint(config(QWEN).vocab_size, (4, 64))], step


def adamw(shapes: Sequence[Sequence[int]]) -> Work:
    return OPTIMIZERS, partial(parameters, shapes), lambda make, *params: make(params).step


def rows() -> Iterator[Case]:
    for (name, row), kind in product(PAGE["rows"].items(), (PUBLISHED, HONEST)):
        arguments = PAGE["workloads"][row[kind]["workload"]] | row[kind]
        make, text, _ = (arguments.pop(key) for key in ("make", "text", "workload"))
        measure = partial(runs, samples=arguments.pop("samples", SAMPLES))
        arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
        yield Case(name, text.format(**arguments), "f32", kind, *globals()[make](**arguments), measure=measure)
