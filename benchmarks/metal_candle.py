"""Every row of metal-candle v1.2.0's published benchmark page, as published and as an honest workload.

All in float32, as there. As published, a call is waited for only if a value is read back. The honest workload
allocates and writes real bytes in the shapes of real Qwen2.5 models, and waits for every call.
"""

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from ops import OPTIMIZERS, TOP_K, TOP_P, composed_softmax, hugging_face, parameters, top_k_multinomial
from peers import kernels
from record import Case, Columns
from timing import Call, Timing, interleave
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from torch_fused import functional
from torch_fused.devices import synchronize
from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import rms_norm_reference
from torch_fused.sampling import greedy, sample

PUBLISHED, HONEST = "as published", "honest"
RUNS, SAMPLES = 5, 15  # samples of a run
Contenders = Mapping[str, Call]
Make = Callable[[str], Contenders]


@dataclass(frozen=True, eq=False)
class Workload(Case):
    """One of a row's two. `quoted` is the page's figure for an Apple M4 Max; `make` makes the calls on a device."""

    quoted: str
    make: Make

    def contenders(self, device: str) -> Contenders:
        torch.manual_seed(0)
        return self.make(device)

    def measure(self, contenders: Contenders, device: str) -> dict[str, Columns]:
        def waited(call: Call) -> Call:
            return lambda: (call(), synchronize(device))

        waits = self.kind == HONEST and device != "cpu"
        calls = {name: [waited(call) if waits else call] for name, call in contenders.items()}
        found = interleave(calls, device, rounds=RUNS * SAMPLES, target=0.002, wall=True)
        return {name: columns(timing) for name, timing in found.items()}


def columns(timing: Timing) -> Columns:
    """The median, how much the runs' medians vary, and the samples beyond 1.5 times the quartiles' distance."""
    samples = timing.samples
    each = -(-len(samples) // RUNS)
    medians = [statistics.median(samples[i : i + each]) for i in range(0, len(samples), each)]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    margin = 1.5 * (high - low)
    outliers = sum(not low - margin <= sample <= high + margin for sample in samples)
    variation = statistics.stdev(medians) / statistics.mean(medians)
    return {"ms": timing.seconds * 1e3, "variation": variation, "outliers": str(outliers), "samples": str(len(samples))}


# ---- the cache ------------------------------------------------------------------------------------------------------


def qwen(layers: int, head_dim: int = 64, heads: int = 14, **more: Any) -> Qwen2Config:
    sizes = {"num_hidden_layers": layers, "hidden_size": heads * head_dim, "num_attention_heads": heads}
    return Qwen2Config(**sizes, num_key_value_heads=2, **more)


SMALL, MIDDLE, LARGE = qwen(24), qwen(28, 128, 12), qwen(36, 128, 16)


class Buffers:
    """The least that torch can do: two tensors per layer, written in place."""

    def __init__(self, config: Qwen2Config, heads: int, length: int, device: str) -> None:
        shape = (1, heads, length, config.hidden_size // config.num_attention_heads)
        layers = range(config.num_hidden_layers)
        self._layers = [[torch.empty(shape, device=device) for _ in range(2)] for _ in layers]
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
        tokens = keys.shape[2]
        for buffer, states in zip(self._layers[layer], (keys, values), strict=True):
            buffer.narrow(2, self.length, tokens).copy_(states)
        if layer == len(self._layers) - 1:
            self.length += tokens

    def crop(self, count: int) -> None:
        self.length += count


def states(heads: int, tokens: int, head_dim: int, device: str) -> Tensor:
    return torch.randn(1, heads, tokens, head_dim, device=device)


def fill(cache: Any, tokens: Tensor, layers: int) -> None:
    for layer in range(layers):
        cache.update(tokens, tokens, layer)


def caches(config: Qwen2Config, heads: int, length: int, device: str, **sizes: int) -> dict[str, Callable[[], Any]]:
    return {
        "DynamicCache": lambda: DynamicCache(config=config),
        "copy_": lambda: Buffers(config, heads, length, device),
        "torch_fused": lambda: FusedKVCache(config, **sizes),
    }


def insert_published(layers: int, device: str) -> Contenders:
    token, store = states(14, 1, 64, device), {}
    made = {"DynamicCache": DynamicCache(config=SMALL), "torch_fused": FusedKVCache(SMALL)}

    def insert() -> None:
        store.clear()
        for layer in range(layers):
            store[layer] = (token, token)

    def update(cache: Any) -> None:
        cache.crop(-1)
        fill(cache, token, layers)

    for cache in made.values():
        fill(cache, token, SMALL.num_hidden_layers)
    return {"a dict, no copy": insert, **{name: partial(update, cache) for name, cache in made.items()}}


def insert_honest(layers: int, device: str) -> Contenders:
    config, held = qwen(layers), 512
    prompt, token = states(2, held, 64, device), states(2, 1, 64, device)

    def update(cache: Any) -> None:
        fill(cache, token, layers)
        cache.crop(-1)

    made = {name: new() for name, new in caches(config, 2, held + 1, device, expected_len=held + 1).items()}
    for cache in made.values():
        fill(cache, prompt, layers)
    return {name: partial(update, cache) for name, cache in made.items()}


def sequence(length: int, tokens: int, heads: int, device: str) -> Contenders:
    token = states(heads, 1, 64, device)

    def append(new: Callable[[], Any]) -> None:
        cache = new()
        for _ in range(tokens):
            fill(cache, token, SMALL.num_hidden_layers)

    made = caches(SMALL, heads, length, device, max_cache_len=length)
    return {name: partial(append, new) for name, new in made.items()}


def allocate_published(config: Qwen2Config, device: str) -> Contenders:
    made = caches(config, 2, 2048, device, max_cache_len=2048)
    return {"a dict, nothing allocated": dict, **{name: made[name] for name in ("DynamicCache", "torch_fused")}}


def allocate_honest(config: Qwen2Config, device: str) -> Contenders:
    prompt = states(2, 2048, config.hidden_size // config.num_attention_heads, device)

    def write(new: Callable[[], Any]) -> None:
        fill(new(), prompt, config.num_hidden_layers)

    return {name: partial(write, new) for name, new in caches(config, 2, 2048, device, max_cache_len=2048).items()}


# ---- sampling and ops -----------------------------------------------------------------------------------------------

Draw = Callable[[Tensor], Tensor]
OURS: dict[str, Draw] = {
    "greedy": greedy,
    "top-k 50": partial(sample, top_k=50),
    "top-p 0.9": partial(sample, top_p=0.9),
}
TORCHS: dict[str, dict[str, Draw]] = {
    "greedy": {"torch.argmax": partial(torch.argmax, dim=-1)},
    "top-k 50": {"HF chain": hugging_face(TOP_K), "torch.topk, multinomial": top_k_multinomial},
    "top-p 0.9": {"HF chain": hugging_face(TOP_P)},
}


def on_host(op: str, x: Tensor) -> int:
    """All logits copied to the host; for top-k and top-p sorted there."""
    if op == "greedy":
        return int(x.cpu().argmax(-1))
    values, ids = x.cpu().sort(descending=True)
    weights = values[0, : 50 if op == "top-k 50" else None].softmax(-1)
    if op == "top-p 0.9":
        weights = weights.where(weights.cumsum(-1) - weights < 0.9, 0)
    return int(ids[0, torch.multinomial(weights, 1)])


def sample_published(op: str, vocabulary: int, device: str) -> Contenders:
    x = torch.randn(1, vocabulary, device=device) * 2
    return {"torch on the host": partial(on_host, op, x), "torch_fused": lambda: int(OURS[op](x))}


def sample_honest(op: str, vocabulary: int, device: str) -> Contenders:
    x = torch.randn(1, vocabulary, device=device) * 2
    draws = {**TORCHS[op], "torch_fused": OURS[op], **kernels(op)}
    return {name: lambda draw=draw: int(draw(x)) for name, draw in draws.items()}  # type: ignore[misc]


def softmax_of(shape: tuple[int, ...], device: str) -> Contenders:
    x = torch.randn(shape, device=device)
    return {
        "torch composed": partial(composed_softmax, x),
        "torch.softmax": partial(torch.softmax, x, -1),
        "torch_fused": partial(functional.softmax, x),
        **{name: partial(peer, x.flatten(0, -2)) for name, peer in kernels("softmax").items()},
    }


def norm_of(op: str, shape: tuple[int, ...], weighted: bool, device: str) -> Contenders:
    x, size = torch.randn(shape, device=device), shape[-1:]
    weights = [torch.randn(size, device=device) for _ in range(2 if op == "layer_norm" else 1)]
    args = (x, size, *(weights if weighted else []))
    composed = {"layer_norm": layer_norm_reference, "rms_norm": rms_norm_reference}[op]
    return {
        "torch composed": partial(composed, *args),
        f"F.{op}": partial(getattr(F, op), *args),
        "torch_fused": partial(getattr(functional, op), *args),
        **{name: partial(peer, x, *weights) for name, peer in kernels(op).items() if weighted},
    }


# ---- training -------------------------------------------------------------------------------------------------------

Optimizer = Callable[..., torch.optim.Optimizer]


def with_lora(model: nn.Module, *targets: str) -> nn.Module:
    """Of rank 8; the rest is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=list(targets)), model)


def trained(model: nn.Module, make: Optimizer, loss: Callable[[], Tensor]) -> Call:
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = make(params)

    def step() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        assert all(param.grad is not None for param in params)
        optimizer.step()
        return value.item()

    return step


def train_published(device: str) -> Contenders:
    x, targets = torch.randn(4, 64, 512, device=device), torch.randint(512, (256,), device=device)

    def step(make: Optimizer) -> Call:
        model = with_lora(nn.Sequential(nn.Linear(512, 512, device=device)), "0")
        return trained(model, make, lambda: F.cross_entropy(model(x).view(256, 512), targets))

    return {name: step(make) for name, make in OPTIMIZERS.items()}


def train_honest(device: str) -> Contenders:
    config = qwen(1, intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
    stock = with_lora(Qwen2ForCausalLM(config).to(device), "q_proj", "v_proj")
    ids = torch.randint(config.vocab_size, (4, 64), device=device)

    def step(name: str, make: Optimizer) -> Call:
        model = copy.deepcopy(stock)
        if name == "torch_fused":
            apply_torch_fused(model)
        return trained(model, make, lambda: model(ids, labels=ids, use_cache=False).loss)

    return {name: step(name, make) for name, make in OPTIMIZERS.items()}


def adamw_of(shapes: list[tuple[int, ...]], device: str) -> Contenders:
    return {name: make(parameters(shapes, torch.float32, device)).step for name, make in OPTIMIZERS.items()}


# ---- the page -------------------------------------------------------------------------------------------------------


def rows(device: str = "cpu", full: bool = False) -> list[Case]:
    found: list[Case] = []

    def row(name: str, quoted: str, published: tuple[str, Make], honest: tuple[str, Make]) -> None:
        for kind, (text, make), figure in ((PUBLISHED, published, quoted), (HONEST, honest, "")):
            found.append(Workload(name, text, "f32", kind, figure, make))

    for name, layers, quoted in (("KV cache, single layer", 1, "11.6 ns"), ("KV cache, all 24 layers", 24, "320 ns")):
        text = f"clear, then insert k and v of (1, 14, 1, 64) in {layers} of 24 layers"
        real = f"one token of (1, 2, 1, 64) appended after 512 in {layers} layers"
        row(name, quoted, (text, partial(insert_published, layers)), (real, partial(insert_honest, layers)))
    for length, quoted in ((512, "50.4 ms"), (2048, "559 ms")):
        text = f"{length // 2} tokens of (1, 14, 1, 64) appended one by one to 24 layers, capacity {length}"
        real = f"{length} tokens of (1, 2, 1, 64) appended one by one to 24 layers"
        makes = partial(sequence, length, length // 2, 14), partial(sequence, length, length, 2)
        row(f"full sequence {length}", quoted, (text, makes[0]), (real, makes[1]))
    for size, config in (("0.5B", SMALL), ("1.5B", MIDDLE), ("3B", LARGE)):
        real = f"a cache of 2048 tokens, {config.num_hidden_layers} layers, allocated and written"
        published = "an empty cache object", partial(allocate_published, config)
        row(f"KV allocation, Qwen {size}", "20.7 ns", published, (real, partial(allocate_honest, config)))
    for op, (alone, *by_vocabulary) in {
        "greedy": ("109.5 us", "101 us", "112 us", "124 us", "161 us", ""),
        "top-k 50": ("469 us", "111 us", "224 us", "495 us", "1500 us", ""),
        "top-p 0.9": ("611 us", "115 us", "279 us", "630 us", "2210 us", ""),
    }.items():
        vocabularies = (1000, 10000, 32000, 100000, 151936)
        sizes = [(f"{op}, vocabulary {n}", q, n, n) for n, q in zip(vocabularies, by_vocabulary, strict=True)]
        for name, quoted, n, m in [(op, alone, 32000, 151936), *sizes]:
            published = f"{n} logits copied to the host, all of the work there", partial(sample_published, op, n)
            honest = f"an id drawn from {m} logits on the device, read back", partial(sample_honest, op, m)
            row(name, quoted, published, honest)
    shape, scores, hidden = (4, 16, 1024), (1, 14, 128, 128), (1, 128, 896)
    honest = f"attention scores {scores}", partial(softmax_of, scores)
    row("softmax", "43.6 us", (f"{shape}", partial(softmax_of, shape)), honest)
    for name, op, quoted in (("layer norm", "layer_norm", "47.8 us"), ("RMS norm", "rms_norm", "25.5 us")):
        published = f"{shape}, no weights", partial(norm_of, op, shape, False)
        row(name, quoted, published, (f"{hidden} with weights", partial(norm_of, op, hidden, True)))
    text = "LoRA of rank 8 on a (512, 512) linear, (4, 64, 512): forward, cross entropy, backward, AdamW"
    real = "LoRA of rank 8 on q and v of a Qwen2.5-0.5B of one layer, 4 x 64 tokens, loss over 151936"
    row("full training step", "3.3 ms", (text, train_published), (real, train_honest))
    projections = [(896, 896), (896,), (128, 896), (128,), (128, 896), (128,), (896, 896)]
    layer = [*projections, (4864, 896), (4864, 896), (896, 4864), (896,), (896,)]
    honest = "the 12 parameters of a Qwen2.5-0.5B layer, 15 million", partial(adamw_of, layer)
    row("AdamW", "1.06 ms", ("one (512, 512) parameter", partial(adamw_of, [(512, 512)])), honest)
    return found
