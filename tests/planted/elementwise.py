"""Bugs in the kernels of softmax, SwiGLU, rotary embeddings, the KV cache and AdamW."""

from collections.abc import Callable

import torch

from torch_fused.functional import apply_rotary_pos_emb, gelu_mul, silu_mul, softmax
from torch_fused.ops.adamw import adamw_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.ops.sum_of_squares import sum_of_squares
from torch_fused.testing import make

from .bug import BARRIER, RACE, Bug


def adamw_step(*sizes: int) -> Callable[[], list[torch.Tensor]]:
    """A step over tensors of these sizes in a separate call."""

    def run() -> list[torch.Tensor]:
        """The parameters and both averages; a tensor's step is its index."""
        params, grads, averages, squares = ([make(size, seed=i).abs() for size in sizes] for i in range(4))
        adamw_(params, grads, averages, squares, [torch.tensor(float(i)) for i in range(len(sizes))])
        return [*params, *averages, *squares]

    return run


def adamw_with_numbers(*sizes: int, found_inf: float = 0.0) -> Callable[[], list[torch.Tensor]]:
    """The same with amsgrad, and with every number in a tensor."""

    def run() -> list[torch.Tensor]:
        """Everything that is written; the maxima are below some of the squares and above others."""
        params, grads, averages, squares, maxima = ([make(size, seed=i).abs() for size in sizes] for i in range(5))
        steps = [torch.tensor(float(i)) for i in range(len(sizes))]
        numbers = {"lr": torch.tensor(0.02), "beta1": torch.tensor(0.75), "beta2": torch.tensor(0.96875)}
        scaler = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(found_inf)}
        clip = {"grad_squares": torch.tensor(400.0), "max_grad_norm": 2.0}
        adamw_(params, grads, averages, squares, steps, maxima, capturable=True, **numbers, **scaler, **clip)
        return [*params, *averages, *squares, *maxima, *steps]

    return run


def summed(*sizes: int) -> Callable[[], torch.Tensor]:
    """The squares of tensors of these sizes."""
    tensors = [make(size, seed=i) for i, size in enumerate(sizes)]
    return lambda: sum_of_squares(tensors)


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
    """Three tokens into a cache with room for exactly these."""

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
        "the second tensor's threadgroups write the first tensor's maxima",
        "adamw_amsgrad",
        "name##0, name##1,",
        "name##0, name##0,",
        adamw_with_numbers(8, 8),
        r"data race on buffer",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "every thread counts the first parameter's step",
        "adamw_numbers",
        "if (thread_id == i) step = step##i;",
        "",
        adamw_with_numbers(8, 8),
        r"data race on buffer 0 \(",
        "adamw/adamw_numbers.metal",
        "",
    ),
    Bug(
        "every thread writes the first parameter's numbers",
        "adamw_numbers",
        "numbers[p.first_number + thread_id] = made;",
        "numbers[p.first_number] = made;",
        adamw_with_numbers(8, 8),
        r"data race on buffer \d+ \(write-after-write",
        "adamw/adamw_numbers.metal",
        "numbers[p.first_number + thread_id] = made;",
    ),
    Bug(
        "one parameter too many has numbers",
        "adamw_numbers",
        "if (thread_id >= p.tensors) return;",
        "if (thread_id > p.tensors) return;",
        adamw_with_numbers(8, 8),
        "out-of-bounds|data race",
        "adamw/adamw_numbers.metal",
        "",
    ),
    Bug(
        "all stretches of a tensor are its first",
        "sum_of_squares",
        "partial[p.first_partial + group] = sum;",
        "partial[p.first_partial] = sum;",
        summed(20000),
        r"data race on buffer 28 \(write-after-write",
        "sum_of_squares/sum_of_squares.metal",
        "partial[p.first_partial + group] = sum;",
    ),
    Bug(
        "a stretch is not held back by the tensor's end",
        "sum_of_squares",
        "uint(min(p.numel[tensor] - begin, long(chunk)))",
        "chunk",
        summed(9001),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "one sum too many is added",
        "sum_of_squares",
        "i < p.count;",
        "i <= p.count;",
        summed(20000),
        "out-of-bounds.*read of 4 bytes",
        "sum_of_squares/sum_of_squares.metal",
        "sum += partial[i];",
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
        "packs for misaligned rows of the gradient",
        "softmax",
        "dy_packs[i].load(grads, column + i * step, p.cols, p.aligned);",
        "dy_packs[i].load(grads, column + i * step, p.cols, true);",
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
    ("the new square for the largest", "adamw_amsgrad", "AMSGRAD && kept", "false", adamw_with_numbers(300, 40)),
    ("the largest is kept for ever", "adamw_amsgrad", "AMSGRAD && kept", "AMSGRAD", adamw_with_numbers(300, 40)),
    ("maxima that are not stored", "adamw_amsgrad",
     "if (AMSGRAD) store_columns<W>(max_exp_avg_sq, at, count, aligned, largest);", "", adamw_with_numbers(300, 40)),
    ("numbers of the first tensor", "adamw_amsgrad", "numbers[p.first_number + tensor]", "numbers[p.first_number]",
     adamw_with_numbers(300, 40)),
    ("a step with an infinite gradient is made", "adamw_amsgrad", "if (numbers.skip != 0.0f) return;", "",
     adamw_with_numbers(300, 40, found_inf=1.0)),
    ("a step with an infinite gradient is counted", "adamw_numbers", "if (!skip) *step = count;", "*step = count;",
     adamw_with_numbers(300, 40, found_inf=1.0)),
    ("a power that forgets its last bit", "adamw_numbers", "left % 2 == 1", "left > 1", adamw_with_numbers(300, 40)),
    ("gradients that stay scaled", "adamw_numbers", "clip * inverse_scale", "clip", adamw_with_numbers(300, 40)),
    ("the norm of scaled gradients", "adamw_numbers", "sqrt(*grad_squares) * inverse_scale", "sqrt(*grad_squares)",
     adamw_with_numbers(300, 40)),
    ("gradients that are not clipped", "adamw_numbers", "p.sign * clip * inverse_scale", "p.sign * inverse_scale",
     adamw_with_numbers(300, 40)),
    ("the host's learning rate", "adamw_numbers", "(p.flags & HAS_LR) != 0", "false", adamw_with_numbers(300, 40)),
    ("the stretches of one tensor only", "sum_of_squares", "if (tensor == i) x = x##i;", "", summed(900, 900, 900)),
    ("sums without squares", "sum_of_squares", "fma(values[j], values[j], sum)", "sum + values[j]", summed(900)),
    ("the first thousand sums only", "sum_of_squares", "i += TOTAL_THREADS) sum +=", "i += p.count) sum +=",
     summed(20000, *[1] * 1100)),
    ("beta1 and its complement swapped", "adamw", "near ? s.lerp : s.lerp - F(1.0f)", "F(1.0f) - s.lerp",
     adamw_step(300, 40)),
    ("no bias correction", "adamw", "sqrt(largest) / s.bias_correction2", "sqrt(largest)", adamw_step(300, 40)),
    ("the old average of the squares", "adamw", "sqrt(largest)", "sqrt(x.exp_avg_sq)", adamw_step(300, 40)),
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
    ("slope of the cube", "swiglu", "millionths<Wide>(134145)", "millionths<Wide>(44715)", gelu_gated("tanh", True)),
    ("the sine's sign", "rope", "!transposed, llama, y", "transposed, llama, y", rotated()),
    ("both halves with the first half's cosine", "rope", "rotate<T, W>(b, a, cos_b,", "rotate<T, W>(b, a, cos_a,",
     rotated()),
    ("dimensions after the tables from the start of the head", "rope",
     "load_columns<W>(from + 2 * p.half_dim,", "load_columns<W>(from,", rotated()),
    ("keys in the place of values", "kv_append", "copy_unit(values, new_values,", "copy_unit(values, new_keys,",
     appended()),
]  # fmt: skip
