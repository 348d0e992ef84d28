"""The ops next to torch's, transformers' and other libraries', and to a copy of the same bytes.

"llama" makes the roundings of Hugging Face's code, which is what it must be compared with.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from models import CONFIGS, GROUP_SIZE, made
from peers import kernels
from record import Case
from timing import Call, Columns, columns, copies, interleave, sets
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.models.llama import modeling_llama

from torch_fused import functional, optim, sampling
from torch_fused.hf import FusedKVCache
from torch_fused.ops.layer_norm import layer_norm_reference
from torch_fused.ops.rms_norm import rms_norm_reference
from torch_fused.testing import NAMES

DTYPES = (torch.float32, torch.bfloat16)
COPY, COMPILED = "copy", "torch.compile"
Contenders = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class OpCase(Case):
    """One op at one shape. `op` is its name, followed by "backward" for its gradient."""

    nbytes: int  # every operand and every result, each once; 0 where bandwidth says nothing
    operands: Callable[[], Iterable[Any]]  # makes them on torch's default device
    calls: Contenders
    prepare: Callable[..., Call] = partial  # makes what is timed from a contender and the operands
    once: bool = False  # a call changes what the next one does, so a sample is a single call

    def contenders(self, device: str) -> Contenders:
        return {**self.calls, **kernels(self.op)}

    def measure(self, contenders: Contenders, device: str) -> dict[str, Columns]:
        torch.manual_seed(0)
        with torch.device(device):
            operands = [tuple(self.operands()) for _ in range(1 if self.once else sets(self.nbytes, device))]
        calls = {name: [self.prepare(call, *each) for each in operands] for name, call in contenders.items()}
        if self.nbytes:
            calls[COPY], copied = copies(self.nbytes, device)
        with torch.no_grad():
            samples = interleave(calls, device, **({"rounds": 40, "calls": 1} if self.once else {}))
        found = {name: columns(each) for name, each in samples.items()}
        if self.nbytes:
            copy = copied / found.pop(COPY)["ms"]
            for each in found.values():
                rate = self.nbytes / each["ms"]
                each |= {"gb_s": rate / 1e6, "copy_share": rate / copy}
        return found


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


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


def and_compiled(calls: Contenders) -> Contenders:
    """With the first that is not ours as torch.compile makes it."""
    theirs = next(call for name, call in calls.items() if not name.startswith("torch_fused"))
    return {**calls, COMPILED: torch.compile(theirs, dynamic=False)}


# ---- norms, softmax, gated activations, rotary embedding ------------------------------------------------------------

Shapes = Iterable[tuple[int, int]]


def by_rows(
    op: str, shapes: Shapes, full: int, vectors: int, passes: int, calls: Contenders,
    dtypes: Iterable[torch.dtype] = DTYPES, prepare: Callable[..., Call] = partial,
) -> list[OpCase]:  # fmt: skip
    """An op of `full` operands of (rows, cols), which are moved `passes` times in all, and `vectors` of (cols,)."""

    def case(rows: int, cols: int, dtype: torch.dtype) -> OpCase:
        operands = [(rows, cols)] * full + [(cols,)] * vectors
        return OpCase(
            op, f"({rows}, {cols})", NAMES[dtype], "", passes * rows * cols * dtype.itemsize,
            lambda: (randn(*size, dtype=dtype) for size in operands), calls, prepare,
        )  # fmt: skip

    return [case(*shape, dtype) for shape in shapes for dtype in dtypes]


def both_ways(op: str, shapes: Shapes, full: int, vectors: int, passes: tuple[int, int], calls: Contenders) -> list:
    """An op, and its gradients in the shapes of training; `passes` forward and backward."""
    calls, long = and_compiled(calls), [shape for shape in shapes if shape[0] >= 2048]
    backward = by_rows(f"{op} backward", long, full, vectors, passes[1], calls, prepare=gradients(full + vectors))
    return by_rows(op, shapes, full, vectors, passes[0], calls) + backward


EPS = 1e-6


def hugging_face_norm(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm_reference(x, w.shape, w, EPS, casting_mode="llama")


def added(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return norm(total, w), total

    return call


def rms_norm(device: str, full: bool) -> list[Case]:
    norm = {
        "torch_fused": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        "torch_fused llama": lambda x, w: functional.rms_norm(x, w.shape, w, EPS, casting_mode="llama"),
        "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, EPS),
        "HF module": hugging_face_norm,
    }
    add_norm = {
        "torch_fused": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS, casting_mode="torch"),
        "torch_fused llama": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS),
        "add, F.rms_norm": added(norm["F.rms_norm"]),
        "add, HF module": added(hugging_face_norm),
    }
    shapes = [(1, 896), (128, 896), (4096, 896), (4096, 4096)]
    add = by_rows("add_rms_norm", shapes, 2, 1, 4, and_compiled(add_norm))
    return both_ways("rms_norm", shapes, 1, 1, (2, 3), norm) + add


def layer_norm(device: str, full: bool) -> list[Case]:
    calls = {
        "torch_fused": lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
        "F.layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        "torch composed": lambda x, w, b: layer_norm_reference(x, w.shape, w, b),
    }
    return both_ways("layer_norm", [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000)], 1, 2, (2, 3), calls)


def composed_softmax(x: Tensor) -> Tensor:
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


SOFTMAX = {
    "torch_fused": functional.softmax,
    "torch.softmax": partial(torch.softmax, dim=-1),
    "torch composed": composed_softmax,
}


def softmax(device: str, full: bool) -> list[Case]:
    shapes = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000), (1, 151936), (64, 151936)]
    return both_ways("softmax", shapes, 1, 0, (2, 3), SOFTMAX)


def swiglu(device: str, full: bool) -> list[Case]:
    silus = {
        "torch_fused": functional.silu_mul,
        "torch_fused llama": partial(functional.silu_mul, casting_mode="llama"),
        "F.silu(gate) * up": lambda gate, up: F.silu(gate) * up,
    }
    gelus = {
        "torch_fused": partial(functional.gelu_mul, approximate="tanh"),
        "torch_fused exact": functional.gelu_mul,
        "F.gelu(gate) * up": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    }
    shapes, ops = [(1, 4864), (128, 4864), (2048, 4864), (4096, 4096)], {"silu_mul": silus, "gelu_mul": gelus}
    return [case for op, calls in ops.items() for case in both_ways(op, shapes, 2, 0, (3, 5), calls)]


def rope(device: str, full: bool) -> list[OpCase]:
    """Shapes are (batch, tokens, query heads, key heads, head_dim): of Qwen2.5-0.5B and Qwen3-8B."""
    shapes = [(1, 1, 14, 2, 64), (1, 128, 14, 2, 64), (1, 2048, 14, 2, 64), (1, 2048, 32, 8, 128)]
    calls = and_compiled({
        "torch_fused": functional.apply_rotary_pos_emb,
        "torch_fused llama": partial(functional.apply_rotary_pos_emb, casting_mode="llama"),
        "transformers": modeling_llama.apply_rotary_pos_emb,
    })  # fmt: skip

    def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, prepare: Callable[..., Call] = partial) -> OpCase:
        batch, tokens, q_heads, k_heads, head_dim = shape

        def operands() -> tuple[Tensor, ...]:
            q, k = (randn(batch, tokens, heads, head_dim, dtype=dtype) for heads in (q_heads, k_heads))
            cos, sin = (randn(1, tokens, head_dim, dtype=dtype) for _ in range(2))
            return q.transpose(1, 2), k.transpose(1, 2), cos, sin

        nbytes = (2 * batch * (q_heads + k_heads) + 2) * tokens * head_dim * dtype.itemsize
        return OpCase(op, str(shape), NAMES[dtype], "", nbytes, operands, calls, prepare)

    op = "apply_rotary_pos_emb"
    forward = [case(op, shape, dtype) for shape in shapes for dtype in DTYPES]
    return forward + [case(f"{op} backward", shapes[2], dtype, gradients(2)) for dtype in DTYPES]


# ---- optimizer, cache, sampling, packed weights ---------------------------------------------------------------------

OPTIMIZERS = {
    "torch_fused": optim.AdamW,
    "torch fused=True": partial(torch.optim.AdamW, fused=True),
    "torch foreach=True": partial(torch.optim.AdamW, foreach=True),
}


def parameters(shapes: Iterable[Iterable[int]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """With gradients."""
    params = [torch.nn.Parameter(randn(*shape, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def adamw(device: str, full: bool) -> list[OpCase]:
    def case(name: str, dtype: torch.dtype) -> OpCase:
        shapes = [weight.shape for weight in made(name, dtype, "meta").parameters()]
        elements = sum(shape.numel() for shape in shapes)
        return OpCase(
            "adamw", f"{elements / 1e6:.0f} million in {len(shapes)} tensors", NAMES[dtype], "",
            7 * elements * dtype.itemsize,  # four operands are read, three written
            lambda: parameters(shapes, dtype), OPTIMIZERS, lambda make, *params: make(params).step,
        )  # fmt: skip

    # On the CPU the large one has 8 GB of operands, and takes half a second per step.
    names = ["a small Qwen2", "Qwen2.5-0.5B"] if full or device != "cpu" else ["a small Qwen2"]
    return [case(name, dtype) for name in names for dtype in DTYPES]


def fill(cache: Any, states: Tensor, layers: int) -> None:
    for layer in range(layers):
        cache.update(states, states, layer)


def kv_cache(device: str, full: bool) -> list[Case]:
    """A token appended to the cache of Qwen2.5-0.5B; the shape is how many tokens it holds."""
    config, room = CONFIGS["Qwen2.5-0.5B"](), 64
    makes = {
        "FusedKVCache": lambda length: FusedKVCache(config, expected_len=length),
        "DynamicCache": lambda length: DynamicCache(config=config),
        "StaticCache": lambda length: StaticCache(config=config, max_cache_len=length),
    }

    def filled(make: Callable[[int], Any], prompt: Tensor, token: Tensor) -> Call:
        cache = make(prompt.shape[2] + room)
        fill(cache, prompt, config.num_hidden_layers)
        return partial(fill, cache, token, config.num_hidden_layers)

    def case(length: int) -> OpCase:
        # As attention passes them: heads and tokens of the projection's output, transposed.
        operands = lambda: (randn(1, n, 2, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (length, 1))  # noqa: E731
        return OpCase("kv append", f"{length} tokens", "bf16", "", 0, operands, makes, filled, once=True)

    return [case(length) for length in (512, 4096, 32768)]


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


ours, TOP_K, TOP_P = partial(sampling.sample, seed=1), TopKLogitsWarper(50), TopPLogitsWarper(0.9)
DRAWS: dict[str, Contenders] = {
    "greedy": {"torch_fused": sampling.greedy, "torch.argmax": partial(torch.argmax, dim=-1)},
    "top-k 50": {
        "torch_fused": partial(ours, top_k=50), "torch.topk, multinomial": top_k_multinomial,
        "HF chain": hugging_face(TOP_K),
    },
    "top-k 50, top-p 0.9": {"torch_fused": partial(ours, top_k=50, top_p=0.9), "HF chain": hugging_face(TOP_K, TOP_P)},
    "top-p 0.9": {"torch_fused": partial(ours, top_p=0.9), "HF chain": hugging_face(TOP_P)},
    "top-p 0.95": {"torch_fused": partial(ours, top_p=0.95), "HF chain": hugging_face(TopPLogitsWarper(0.95))},
    "whole vocabulary": {"torch_fused": ours, "softmax, multinomial": hugging_face()},
}  # fmt: skip
LOGITS = {
    "normal": lambda shape: torch.randn(shape) * 2,
    "nearly flat": lambda shape: torch.randn(shape) * 1e-3,
    "all equal": torch.zeros,
}


def draws(device: str, full: bool) -> list[Case]:
    def case(op: str, shape: tuple[int, int], kind: str) -> Case:
        return OpCase(op, str(shape), "f32", kind, 4 * shape[0] * shape[1], lambda: [LOGITS[kind](shape)], DRAWS[op])

    shapes = [(1, 32000), (1, 151936), (32, 151936)]
    return [case(op, shape, kind) for shape in shapes for kind in LOGITS for op in DRAWS]


def quantized(device: str, full: bool) -> list[Case]:
    """Projections and heads: (vectors, rows, columns)."""
    shapes = [
        (1, 896, 896), (1, 4864, 896), (1, 896, 4864), (1, 151936, 896), (1, 4096, 4096), (8, 4864, 896),
        (128, 4864, 896),
    ]  # fmt: skip

    def case(bits: int, vectors: int, rows: int, cols: int, dtype: torch.dtype) -> Case:
        options = {"bits": bits, "group_size": GROUP_SIZE}

        def operands() -> tuple[Any, ...]:
            weight = randn(rows, cols, dtype=dtype)
            return randn(vectors, cols, dtype=dtype), weight, functional.quantize(weight, **options)

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
        nbytes = rows * cols * bits // 8 + (2 * rows * cols // GROUP_SIZE + vectors * (rows + cols)) * dtype.itemsize
        shape = f"({vectors}, {cols}) x ({rows}, {cols})"
        return OpCase("quantized_linear", shape, NAMES[dtype], f"{bits} bits", nbytes, operands, calls)

    return [case(bits, *shape, dtype) for shape in shapes for bits in (4, 8) for dtype in DTYPES]
