"""Mistakes in the kernels of softmax, SwiGLU, rotary embeddings, the KV cache and AdamW."""

from collections.abc import Callable

import torch

from torch_fused.functional import apply_rotary_pos_emb, gelu_mul, silu_mul, softmax
from torch_fused.ops.adamw import adamw_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.testing import make

from .bug import BARRIER, RACE, Bug


def adamw_step(*sizes: int) -> Callable[[], list[torch.Tensor]]:
    """A step over tensors of these sizes in a call of its own."""

    def run() -> list[torch.Tensor]:
        """The parameters and both averages; a tensor's step is its index."""
        params, grads, averages, squares = ([make(size, seed=i).abs() for size in sizes] for i in range(4))
        adamw_(params, grads, averages, squares, [torch.tensor(float(i)) for i in range(len(sizes))])
        return [*params, *averages, *squares]

    return run


def gated(backward: bool = False) -> Callable[[], object]:
    """silu_mul of rows that take two threadgroups each, or its gradients."""
    gate, up, grad = (make(3, 1500, seed=i) for i in range(3))
    if backward:
        return lambda: torch.ops.torch_fused.silu_mul_backward(grad, gate, up)
    return lambda: silu_mul(gate, up)


def gelu_gated(approximate: str, backward: bool = False) -> Callable[[], object]:
    """The same of gelu_mul, of gates on both sides of zero."""
    gate, up, grad = (make(3, 64, seed=i, scale=2) for i in range(3))
    if backward:
        return lambda: torch.ops.torch_fused.gelu_mul_backward(grad, gate, up, approximate=approximate)
    return lambda: gelu_mul(gate, up, approximate=approximate)


def rotated(rotary_dim: int = 16) -> Callable[[], object]:
    """Three query heads and one key head of 24 dimensions, five tokens."""
    q, k = make(1, 3, 5, 24), make(1, 1, 5, 24, seed=1)
    cos, sin = make(1, 5, rotary_dim, seed=2), make(1, 5, rotary_dim, seed=3)
    return lambda: apply_rotary_pos_emb(q, k, cos, sin)


def appended() -> Callable[[], object]:
    """Three tokens into a cache that has room for no more."""

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = make(2, 2, 5, 8), make(2, 2, 5, 8, seed=1)
        kv_append_(keys, values, make(2, 2, 3, 8, seed=2), make(2, 2, 3, 8, seed=3), 2)
        return keys, values

    return run


BUGS = [
    Bug(
        "every threadgroup takes the same elements",
        "adamw",
        "long(group - p.first[tensor]) * (THREADS * W)",
        "long(0 * group)",
        adamw_step(3000),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "a tensor's threadgroups are counted from the first tensor",
        "adamw",
        "long(group - p.first[tensor])",
        "long(group)",
        adamw_step(3000, 3000),
        "out-of-bounds|data race",  # whichever comes first
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "the tail is not held back by the tensor's end",
        "adamw",
        "uint(min(p.numel[tensor] - begin, long(THREADS * W)))",
        "uint(THREADS * W)",
        adamw_step(1001),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "the alignment of the first tensor is every tensor's",
        "adamw",
        "(p.aligned >> tensor & 1)",
        "(p.aligned & 1)",
        lambda: adamw_(
            *[[make(64, seed=i).abs(), make(65, seed=i).abs()[1:]] for i in range(4)], [torch.zeros(()) for _ in "ab"]
        ),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "the second tensor's threadgroups write the first tensor",
        "adamw",
        "name##0, name##1,",
        "name##0, name##0,",
        adamw_step(8, 8),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "missing barrier before the simdgroups' maxima and sums are combined",
        "softmax",
        BARRIER.replace("  ", "    ", 1),
        "\n",
        lambda: softmax(make(3, 896)),
        RACE,
        "common/online.metal.h",
        "part = {scratch[place.lane].x, scratch[place.lane].y};",
    ),
    Bug(
        "the last chunk is not held back by the row's end",
        "softmax",
        "const uint end = min(begin + p.chunk, p.cols);",
        "const uint end = begin + p.chunk;",
        lambda: softmax(make(1, 9000)),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "every threadgroup writes the first chunk",
        "softmax",
        "const uint row = group / p.chunks;\n  const uint begin = group % p.chunks * p.chunk;",
        "const uint row = group / p.chunks;\n  const uint begin = 0;",
        lambda: softmax(make(3, 9000)),
        r"data race on buffer 2 \(write-after-write",
        "common/pack.metal.h",
        "to[i] = uint4(",
    ),
    Bug(
        "one chunk too many is combined",
        "softmax",
        "if (thread_id < p.chunks) {",
        "if (thread_id <= p.chunks) {",
        lambda: softmax(make(1, 9000)),
        "out-of-bounds.*read of 8 bytes",
        "softmax/softmax.metal",
        "const float2 part = partial[row * p.chunks + thread_id];",
    ),
    Bug(
        "the gradient's rows packed whatever their alignment",
        "softmax",
        "grad_packs[i].load(grads, first + i * step, p.cols, p.aligned);",
        "grad_packs[i].load(grads, first + i * step, p.cols, true);",
        lambda: torch.ops.torch_fused.softmax_backward(make(3, 65)[:, 1:], make(3, 64)),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "the last threadgroup of a row is not held back by its end",
        "swiglu",
        "cols = uint(min(p.cols - start, long(threads * W)));",
        "cols = threads * W;",
        gated(),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "all threadgroups of a row take its first columns",
        "swiglu",
        "start = long(group % p.groups) * long(threads * W);",
        "start = 0;",
        gated(),
        r"data race on buffer 2 \(write-after-write",
        "common/pack.metal.h",
        "to[i] = uint4(",
    ),
    Bug(
        "packs of one operand by the other's alignment",
        "swiglu",
        "ups.load(up + at.row * p.up_stride + at.start, at.column, at.cols, p.flags & ALIGNED);",
        "ups.load(up + at.row * p.up_stride + at.start, at.column, at.cols, true);",
        lambda: silu_mul(make(3, 64), make(3, 65)[:, 1:]),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "a key head's number counts the query heads",
        "rope",
        "is_q ? head : head - p.q_heads",
        "head",
        rotated(),
        "out-of-bounds",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "one pack too many",
        "rope",
        "unit < p.heads * packs;",
        "unit <= p.heads * packs;",
        rotated(),
        "out-of-bounds",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "a half is stored as wide as the head",
        "rope",
        "store_columns<W>(to, column, half_dim, aligned, y);",
        "store_columns<W>(to, column, p.head_dim, aligned, y);",
        rotated(rotary_dim=12),
        r"data race on buffer 4 \(write-after-write",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "one unit too many",
        "kv_append",
        "index - p.keys.units < p.values.units",
        "index - p.keys.units <= p.values.units",
        appended(),
        "out-of-bounds",
        "kv_cache/kv_append.metal",
        "",
    ),
    Bug(
        "the row of a head taken for the batch",
        "kv_append",
        "const uint batch = head_row / heads,",
        "const uint batch = head_row,",
        appended(),
        "out-of-bounds",
        "kv_cache/kv_append.metal",
        "",
    ),
]

ONLY_NUMBERS = [
    ("beta1 and its complement swapped", "adamw", "near ? s.lerp : s.lerp - F(1.0f)", "F(1.0f) - s.lerp",
     adamw_step(300, 40)),
    ("no bias correction", "adamw", "sqrt(exp_avg_sq) / s.bias_correction2", "sqrt(exp_avg_sq)", adamw_step(300, 40)),
    ("the old average of the squares", "adamw", "sqrt(exp_avg_sq)", "sqrt(x.exp_avg_sq)", adamw_step(300, 40)),
    ("bias corrections of the first tensor", "adamw", "p.bias_correction2[tensor]", "p.bias_correction2[0]",
     adamw_step(300, 40)),
    ("a state that is not stored", "adamw", "store_columns<W>(exp_avg, at, count, aligned, m);", ";",
     adamw_step(300, 40)),
    ("the row's tail counts as zeros", "softmax", "p.cols, p.aligned, -INFINITY);", "p.cols, p.aligned);",
     lambda: softmax(make(3, 13))),
    ("every simdgroup keeps its own maximum", "softmax", "exp(mine.largest - total.largest) / total.sum",
     "1.0f / total.sum", lambda: softmax(make(3, 896))),
    ("the first row's chunks for all rows", "softmax", "partial[row * p.chunks + thread_id]", "partial[thread_id]",
     lambda: softmax(make(3, 9000))),
    ("exp of the gate, not of its negative", "swiglu", "1.0f + exp(-y)", "1.0f + exp(y)", gated()),
    (
        "slope of the sigmoid",
        "swiglu",
        "limited * y_slope * (1.0f - sigmoid)",
        "limited * y_slope * sigmoid",
        gated(backward=True),
    ),
    ("gelu is even", "swiglu", "g < 0.0f ? tail : 1.0f - tail", "1.0f - tail", gelu_gated("none")),
    ("slope without the bell", "swiglu", "below + 0.39894228f * g * bell", "below", gelu_gated("none", True)),
    ("slope of the cube", "swiglu", "Wide(0.134145)", "Wide(0.044715)", gelu_gated("tanh", True)),
    ("the sine's sign", "rope", "!transposed, llama, y", "transposed, llama, y", rotated()),
    ("both halves with the first half's cosine", "rope", "rotate<T, W>(b, a, cos_b,", "rotate<T, W>(b, a, cos_a,",
     rotated()),
    ("dimensions behind the tables from the start of the head", "rope",
     "load_columns<W>(from + 2 * p.half_dim,", "load_columns<W>(from,", rotated()),
    ("keys in the place of values", "kv_append", "copy_unit(values, new_values,", "copy_unit(values, new_keys,",
     appended()),
]  # fmt: skip
