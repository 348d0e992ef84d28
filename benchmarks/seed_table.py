"""Every row of metal-candle v1.2.0's benchmark page, as it was published and as an honest workload.

    python benchmarks/seed_table.py [--device cpu|cuda|mps] [--runs 5] [--cool-down SECONDS] [--again]

Float32 throughout, as there. As published, nothing is waited for unless a value is read back; the honest workload
allocates and writes real bytes in the shapes of real Qwen2.5 models, and every call waits for its result. Each row is
the median of runs, each of which is the median of samples.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from bench_sampling import hugging_face, top_k_multinomial
from harness import Call, arguments, keep_freed_memory, synchronizer
from peers import peers
from progress import Progress
from record import Results
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from torch_fused import functional, optim
from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import rms_norm_reference
from torch_fused.sampling import greedy, sample

KEYS = ("row", "workload", "contender")
VALUES = ("ms", "variation", "outliers", "samples")
PUBLISHED, HONEST = "as published", "honest"
Contenders = Mapping[str, Call]


@dataclass(frozen=True)
class Workload:
    """What is timed: in words, and made on a device for every contender."""

    text: str
    make: Callable[[str], Contenders]


@dataclass(frozen=True)
class Row:
    """A row of the page: `quoted` is its figure for an Apple M4 Max, "" for a row added here."""

    name: str
    quoted: str
    published: Workload
    honest: Workload


# ---- the cache ------------------------------------------------------------------------------------------------------


def qwen(layers: int, head_dim: int = 64, heads: int = 14, key_heads: int = 2, **more) -> Qwen2Config:
    return Qwen2Config(
        num_hidden_layers=layers, hidden_size=heads * head_dim, num_attention_heads=heads,
        num_key_value_heads=key_heads, **more,
    )  # fmt: skip


SMALL, MIDDLE, LARGE = qwen(24), qwen(28, 128, 12), qwen(36, 128, 16)


class Buffers:
    """The least that torch can do: two tensors a layer, written in place."""

    def __init__(self, config: Qwen2Config, heads: int, length: int, device: str) -> None:
        shape = (1, heads, length, config.hidden_size // config.num_attention_heads)
        pairs = [[torch.empty(shape, device=device) for _ in range(2)] for _ in range(config.num_hidden_layers)]
        self._layers = pairs
        self.length = 0

    def update(self, keys: Tensor, values: Tensor, layer: int) -> None:
        tokens = keys.shape[2]
        for buffer, states in zip(self._layers[layer], (keys, values), strict=True):
            buffer.narrow(2, self.length, tokens).copy_(states)
        if layer == len(self._layers) - 1:
            self.length += tokens


def states(heads: int, tokens: int, head_dim: int, device: str) -> Tensor:
    return torch.randn(1, heads, tokens, head_dim, device=device)


def fill(cache, tokens: Tensor, layers: int) -> None:
    for layer in range(layers):
        cache.update(tokens, tokens, layer)


def insert_published(layers: int, device: str) -> Contenders:
    token = states(14, 1, 64, device)
    store: dict[int, tuple[Tensor, Tensor]] = {}
    caches = {"DynamicCache": DynamicCache(config=SMALL), "torch_fused": FusedKVCache(SMALL)}

    def insert() -> None:
        store.clear()
        for layer in range(layers):
            store[layer] = (token, token)

    def update(cache) -> None:
        cache.crop(-1)
        fill(cache, token, layers)

    for cache in caches.values():
        fill(cache, token, SMALL.num_hidden_layers)
    return {"a dict, no copy": insert, **{name: partial(update, cache) for name, cache in caches.items()}}


def insert_honest(layers: int, device: str) -> Contenders:
    config, held = qwen(layers), 512
    prompt, token = states(2, held, 64, device), states(2, 1, 64, device)
    dynamic, fused = DynamicCache(config=config), FusedKVCache(config, expected_len=held + 1)
    buffers = Buffers(config, 2, held + 1, device)
    for cache in (dynamic, fused, buffers):
        fill(cache, prompt, layers)

    def update(cache) -> None:
        fill(cache, token, layers)
        cache.crop(-1)

    def write() -> None:
        fill(buffers, token, layers)
        buffers.length = held

    return {"DynamicCache": partial(update, dynamic), "copy_": write, "torch_fused": partial(update, fused)}


def sequence(length: int, tokens: int, heads: int, device: str) -> Contenders:
    token = states(heads, 1, 64, device)
    make: dict[str, Callable[[], object]] = {
        "DynamicCache": lambda: DynamicCache(config=SMALL),
        "copy_": lambda: Buffers(SMALL, heads, length, device),
        "torch_fused": lambda: FusedKVCache(SMALL, max_cache_len=length),
    }

    def append(new: Callable[[], object]) -> None:
        cache = new()
        for _ in range(tokens):
            fill(cache, token, SMALL.num_hidden_layers)

    return {name: partial(append, new) for name, new in make.items()}


def allocate_published(config: Qwen2Config, device: str) -> Contenders:
    return {
        "a dict, nothing allocated": dict,
        "DynamicCache": lambda: DynamicCache(config=config),
        "torch_fused": lambda: FusedKVCache(config, max_cache_len=2048),
    }


def allocate_honest(config: Qwen2Config, device: str) -> Contenders:
    prompt = states(2, 2048, config.hidden_size // config.num_attention_heads, device)
    make: dict[str, Callable[[], object]] = {
        "DynamicCache": lambda: DynamicCache(config=config),
        "copy_": lambda: Buffers(config, 2, 2048, device),
        "torch_fused": lambda: FusedKVCache(config, max_cache_len=2048),
    }
    return {
        name: lambda new=new: fill(new(), prompt, config.num_hidden_layers)  # type: ignore[misc]
        for name, new in make.items()
    }


# ---- sampling -------------------------------------------------------------------------------------------------------


def sorted_on_host(x: Tensor, top_k: int | None, top_p: float | None) -> int:
    """All logits copied to the host and sorted there."""
    values, ids = x.cpu().sort(descending=True)
    weights = values[0, :top_k].softmax(-1)
    if top_p is not None:
        weights = weights.where(weights.cumsum(-1) - weights < top_p, 0)
    return int(ids[0, torch.multinomial(weights, 1)])


def sample_published(op: str, vocabulary: int, device: str) -> Contenders:
    x = torch.randn(1, vocabulary, device=device) * 2
    return {
        "greedy": {"torch on the host": lambda: int(x.cpu().argmax(-1)), "torch_fused": lambda: int(greedy(x))},
        "top-k 50": {
            "torch on the host": lambda: sorted_on_host(x, 50, None),
            "torch_fused": lambda: int(sample(x, top_k=50)),
        },
        "top-p 0.9": {
            "torch on the host": lambda: sorted_on_host(x, None, 0.9),
            "torch_fused": lambda: int(sample(x, top_p=0.9)),
        },
    }[op]


def sample_honest(op: str, vocabulary: int, device: str) -> Contenders:
    x = torch.randn(1, vocabulary, device=device) * 2
    top_k, top_p = hugging_face(TopKLogitsWarper(50)), hugging_face(TopPLogitsWarper(0.9))
    found: dict[str, Contenders] = {
        "greedy": {"torch.argmax": lambda: int(x.argmax(-1)), "torch_fused": lambda: int(greedy(x))},
        "top-k 50": {
            "HF chain": lambda: int(top_k(x)),
            "torch.topk, multinomial": lambda: int(top_k_multinomial(x)),
            "torch_fused": lambda: int(sample(x, top_k=50)),
        },
        "top-p 0.9": {"HF chain": lambda: int(top_p(x)), "torch_fused": lambda: int(sample(x, top_p=0.9))},
    }
    return {**found[op], **{name: lambda draw=draw: int(draw(x)) for name, draw in peers(op).items()}}


# ---- row ops --------------------------------------------------------------------------------------------------------


def softmax_of(shape: tuple[int, ...], device: str) -> Contenders:
    x = torch.randn(shape, device=device)

    def composed() -> Tensor:
        weights = (x - x.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)

    return {
        "torch composed": composed,
        "torch.softmax": lambda: x.softmax(-1),
        "torch_fused": lambda: functional.softmax(x),
        **{name: partial(peer, x.flatten(0, -2)) for name, peer in peers("softmax").items()},
    }


def norm_of(op: str, shape: tuple[int, ...], weighted: bool, device: str) -> Contenders:
    x, size = torch.randn(shape, device=device), shape[-1:]
    parameters = [torch.randn(size, device=device) for _ in range(2 if op == "layer_norm" else 1)]
    args = (x, size, *(parameters if weighted else []))
    composed = {"layer_norm": layer_norm_reference, "rms_norm": rms_norm_reference}[op]
    return {
        "torch composed": lambda: composed(*args),
        f"F.{op}": lambda: getattr(F, op)(*args),
        "torch_fused": lambda: getattr(functional, op)(*args),
        **{name: partial(peer, x, *parameters) for name, peer in peers(op).items() if weighted},
    }


# ---- training -------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch, AdamW(foreach=True)": partial(torch.optim.AdamW, foreach=True),
    "torch, AdamW(fused=True)": partial(torch.optim.AdamW, fused=True),
    "torch_fused": optim.AdamW,
}


class LoRA(nn.Module):
    """A frozen linear map with an adapter of rank 8."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.a = nn.Parameter(torch.randn(8, base.in_features, device=device) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, 8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * F.linear(F.linear(x, self.a), self.b)


def trained(model: nn.Module, make: Callable[..., torch.optim.Optimizer], loss: Callable[[], Tensor]) -> Call:
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

    def step(make: Callable[..., torch.optim.Optimizer]) -> Call:
        model = LoRA(nn.Linear(512, 512, device=device))
        return trained(model, make, lambda: F.cross_entropy(model(x).view(256, 512), targets))

    return {name: step(make) for name, make in OPTIMIZERS.items()}


def train_honest(device: str) -> Contenders:
    config = qwen(1, intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
    torch.manual_seed(0)
    stock = Qwen2ForCausalLM(config).to(device).requires_grad_(False)
    attention = stock.model.layers[0].self_attn
    attention.q_proj, attention.v_proj = LoRA(attention.q_proj), LoRA(attention.v_proj)
    ids = torch.randint(config.vocab_size, (4, 64), device=device)

    def step(name: str, make: Callable[..., torch.optim.Optimizer]) -> Call:
        model = copy.deepcopy(stock)
        if name == "torch_fused":
            apply_torch_fused(model)
        return trained(model, make, lambda: model(ids, labels=ids, use_cache=False).loss)

    return {name: step(name, make) for name, make in OPTIMIZERS.items()}


def adamw_of(shapes: list[tuple[int, ...]], device: str) -> Contenders:
    def step(make: Callable[..., torch.optim.Optimizer]) -> Call:
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        return make(params).step

    return {name: step(make) for name, make in OPTIMIZERS.items()}


LAYER = [
    *[(896, 896), (896,), (128, 896), (128,), (128, 896), (128,), (896, 896)],
    *[(4864, 896), (4864, 896), (896, 4864), (896,), (896,)],
]

# ---- the page -------------------------------------------------------------------------------------------------------


def _cache_rows() -> list[Row]:
    rows = []
    for name, layers, quoted in (("KV cache, single layer", 1, "11.6 ns"), ("KV cache, all 24 layers", 24, "320 ns")):
        text = f"clear, then insert k and v of (1, 14, 1, 64) in {layers} of 24 layers"
        real = f"one token of (1, 2, 1, 64) appended behind 512 in {layers} layers"
        published = Workload(text, partial(insert_published, layers))
        rows.append(Row(name, quoted, published, Workload(real, partial(insert_honest, layers))))
    for length, quoted in ((512, "50.4 ms"), (2048, "559 ms")):
        text = f"{length // 2} tokens of (1, 14, 1, 64) appended one by one to 24 layers, capacity {length}"
        real = f"{length} tokens of (1, 2, 1, 64) appended one by one to 24 layers"
        published = Workload(text, partial(sequence, length, length // 2, 14))
        rows.append(
            Row(f"full sequence {length}", quoted, published, Workload(real, partial(sequence, length, length, 2)))
        )
    for size, config in (("0.5B", SMALL), ("1.5B", MIDDLE), ("3B", LARGE)):
        published = Workload("an empty cache object", partial(allocate_published, config))
        real = f"a cache of 2048 tokens, {config.num_hidden_layers} layers, allocated and written"
        rows.append(
            Row(f"KV allocation, Qwen {size}", "20.7 ns", published, Workload(real, partial(allocate_honest, config)))
        )
    return rows


def _sampling_rows() -> list[Row]:
    quoted = {
        "greedy": ("109.5 us", "101 us", "112 us", "124 us", "161 us", ""),
        "top-k 50": ("469 us", "111 us", "224 us", "495 us", "1500 us", ""),
        "top-p 0.9": ("611 us", "115 us", "279 us", "630 us", "2210 us", ""),
    }
    rows = []
    for op, (alone, *by_vocabulary) in quoted.items():
        text = "{} logits copied to the host, all of the work there"
        real = "an id drawn from {} logits on the device, read back"
        sizes = [(op, alone, 32000, 151936)]
        vocabularies = (1000, 10000, 32000, 100000, 151936)
        sizes += [(f"{op}, vocabulary {n}", q, n, n) for n, q in zip(vocabularies, by_vocabulary, strict=True)]
        for name, figure, n, m in sizes:
            published = Workload(text.format(n), partial(sample_published, op, n))
            rows.append(Row(name, figure, published, Workload(real.format(m), partial(sample_honest, op, m))))
    return rows


def _op_rows() -> list[Row]:
    shape, scores, hidden = (4, 16, 1024), (1, 14, 128, 128), (1, 128, 896)
    rows = [
        Row(
            "softmax",
            "43.6 us",
            Workload(f"{shape}", partial(softmax_of, shape)),
            Workload(f"attention scores {scores}", partial(softmax_of, scores)),
        )
    ]
    for op, quoted in (("layer_norm", "47.8 us"), ("rms_norm", "25.5 us")):
        published = Workload(f"{shape}, no weights", partial(norm_of, op, shape, False))
        honest = Workload(f"{hidden} with weights", partial(norm_of, op, hidden, True))
        rows.append(Row(op.replace("_", " ").replace("rms", "RMS"), quoted, published, honest))
    return rows


ROWS = [
    *_cache_rows(),
    *_sampling_rows(),
    *_op_rows(),
    Row(
        "full training step",
        "3.3 ms",
        Workload(
            "LoRA of rank 8 on a (512, 512) linear, (4, 64, 512): forward, cross entropy, backward, AdamW",
            train_published,
        ),
        Workload(
            "LoRA of rank 8 on q and v of a Qwen2.5-0.5B of one layer, 4 x 64 tokens, loss over 151936", train_honest
        ),
    ),
    Row(
        "AdamW",
        "1.06 ms",
        Workload("one (512, 512) parameter", partial(adamw_of, [(512, 512)])),
        Workload("the 12 parameters of a Qwen2.5-0.5B layer, 15 million", partial(adamw_of, LAYER)),
    ),
]


# ---- timing ---------------------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """The times of one contender's call, in seconds, run by run."""

    call: Call
    runs: list[list[float]] = field(default_factory=list)

    def columns(self) -> dict[str, float | str]:
        """Milliseconds a call, and how the runs and the samples differ."""
        medians = [statistics.median(run) for run in self.runs]
        every = [sample for run in self.runs for sample in run]
        return {
            "ms": statistics.median(medians) * 1e3,
            "variation": statistics.stdev(medians) / statistics.mean(medians) if len(medians) > 1 else 0.0,
            "outliers": str(outliers(every)),
            "samples": str(len(every)),
        }


def timed(contenders: Contenders, device: str, waits: bool, runs: int, cool_down: float) -> dict[str, Samples]:
    """Each run takes all contenders in turn, so that what disturbs one for a while disturbs the others as well."""
    wait = synchronizer(device)

    def sample(call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
            if waits:
                wait()
        seconds = time.perf_counter() - start
        wait()
        return seconds / calls

    found = {name: Samples(call) for name, call in contenders.items()}
    calls, counts = {}, {}
    for name, call in contenders.items():
        sample(call, 1)
        once = max(sample(call, 1), 1e-8)
        calls[name] = max(1, int(0.002 / once))
        counts[name] = max(1, min(15, int(0.03 / (once * calls[name]))))
    for _ in range(runs):
        time.sleep(cool_down)
        for name, samples in found.items():
            samples.runs.append([sample(samples.call, calls[name]) for _ in range(counts[name])])
    return found


def outliers(samples: list[float]) -> int:
    """Samples further than 1.5 times the distance of the quartiles from the nearer one."""
    if len(samples) < 4:
        return 0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    margin = 1.5 * (high - low)
    return sum(not low - margin <= sample <= high + margin for sample in samples)


def main() -> None:
    args = arguments(
        __doc__,
        ("--runs", {"type": int, "default": 5, "help": "runs of each row"}),
        ("--cool-down", {"type": float, "default": 0.0, "help": "seconds before each run"}),
    )
    keep_freed_memory()
    results = Results("seed", KEYS, VALUES, args.results, args.device, args.again)
    torch.manual_seed(0)
    with Progress("seed table", 2 * len(ROWS)) as progress:
        for row in ROWS:
            for kind, workload in ((PUBLISHED, row.published), (HONEST, row.honest)):
                progress.say(
                    f"{row.name}, {kind}: {workload.text}" + (f" (M4 Max: {row.quoted})" if row.quoted else "")
                )
                contenders = workload.make(args.device)
                keys = {who: {"row": row.name, "workload": kind, "contender": who} for who in contenders}
                rows = {who: results.current(**key) for who, key in keys.items()}
                if None in rows.values():
                    samples = timed(contenders, args.device, kind == HONEST, args.runs, args.cool_down)
                    rows = {who: results.add(**key, **samples[who].columns()) for who, key in keys.items()}
                for who, measured in rows.items():
                    variation = f"+-{float(measured['variation']) * 100:3.0f} %"
                    progress.say(f"  {who:28s} {float(measured['ms']):12.5f} ms  {variation}")
                progress.advance()


if __name__ == "__main__":
    main()
