"""The ops next to torch's, transformers' and other libraries', and to a copy of the same bytes.

"llama" makes the roundings of Hugging Face's code, which is what it must be compared with.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peers import kernels
from record import Case, Columns
from timing import Call, copies, interleave, sets
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, StaticCache
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama import modeling_llama

from torch_fused import functional, optim, sampling
from torch_fused.hf import FusedKVCache
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import rms_norm_reference
from torch_fused.testing import NAMES

DTYPES = (torch.float32, torch.bfloat16)
COMPILED, COPY = "torch.compile", "copy"
Contenders = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class OpCase(Case):
    """One op at one shape. `op` is its name, followed by "backward" for its gradient.

    Attributes:
        nbytes: every operand and every result, each once; 0 where bandwidth says nothing.
        operands: makes them on a device.
        calls: what is timed, by name.
        prepare: makes what is timed from a contender and the operands.
        once: a call changes what the next one does, so a sample is a single call.
    """

    nbytes: int
    operands: Callable[[str], tuple[Any, ...]]
    calls: Contenders
    prepare: Callable[..., Call] = partial
    once: bool = False

    def contenders(self, device: str) -> Contenders:
        return {**self.calls, **kernels(self.op)}

    def measure(self, contenders: Contenders, device: str) -> dict[str, Columns]:
        torch.manual_seed(0)
        operands = [self.operands(device) for _ in range(1 if self.once else sets(self.nbytes, device))]
        calls = {name: [self.prepare(call, *each) for each in operands] for name, call in contenders.items()}
        copied = 0
        if self.nbytes:
            calls[COPY], copied = copies(self.nbytes, device)
        with torch.no_grad():
            timings = interleave(calls, device, **({"rounds": 40, "calls": 1} if self.once else {}))
        copy = timings.pop(COPY, None)

        def bandwidth(seconds: float) -> dict[str, float | None]:
            rate = self.nbytes / seconds
            return {"gb_s": rate / 1e9, "copy_share": rate / (copied / copy.seconds)} if copy else {}

        return {name: {**timing.columns(), **bandwidth(timing.seconds)} for name, timing in timings.items()}


def randn(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def gradients(of: int) -> Callable[..., Call]:
    """Prepares the gradients of the first `of` operands, for random gradients of the results."""

    def prepare(call: Callable[..., Any], *operands: Tensor) -> Call:
        inputs = [operand.detach().requires_grad_() for operand in operands[:of]]
        with torch.enable_grad():
            results = call(*inputs, *operands[of:])
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.randn_like(result) for result in results]
        return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)

    return prepare


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, dynamic=False)


# ---- norms, softmax, gated activations, rotary embedding ------------------------------------------------------------

Shapes = Iterable[tuple[int, int]]


def by_rows(
    op: str, shapes: Shapes, full: int, vectors: int, passes: int, calls: Contenders,
    dtypes: Iterable[torch.dtype] = DTYPES, prepare: Callable[..., Call] = partial,
) -> list[Case]:  # fmt: skip
    """An op of `full` operands of (rows, cols), which are moved `passes` times in all, and `vectors` of (cols,)."""

    def case(rows: int, cols: int, dtype: torch.dtype) -> Case:
        def operands(device: str) -> tuple[Tensor, ...]:
            sizes = [(rows, cols)] * full + [(cols,)] * vectors
            return tuple(randn(*size, dtype=dtype, device=device) for size in sizes)

        nbytes = passes * rows * cols * dtype.itemsize
        return OpCase(op, f"({rows}, {cols})", NAMES[dtype], "", nbytes, operands, calls, prepare)

    return [case(*shape, dtype) for shape in shapes for dtype in dtypes]


def both_ways(
    op: str, shapes: Shapes, backward: Shapes, full: int, vectors: int, passes: tuple[int, int], calls: Contenders
) -> list[Case]:
    """An op and its gradients; `passes` forward and backward."""
    gradient = gradients(full + vectors)
    return by_rows(op, shapes, full, vectors, passes[0], calls) + by_rows(
        f"{op} backward", backward, full, vectors, passes[1], calls, prepare=gradient
    )


EPS = 1e-6


def torch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def hugging_face_norm(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm_reference(x, w.shape, w, EPS, casting_mode="llama")


def added(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, w), total

    return call


def rms_norm(device: str, full: bool) -> list[Case]:
    shapes, wide = [(1, 896), (128, 896), (4096, 896), (4096, 4096)], [(4096, 896), (4096, 4096)]
    norm: Contenders = {
        "torch_fused": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        "torch_fused llama": lambda x, w: functional.rms_norm(x, w.shape, w, EPS, casting_mode="llama"),
        "F.rms_norm": torch_norm,
        "HF module": hugging_face_norm,
        COMPILED: compiled(torch_norm),
    }
    add_norm: Contenders = {
        "torch_fused": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS, casting_mode="torch"),
        "torch_fused llama": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS),
        "add, F.rms_norm": added(torch_norm),
        "add, HF module": added(hugging_face_norm),
        COMPILED: compiled(added(torch_norm)),
    }
    cases = both_ways("rms_norm", shapes, wide, 1, 1, (2, 3), norm)
    return cases[:8] + by_rows("add_rms_norm", shapes, 2, 1, 4, add_norm) + cases[8:]


def layer_norm(device: str, full: bool) -> list[Case]:
    calls: Contenders = {
        "torch_fused": lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
        "F.layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        "torch composed": lambda x, w, b: layer_norm_reference(x, w.shape, w, b),
        COMPILED: compiled(lambda x, w, b: F.layer_norm(x, w.shape, w, b)),
    }
    shapes, wide = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000)], [(4096, 1024), (4096, 4096)]
    return both_ways("layer_norm", shapes, wide, 1, 2, (2, 3), calls)


def composed_softmax(x: Tensor) -> Tensor:
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def softmax(device: str, full: bool) -> list[Case]:
    calls: Contenders = {
        "torch_fused": functional.softmax,
        "torch.softmax": partial(torch.softmax, dim=-1),
        "torch composed": composed_softmax,
        COMPILED: compiled(partial(torch.softmax, dim=-1)),
    }
    shapes = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000), (1, 151936), (64, 151936)]
    return both_ways("softmax", shapes, [(4096, 1024), (4096, 4096)], 1, 0, (2, 3), calls)


def swiglu(device: str, full: bool) -> list[Case]:
    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def gelu(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    silus: Contenders = {
        "torch_fused": functional.silu_mul,
        "torch_fused llama": partial(functional.silu_mul, casting_mode="llama"),
        "F.silu(gate) * up": silu,
        COMPILED: compiled(silu),
    }
    gelus: Contenders = {
        "torch_fused": partial(functional.gelu_mul, approximate="tanh"),
        "torch_fused exact": functional.gelu_mul,
        "F.gelu(gate) * up": gelu,
        COMPILED: compiled(gelu),
    }
    shapes, wide = [(1, 4864), (128, 4864), (2048, 4864), (4096, 4096)], [(2048, 4864), (4096, 4096)]
    ops = {"silu_mul": silus, "gelu_mul": gelus}
    return [case for op, calls in ops.items() for case in both_ways(op, shapes, wide, 2, 0, (3, 5), calls)]


def rope(device: str, full: bool) -> list[Case]:
    """Shapes are (batch, tokens, query heads, key heads, head_dim): of Qwen2.5-0.5B and Qwen3-8B."""
    shapes = [(1, 1, 14, 2, 64), (1, 128, 14, 2, 64), (1, 2048, 14, 2, 64), (1, 2048, 32, 8, 128)]
    calls: Contenders = {
        "torch_fused": functional.apply_rotary_pos_emb,
        "torch_fused llama": partial(functional.apply_rotary_pos_emb, casting_mode="llama"),
        "transformers": modeling_llama.apply_rotary_pos_emb,
        COMPILED: compiled(modeling_llama.apply_rotary_pos_emb),
    }

    def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, prepare: Callable[..., Call] = partial) -> Case:
        batch, tokens, q_heads, k_heads, head_dim = shape

        def operands(device: str) -> tuple[Tensor, ...]:
            q, k = (randn(batch, tokens, n, head_dim, dtype=dtype, device=device) for n in (q_heads, k_heads))
            cos, sin = (randn(1, tokens, head_dim, dtype=dtype, device=device) for _ in range(2))
            return q.transpose(1, 2), k.transpose(1, 2), cos, sin

        nbytes = (2 * batch * (q_heads + k_heads) + 2) * tokens * head_dim * dtype.itemsize
        return OpCase(op, str(shape), NAMES[dtype], "", nbytes, operands, calls, prepare)

    op = "apply_rotary_pos_emb"
    forward = [case(op, shape, dtype) for shape in shapes for dtype in DTYPES]
    return forward + [case(f"{op} backward", shapes[2], dtype, gradients(2)) for dtype in DTYPES]


# ---- optimizer, cache, sampling, packed weights ---------------------------------------------------------------------


def qwen_shapes(hidden: int, intermediate: int, key_values: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The parameters of a Qwen2 with tied embeddings."""
    attention = [(hidden, hidden), (hidden,), (key_values, hidden), (key_values,), (key_values, hidden), (key_values,)]
    rest = [(hidden, hidden), (intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,)]
    return [(vocabulary, hidden), (hidden,)] + ([*attention, *rest, (hidden,)]) * layers


SMALL, QWEN = qwen_shapes(384, 1024, 128, 5, 256), qwen_shapes(896, 4864, 128, 24, 151936)  # Qwen2.5-0.5B
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "torch_fused": optim.AdamW,
    "torch fused=True": partial(torch.optim.AdamW, fused=True),
    "torch foreach=True": partial(torch.optim.AdamW, foreach=True),
}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """With gradients."""
    params = [torch.nn.Parameter(randn(*shape, dtype=dtype, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def adamw(device: str, full: bool) -> list[Case]:
    def case(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Case:
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        shape = f"{elements / 1e6:.0f} million in {len(shapes)} tensors"
        nbytes = 7 * elements * dtype.itemsize  # four operands are read, three written

        def step(make: Callable[..., torch.optim.Optimizer], *params: torch.nn.Parameter) -> Call:
            return make(params).step

        def operands(device: str) -> tuple[torch.nn.Parameter, ...]:
            return tuple(parameters(shapes, dtype, device))

        return OpCase("adamw", shape, NAMES[dtype], "", nbytes, operands, OPTIMIZERS, step)

    lists = [SMALL, QWEN] if full or device != "cpu" else [SMALL]  # 8 GB of operands, half a second per step
    return [case(shapes, dtype) for shapes in lists for dtype in DTYPES]


def kv_cache(device: str, full: bool) -> list[Case]:
    """A token appended to the cache of Qwen2.5-0.5B; the shape is how many tokens it holds."""
    config, room = Qwen2Config(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2), 64
    makes: Contenders = {
        "FusedKVCache": lambda length: FusedKVCache(config, expected_len=length),
        "DynamicCache": lambda length: DynamicCache(config=config),
        "StaticCache": lambda length: StaticCache(config=config, max_cache_len=length),
    }

    def filled(make: Callable[[int], Any], prompt: Tensor, token: Tensor) -> Call:
        cache = make(prompt.shape[2] + room)

        def append(states: Tensor) -> None:
            for layer in range(config.num_hidden_layers):
                cache.update(states, states, layer)

        append(prompt)
        return lambda: append(token)

    def operands(length: int, device: str) -> tuple[Tensor, ...]:
        # As attention passes them: heads and tokens of the projection's output, transposed.
        states = (randn(1, tokens, 2, 64, dtype=torch.bfloat16, device=device) for tokens in (length, 1))
        return tuple(tensor.transpose(1, 2) for tensor in states)

    return [
        OpCase("kv append", f"{length} tokens", "bf16", "", 0, partial(operands, length), makes, filled, once=True)
        for length in (512, 4096, 32768)
    ]


def hugging_face(*warpers: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """What generate() does: logits processors, softmax, multinomial."""

    def call(x: Tensor) -> Tensor:
        for warper in warpers:
            x = warper(None, x)
        return torch.multinomial(x.softmax(-1), 1)

    return call


def top_k_multinomial(x: Tensor) -> Tensor:
    """The fastest that torch can do for top-k: no mask over the vocabulary."""
    values, ids = x.topk(50)
    return ids.gather(-1, torch.multinomial(values.softmax(-1), 1))


def ours(**options: Any) -> Callable[[Tensor], Tensor]:
    return partial(sampling.sample, seed=1, **options)


TOP_K, TOP_P = TopKLogitsWarper(50), TopPLogitsWarper(0.9)
CHAIN = "HF chain"
DRAWS: dict[str, Contenders] = {
    "greedy": {"torch_fused": sampling.greedy, "torch.argmax": partial(torch.argmax, dim=-1)},
    "top-k 50": {
        "torch_fused": ours(top_k=50), "torch.topk, multinomial": top_k_multinomial, CHAIN: hugging_face(TOP_K),
    },
    "top-k 50, top-p 0.9": {"torch_fused": ours(top_k=50, top_p=0.9), CHAIN: hugging_face(TOP_K, TOP_P)},
    "top-p 0.9": {"torch_fused": ours(top_p=0.9), CHAIN: hugging_face(TOP_P)},
    "top-p 0.95": {"torch_fused": ours(top_p=0.95), CHAIN: hugging_face(TopPLogitsWarper(0.95))},
    "whole vocabulary": {"torch_fused": ours(), "softmax, multinomial": hugging_face()},
}  # fmt: skip
LOGITS: dict[str, Callable[..., Tensor]] = {
    "normal": lambda shape, device: torch.randn(shape, device=device) * 2,
    "nearly flat": lambda shape, device: torch.randn(shape, device=device) * 1e-3,
    "all equal": lambda shape, device: torch.zeros(shape, device=device),
}


def draws(device: str, full: bool) -> list[Case]:
    def case(op: str, shape: tuple[int, int], kind: str) -> Case:
        nbytes = 4 * shape[0] * shape[1]
        return OpCase(op, str(shape), "f32", kind, nbytes, lambda device: (LOGITS[kind](shape, device),), DRAWS[op])

    shapes = [(1, 32000), (1, 151936), (32, 151936)]
    return [case(op, shape, kind) for shape in shapes for kind in LOGITS for op in DRAWS]


def quantized(device: str, full: bool) -> list[Case]:
    """Projections and heads: (vectors, rows, columns)."""
    shapes = [(1, 896, 896), (1, 4864, 896), (1, 896, 4864), (1, 151936, 896), (1, 4096, 4096), (8, 4864, 896)]
    shapes, group_size = [*shapes, (128, 4864, 896)], 64

    def case(bits: int, vectors: int, rows: int, cols: int, dtype: torch.dtype) -> Case:
        options = {"bits": bits, "group_size": group_size}

        def operands(device: str) -> tuple[Any, ...]:
            weight = randn(rows, cols, dtype=dtype, device=device)
            return randn(vectors, cols, dtype=dtype, device=device), weight, functional.quantize(weight, **options)

        calls = {
            "torch_fused": lambda x, dense, packed: functional.quantized_linear(x, *packed, **options),
            "F.linear, not packed": lambda x, dense, packed: F.linear(x, dense),
        }
        if device == "cpu" and vectors <= 8:
            int8 = torch.ops.torch_fused._quantized_linear_int8
            calls["torch_fused int8"] = lambda x, dense, packed: int8(x, *packed, **options)
        if vectors > 8:
            dequantize = partial(functional.dequantize, **options)
            calls["dequantize, F.linear"] = lambda x, dense, packed: F.linear(x, dequantize(*packed))
        nbytes = rows * cols * bits // 8 + (2 * rows * cols // group_size + vectors * (rows + cols)) * dtype.itemsize
        shape = f"({vectors}, {cols}) x ({rows}, {cols})"
        return OpCase("quantized_linear", shape, NAMES[dtype], f"{bits} bits", nbytes, operands, calls)

    return [case(bits, *shape, dtype) for shape in shapes for bits in (4, 8) for dtype in DTYPES]
