"""The ops next to torch's, transformers' and other libraries', and to a copy of the same bytes.

"llama" makes the roundings of Hugging Face's code, which is what it must be compared with.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
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

COPY, ROPE, DTYPES = "copy", "apply_rotary_pos_emb", (torch.float32, torch.bfloat16)
Contenders, Shape = Mapping[str, Callable[..., Any]], tuple[int, ...]


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


# ---- contenders -----------------------------------------------------------------------------------------------------

EPS = 1e-6


def hugging_face_norm(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm_reference(x, w.shape, w, EPS, casting_mode="llama")


def added(norm: Callable[..., Tensor], x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, w), total


def torch_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, w.shape, w, EPS)


def composed_softmax(x: Tensor) -> Tensor:
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


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


sample, top_k, top_p = partial(sampling.sample, seed=1), TopKLogitsWarper(50), TopPLogitsWarper(0.9)
DRAWS: dict[str, Contenders] = {
    "greedy": {"torch_fused": sampling.greedy, "torch.argmax": partial(torch.argmax, dim=-1)},
    "top-k 50": {
        "torch_fused": partial(sample, top_k=50), "torch.topk, multinomial": top_k_multinomial,
        "HF chain": hugging_face(top_k),
    },
    "top-k 50, top-p 0.9": {
        "torch_fused": partial(sample, top_k=50, top_p=0.9), "HF chain": hugging_face(top_k, top_p),
    },
    "top-p 0.9": {"torch_fused": partial(sample, top_p=0.9), "HF chain": hugging_face(top_p)},
    "top-p 0.95": {"torch_fused": partial(sample, top_p=0.95), "HF chain": hugging_face(TopPLogitsWarper(0.95))},
    "whole vocabulary": {"torch_fused": sample, "softmax, multinomial": hugging_face()},
}  # fmt: skip
OPTIMIZERS = {
    "torch_fused": optim.AdamW,
    "torch fused=True": partial(torch.optim.AdamW, fused=True),
    "torch foreach=True": partial(torch.optim.AdamW, foreach=True),
}
CALLS: dict[str, Contenders] = {
    "rms_norm": {
        "torch_fused": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        "torch_fused llama": lambda x, w: functional.rms_norm(x, w.shape, w, EPS, casting_mode="llama"),
        "F.rms_norm": torch_norm,
        "HF module": hugging_face_norm,
    },
    "add_rms_norm": {
        "torch_fused": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS, casting_mode="torch"),
        "torch_fused llama": lambda x, r, w: functional.add_rms_norm(x, r, w, EPS),
        "add, F.rms_norm": partial(added, torch_norm),
        "add, HF module": partial(added, hugging_face_norm),
    },
    "layer_norm": {
        "torch_fused": lambda x, w, b: functional.layer_norm(x, w.shape, w, b),
        "F.layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        "torch composed": lambda x, w, b: layer_norm_reference(x, w.shape, w, b),
    },
    "softmax": {
        "torch_fused": functional.softmax,
        "torch.softmax": partial(torch.softmax, dim=-1),
        "torch composed": composed_softmax,
    },
    "silu_mul": {
        "torch_fused": functional.silu_mul,
        "torch_fused llama": partial(functional.silu_mul, casting_mode="llama"),
        "F.silu(gate) * up": lambda gate, up: F.silu(gate) * up,
    },
    "gelu_mul": {
        "torch_fused": partial(functional.gelu_mul, approximate="tanh"),
        "torch_fused exact": functional.gelu_mul,
        "F.gelu(gate) * up": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    },
    ROPE: {
        "torch_fused": functional.apply_rotary_pos_emb,
        "torch_fused llama": partial(functional.apply_rotary_pos_emb, casting_mode="llama"),
        "transformers": modeling_llama.apply_rotary_pos_emb,
    },
}


# ---- norms, softmax, gated activations, rotary embedding ------------------------------------------------------------

HIDDEN, GATES = [(1, 896), (128, 896), (4096, 896), (4096, 4096)], [(1, 4864), (128, 4864), (2048, 4864), (4096, 4096)]
LONG = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000)]
BY_ROWS = {  # shapes (rows, cols), operands of that shape, operands of (cols,)
    "rms_norm": (HIDDEN, 1, 1),
    "add_rms_norm": (HIDDEN, 2, 1),
    "layer_norm": (LONG, 1, 2),
    "softmax": ([*LONG, (1, 151936), (64, 151936)], 1, 0),
    "silu_mul": (GATES, 2, 0),
    "gelu_mul": (GATES, 2, 0),
}


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Four dimensions are as attention passes them: heads and tokens of a projection's output, transposed."""
    x = torch.randn(shape).to(dtype)
    return x.transpose(1, 2) if len(shape) == 4 else x


def gradients(of: int, call: Callable[..., Any], *operands: Tensor) -> Call:
    """Prepares the gradients of the first `of` operands, for random gradients of the results."""
    inputs = [operand.detach().requires_grad_() for operand in operands[:of]]
    with torch.enable_grad():
        results = call(*inputs, *operands[of:])
    results = results if isinstance(results, tuple) else (results,)
    grads = [torch.randn_like(result) for result in results]
    return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)


def and_compiled(calls: Contenders) -> Contenders:
    """With the first that is not ours as torch.compile makes it."""
    theirs = next(call for name, call in calls.items() if not name.startswith("torch_fused"))
    return {**calls, "torch.compile": torch.compile(theirs, dynamic=False)}


def op_case(op: str, shape: Shape, sizes: Iterable[Shape], moved: int, dtype: torch.dtype, of: int = 0) -> OpCase:
    """An op with operands of these sizes, which moves so many elements; or the gradients of its first `of` operands."""
    return OpCase(
        f"{op} backward" if of else op, str(shape), NAMES[dtype], "", moved * dtype.itemsize,
        lambda: (randn(*size, dtype=dtype) for size in sizes), and_compiled(CALLS[op]),
        partial(gradients, of) if of else partial,
    )  # fmt: skip


def by_rows(*ops: str, shapes: Iterable[Shape] = (), dtypes: Iterable[torch.dtype] = DTYPES) -> list[OpCase]:
    """Ops, and their gradients in the shapes of training."""
    found = []
    for op in ops:
        known, full, vectors = BY_ROWS[op]
        adds = op == "add_rms_norm"  # it has two results, and its gradient is not timed
        for shape, dtype in product(shapes or known, dtypes):
            sizes, elements = [shape] * full + [shape[1:]] * vectors, shape[0] * shape[1]
            found.append(op_case(op, shape, sizes, (full + 1 + adds) * elements, dtype))
            if shape[0] >= 2048 and not adds:
                found.append(op_case(op, shape, sizes, (2 * full + 1) * elements, dtype, full + vectors))
    return found


def rope(device: str = "cpu", full: bool = False) -> list[OpCase]:
    """Shapes are (batch, tokens, query heads, key heads, head_dim): of Qwen2.5-0.5B and Qwen3-8B."""
    found = []
    shapes = [(1, 1, 14, 2, 64), (1, 128, 14, 2, 64), (1, 2048, 14, 2, 64), (1, 2048, 32, 8, 128)]
    for shape, dtype in product(shapes, DTYPES):
        batch, tokens, *heads, head_dim = shape
        sizes = [*((batch, tokens, n, head_dim) for n in heads), *[(1, tokens, head_dim)] * 2]
        moved = (2 * batch * sum(heads) + 2) * tokens * head_dim
        found += [op_case(ROPE, shape, sizes, moved, dtype, of) for of in ((0, 2) if shape == shapes[2] else (0,))]
    return found


# ---- optimizer, cache, sampling, packed weights ---------------------------------------------------------------------


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


def kv_cache(device: str = "cpu", full: bool = False) -> list[OpCase]:
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

    def operands(length: int) -> list[Tensor]:
        return [randn(1, tokens, 2, 64, dtype=torch.bfloat16) for tokens in (length, 1)]

    return [
        OpCase("kv append", f"{length} tokens", "bf16", "", 0, partial(operands, length), makes, filled, once=True)
        for length in (512, 4096, 32768)
    ]


LOGITS = {
    "normal": lambda shape: torch.randn(shape) * 2,
    "nearly flat": lambda shape: torch.randn(shape) * 1e-3,
    "all equal": torch.zeros,
}


def draws(device: str = "cpu", full: bool = False) -> list[OpCase]:
    def case(shape: Shape, kind: str, op: str) -> OpCase:
        return OpCase(op, str(shape), "f32", kind, 4 * shape[0] * shape[1], lambda: [LOGITS[kind](shape)], DRAWS[op])

    return list(starmap(case, product([(1, 32000), (1, 151936), (32, 151936)], LOGITS, DRAWS)))


def quantized(device: str, full: bool) -> list[Case]:
    """Projections and heads."""
    one = [(1, 896, 896), (1, 4864, 896), (1, 896, 4864), (1, 151936, 896), (1, 4096, 4096)]

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

    shapes = [*one, (8, 4864, 896), (128, 4864, 896)]
    return [case(bits, *shape, dtype) for shape in shapes for bits in (4, 8) for dtype in DTYPES]
