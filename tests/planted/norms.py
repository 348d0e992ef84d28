"""Bugs in the kernels of the norms and their gradients."""

from collections.abc import Callable

import torch

from torch_fused.functional import add_rms_norm, layer_norm, rms_norm
from torch_fused.testing import make

from .bug import BARRIER, RACE, Bug

SECOND_SUM = "  return simd_sum(place.lane < place.simdgroups ? scratch[place.lane] : 0.0f);\n"


def forward(rows: int = 3, cols: int = 896) -> Callable[[], object]:
    return lambda: rms_norm(make(rows, cols), (cols,), make(cols, seed=1))


def on_view(cols: int, width: int) -> Callable[[], object]:
    return lambda: rms_norm(make(3, width)[:, :cols], (cols,), make(cols, seed=1))


def backward(rows: int = 4, cols: int = 896) -> object:
    x, grad, weight = make(rows, cols), make(rows, cols, seed=1), make(cols, seed=2)
    return torch.ops.torch_fused.rms_norm_backward(grad, None, x, (cols,), weight, 1e-6, "torch", 0.0, True)


def layer_norm_forward(rows: int = 3, cols: int = 896) -> Callable[[], torch.Tensor]:
    return lambda: layer_norm(make(rows, cols), (cols,), make(cols, seed=1), make(cols, seed=2))


def layer_norm_backward(rows: int = 4, cols: int = 896, width: int = 896) -> Callable[[], tuple[torch.Tensor, ...]]:
    """For a gradient that is the last `cols` columns of a tensor of `width`."""
    return lambda: torch.ops.torch_fused.layer_norm_backward(
        make(rows, width, seed=1)[:, width - cols :], make(rows, cols), (cols,), make(cols, seed=2), 1e-5, True, True
    )


BUGS = [
    Bug(
        "missing barrier before the scratch is read",
        "rms_norm",
        BARRIER + SECOND_SUM,
        "\n" + SECOND_SUM,
        forward(),
        RACE,
        "common/reduce.metal.h",
        "return simd_sum(place.lane < place.simdgroups",
    ),
    Bug(
        "the next row's sums in the same place",
        "rms_norm_backward",
        "scratch[turn]",
        "scratch[0]",
        lambda: backward(rows=600, cols=256),
        r"data race on threadgroup memory \(write-after-read",
        "common/reduce.metal.h",
        "if (place.lane == 0) scratch[32 * i + place.simdgroup] = values[i];",
    ),
    Bug(
        "barrier of the wrong memory",
        "rms_norm",
        BARRIER + SECOND_SUM,
        BARRIER.replace("mem_threadgroup", "mem_device") + SECOND_SUM,
        forward(),
        RACE,
        "common/reduce.metal.h",
        "return simd_sum(place.lane < place.simdgroups",
    ),
    Bug(
        "row tail: one element too many is read",
        "rms_norm",
        "column + j < cols ? row[column + j]",
        "column + j <= cols ? row[column + j]",
        forward(cols=13),
        "out-of-bounds.*read",
        "common/pack.metal.h",
        "column + j < cols ? row[column + j]",
    ),
    Bug(
        "row tail: one element too many is written",
        "rms_norm",
        "if (column + j < cols) row[column + j] = T(values[j]);",
        "if (column + j <= cols) row[column + j] = T(values[j]);",
        forward(cols=13),
        "data race|out-of-bounds.*write",
        "common/pack.metal.h",
        "if (column + j < cols) row[column + j] = T(values[j]);",
    ),
    Bug(
        "vector tail: a pack past the end of the row",
        "rms_norm",
        "if (aligned && column + W <= cols) {\n      device const uint4* from",
        "if (aligned) {\n      device const uint4* from",
        forward(rows=1, cols=900),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "view tail: inside the storage, past the end of the view",
        "rms_norm",
        "column + j < cols ? row[column + j]",
        "column + j <= cols ? row[column + j]",
        on_view(13, 15),
        "out-of-bounds.*read of 4 bytes",
        "common/pack.metal.h",
        "column + j < cols ? row[column + j]",
    ),
    Bug(
        "misaligned stride: packs for misaligned rows",
        "rms_norm",
        "packs[0].load(input, column, cols, flags & ALIGNED);",
        "packs[0].load(input, column, cols, true);",
        on_view(64, 65),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "early return before a barrier",
        "rms_norm",
        "  const uint first = thread_id * W;\n",
        "  const uint first = thread_id * W; if (first >= p.cols / 2) return;\n",
        forward(),
        "threadgroup_barrier|divergent",
        "common/reduce.metal.h",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Bug(
        "overlapping rows: the output's stride is short",
        "rms_norm",
        "output + long(row) * p.cols,",
        "output + long(row) * (p.cols - 4),",
        forward(),
        r"data race on buffer 3 \(write-after-write",
        "common/pack.metal.h",
        "to[i] = uint4(",
    ),
    Bug(
        "uninitialised scratch: one simdgroup forgets its sum",
        "rms_norm",
        "if (place.lane == 0) scratch[place.simdgroup] = value;",
        "if (place.lane == 0 && place.simdgroup != 1) scratch[place.simdgroup] = value;",
        forward(),
        "read of uninitialised threadgroup memory",
        "common/reduce.metal.h",
        "return simd_sum(place.lane < place.simdgroups",
    ),
    Bug(
        "scratch for fewer simdgroups than there are",
        "rms_norm",
        "threadgroup float scratch[32];",
        "threadgroup float scratch[4];",
        forward(),
        "out-of-bounds threadgroup",
        "common/reduce.metal.h",
        "if (place.lane == 0) scratch[place.simdgroup] = value;",
    ),
    Bug(
        "simdgroup function that not all lanes reach",
        "rms_norm",
        "  value = simd_sum(value);\n",
        "  if (place.lane != 3) value = simd_sum(value);\n",
        forward(),
        "simdgroup",
        "common/reduce.metal.h",
        "  value = simd_sum(value);",
    ),
    Bug(
        "the sum is read back from the wrong row",
        "rms_norm",
        "sum + long(row) * p.cols,",
        "sum + (long(row) ^ 1) * p.cols,",
        lambda: add_rms_norm(make(3, 40000), make(3, 40000, seed=1), make(40000, seed=2)),
        "data race|out-of-bounds",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "partial sums of the weight's gradient share a row",
        "rms_norm_backward",
        "long(group) * p.cols : 0);\n  float dw",
        "0 : 0);\n  float dw",
        backward,
        r"data race on buffer 5 \(write-after-write",
        "common/pack.metal.h",
        "if (column + j < cols) row[column + j] = T(values[j]);",
    ),
    Bug(
        "rows do not take turns",
        "layer_norm_backward",
        "turn ^= 1;",
        "",
        layer_norm_backward(rows=600, cols=256, width=256),
        r"data race on threadgroup memory \(write-after-read",
        "layer_norm/layer_norm_backward.metal",
        "all.seen[simdgroup] = seen.packed();",
    ),
    Bug(
        "early return of the threads past the end of the row",
        "layer_norm",
        "  const uint step = threads * W;\n",
        "  const uint step = threads * W; if (first >= p.cols) return;\n",
        layer_norm_forward(cols=100),
        "threadgroup_barrier reached by 25 of the 32 threads",
        "layer_norm/layer_norm.metal.h",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ),
    Bug(
        "the bias is read from the row's place",
        "layer_norm",
        "weight, bias, output + long(row) * p.cols,",
        "weight, bias + long(row) * p.cols, output + long(row) * p.cols,",
        layer_norm_forward(),
        "out-of-bounds.*read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "packs for misaligned rows of the gradient",
        "layer_norm_backward",
        "packs[0].load(grad, column, cols, flags & ALIGNED);",
        "packs[0].load(grad, column, cols, true);",
        layer_norm_backward(cols=64, width=65),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "partial sums without room for the bias",
        "layer_norm_backward",
        " * (uint(grad_weight) + uint(grad_bias));",
        ";",
        layer_norm_backward(),
        r"data race on buffer 4 \(write-after-write",
        "common/pack.metal.h",
        "if (column + j < cols) row[column + j] = T(values[j]);",
    ),
    Bug(
        "column sums of one row too many",
        "column_sum",
        "row < p.rows;",
        "row <= p.rows;",
        layer_norm_backward(),
        "out-of-bounds.*read of 4 bytes",
        "common/column_sum.metal",
        "sum += partial[long(row) * p.cols + column];",
    ),
    Bug(
        "missing barrier before the simdgroups' column sums are added",
        "column_sum",
        BARRIER,
        "\n",
        layer_norm_backward(),
        RACE,
        "common/column_sum.metal",
        "sum = simd_sum(lane < simdgroups ? scratch[lane][simdgroup] : 0.0f);",
    ),
    Bug(
        "double",
        "rms_norm",
        "  float squares = 0.0f;",
        "  double squares = 0.0f;",
        forward(),
        "double",
        "rms_norm/rms_norm.metal",
        "  float squares = 0.0f;",
    ),
    Bug(
        "non-ASCII",
        "rms_norm",
        "// One threadgroup a row.",
        "// One threadgroup \N{RIGHTWARDS ARROW} a row.",
        forward(),
        "non-ASCII",
        "rms_norm/rms_norm.metal",
        "// One threadgroup a row.",
    ),
    Bug(
        "float atomics",
        "rms_norm",
        "  threadgroup float scratch[32];",
        "  threadgroup float scratch[32]; threadgroup atomic_float total;",
        forward(),
        "atomic",
        "rms_norm/rms_norm.metal",
        "  threadgroup float scratch[32];",
    ),
]

ONLY_NUMBERS = [
    ("the row's tail counts as zeros", "layer_norm", "if (uint(j) < values) add_one(x[j]);", "add_one(x[j]);",
     layer_norm_forward(cols=13)),
    ("variance about the shift", "layer_norm", "fma(-sum, rest, simd_sum(squares))", "simd_sum(squares)",
     layer_norm_forward(cols=9000)),
    ("the mean is the shift", "layer_norm", "mean, rest - (mean - shift), rstd", "shift, 0.0f, rstd",
     layer_norm_forward(cols=9000)),
    ("the simdgroups' shifts taken for one", "layer_norm", "= seen.x - shift;", "= 0.0f;", layer_norm_forward()),
    ("slope about the shift", "layer_norm_backward", "sums.y - (m.mean - all.seen[place.lane].x + m.rest) * sums.x",
     "sums.y", layer_norm_backward(cols=9000, width=9000)),
    ("mean gradient left in", "layer_norm_backward", "dy[j] * w[j] - slopes.mean_g", "dy[j] * w[j]",
     layer_norm_backward()),
]  # fmt: skip
