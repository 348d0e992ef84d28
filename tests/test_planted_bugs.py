"""Mistakes planted in copies of the ops' kernels: each is caught, and on the right line.

What only the clang lint can see is in test_metal_lint.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from torch_fused.functional import add_rms_norm, apply_rotary_pos_emb, layer_norm, rms_norm, silu_mul, softmax
from torch_fused.metal import MetalError, emulate
from torch_fused.ops.adamw import adamw_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.sampling import filter_logits, greedy, sample
from torch_fused.testing import make, misleading_row, relative_error

SOURCES = Path(__file__).parents[1] / "csrc_mps"


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new`, once, in the flattened source; running then fails with `message` at the line with `at`."""

    name: str
    source: str
    old: str
    new: str
    run: Callable[[], object]
    message: str
    file: str
    at: str


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
    """Of a gradient that is the last `cols` columns of a tensor of `width`."""
    return lambda: torch.ops.torch_fused.layer_norm_backward(
        make(rows, width, seed=1)[:, width - cols :], make(rows, cols), (cols,), make(cols, seed=2), 1e-5, True, True
    )


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


def draws(rows: int = 2, vocabulary: int = 5000, **filters: float) -> torch.Tensor:
    """A draw from each row, with the logits so flat that another place in the order is another token."""
    return sample(make(rows, vocabulary) * 0.1, seed=1, **filters).float()


BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
SECOND_SUM = "  return simd_sum(place.lane < place.simdgroups ? scratch[place.lane] : 0.0f);\n"
SECOND_MAXIMUM = "  value = simd_max(place.lane < place.simdgroups ? scratch[place.lane] : 0u);\n"
RACE = r"data race|uninitialised"
OUTSIDE = r"out-of-bounds|data race|read-only buffer"  # what lies outside may be another buffer

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
        "missing barrier before the scratch is used again",
        "greedy",
        SECOND_MAXIMUM + BARRIER,
        SECOND_MAXIMUM + "\n",
        lambda: greedy(make(1, 2000)),
        r"data race on threadgroup memory \(write-after-read",
        "common/scan.metal.h",
        "if (place.lane == 0) scratch[place.simdgroup] = value;",
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
        "misaligned stride: packs whatever the rows' alignment",
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
        "packs of the gradient whatever its rows' alignment",
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
        "out-of-bounds",
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
        "softmax/softmax.metal",
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
        "a slice is read past the end of the vocabulary",
        "greedy",
        "load_columns<W>(row, column, p.vocabulary,",
        "load_columns<W>(row, column, start + SLICE,",
        lambda: greedy(make(1, 5001)),
        "out-of-bounds.*read of 4 bytes",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "one candidate too many",
        "greedy",
        "i < p.slices; i += threads",
        "i <= p.slices; i += threads",
        lambda: greedy(make(1, 5000)),
        "out-of-bounds.*read of 8 bytes",
        "sampling/greedy.metal",
        "const uint2 other = best[long(row) * p.slices + i];",
    ),
    Bug(
        "the last slice without its end",
        "sampling",
        "index < vocabulary ? float(row[index])",
        "true ? float(row[index])",
        lambda: draws(),
        OUTSIDE,
        "sampling/sampling.metal",
        "logits[j] = index < vocabulary ? float(row[index]) : NAN;",
    ),
    Bug(
        "tokens of another simdgroup that are not waited for",
        "sampling",
        "exchange[j * sorters + thread_id] = tokens[j];\n      }\n    " + BARRIER,
        "exchange[j * sorters + thread_id] = tokens[j];\n      }\n\n",
        lambda: draws(),
        RACE,
        "sampling/sort.metal.h",
        "tokens[j] = kept_of(tokens[j], exchange[from * sorters + other], keeps_larger);",
    ),
    Bug(
        "the next exchange before the last one is read",
        "sampling",
        "exchange[from * sorters + other], keeps_larger);\n        }\n      }\n    " + BARRIER,
        "exchange[from * sorters + other], keeps_larger);\n        }\n      }\n\n",
        lambda: draws(),
        "data race on threadgroup memory",
        "sampling/sort.metal.h",
        "",
    ),
    Bug(
        "divided tokens that are not waited for",
        "sampling",
        "divided[starts[buckets[j]] + slots[j]] = mine[j];\n  }\n" + BARRIER,
        "divided[starts[buckets[j]] + slots[j]] = mine[j];\n  }\n\n",
        lambda: draws(),
        RACE,
        "sampling/sampling.metal",
        "tokens[long(group) * SLICE + i] = divided[i];",
    ),
    Bug(
        "a simdgroup's sum without its last thread",
        "sampling",
        "place.lane == 31",
        "place.lane == 30",
        lambda: draws(),
        r"data race on threadgroup memory \(write-after-write",
        "sampling/sampling.metal",
        "if (mine[j] != 0) divided[starts[buckets[j]] + slots[j]] = mine[j];",
    ),
    Bug(
        "a slice adds to the tallies of a row of its own",
        "sampling",
        "tallies + long(row) * TALLIES * BUCKETS + thread_id",
        "tallies + long(group) * TALLIES * BUCKETS + thread_id",
        lambda: draws(),
        OUTSIDE,
        "sampling/buckets.metal.h",
        "atomic_fetch_add_explicit(&tally[",
    ),
    Bug(
        "the counts of buckets are not cleared",
        "sampling",
        "atomic_store_explicit(&counts[thread_id], 0u, memory_order_relaxed);",
        "",
        lambda: draws(),
        "uninitialised",
        "sampling/buckets.metal.h",
        "return atomic_fetch_add_explicit(&counts[bin], 1u, memory_order_relaxed);",
    ),
    Bug(
        "the count of collected tokens is not reset",
        "sampling",
        "if (thread_id == 0) atomic_store_explicit(space.found, 0u, memory_order_relaxed);",
        "",
        lambda: draws(top_k=50),
        "uninitialised",
        "sampling/ranking.metal.h",
        "slot = atomic_fetch_add_explicit(space.found, all, memory_order_relaxed);",
    ),
    Bug(
        "the next place before the last one is read",
        "sampling",
        "const Reached reached = *space.reached;\n  " + BARRIER,
        "const Reached reached = *space.reached;\n\n",
        lambda: draws(top_p=0.1),
        r"data race on threadgroup memory \(write-after-read",
        "sampling/ranking.metal.h",
        "*space.reached = {range.tokens[k], range.masses[k]};",
    ),
    Bug(
        "a bucket too large to be sorted is not divided",
        "sampling",
        "while (range.until.count - range.before.count > MOST_SORTED) {",
        "while (false) {",
        lambda: sample(misleading_row(5000), top_k=2000, seed=1),
        "out-of-bounds threadgroup",
        "sampling/ranking.metal.h",
        "if (is_found != 0u) space.tokens[slot] = token;",
    ),
    Bug(
        "filtered past the end of the vocabulary",
        "sampling",
        "    if (index >= p.vocabulary) break;\n",
        "\n",
        lambda: filter_logits(make(1, 5000), top_k=50),
        OUTSIDE,
        "sampling/sampling.metal",
        "",
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


def metal_text(source: str) -> str:
    return dict(zip(*torch.ops.torch_fused._metal_sources(), strict=True))[source]


def lines_with(file: str, part: str) -> set[int]:
    lines = (SOURCES / file).read_text().splitlines()
    found = {number for number, line in enumerate(lines, 1) if part.strip() in line}
    assert found, f"{file} has no line with {part!r}"
    return found


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught_at_its_line(bug):
    """The planted bug raises the expected error, naming the file and line at fault."""
    text = metal_text(bug.source)
    assert bug.old in text
    mutated = text.replace(bug.old, bug.new, 1)
    with pytest.raises((RuntimeError, MetalError), match=bug.message) as error, emulate(sources={bug.source: mutated}):
        bug.run()
    place = re.search(rf"{re.escape(Path(bug.file).name)}:(\d+)", str(error.value))
    assert place, str(error.value)
    assert int(place[1]) in lines_with(bug.file, bug.at), str(error.value)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_kernel_without_the_bug_is_clean(bug):
    """The same call on the real kernel raises nothing: what was caught is the bug."""
    with emulate():
        bug.run()


# ---- what only the numbers show -------------------------------------------------------------------------------------


# (name, source, old, new, run): every access is right in every schedule, so only the results tell.
ONLY_NUMBERS = [
    ("the row's tail counts as zeros", "layer_norm", "if (uint(j) < values) add_one(x[j]);", "add_one(x[j]);",
     layer_norm_forward(cols=13)),
    ("variance about the shift", "layer_norm", "fma(-sum, rest, simd_sum(squares))", "simd_sum(squares)",
     layer_norm_forward(cols=9000)),
    ("the mean is the shift", "layer_norm", "{mean, rest - (mean - shift),", "{shift, 0.0f,",
     layer_norm_forward(cols=9000)),
    ("the simdgroups' shifts taken for one", "layer_norm", "= seen.x - shift;", "= 0.0f;", layer_norm_forward()),
    ("slope about the shift", "layer_norm_backward", "sums.y - (m.mean - all.seen[place.lane].x + m.rest) * sums.x",
     "sums.y", layer_norm_backward(cols=9000, width=9000)),
    ("mean gradient left in", "layer_norm_backward", "dy[j] * w[j] - slopes.mean_g", "dy[j] * w[j]",
     layer_norm_backward()),
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
    ("exp of the gate, not of its negative", "swiglu", "(1.0f + exp(-g[j]))", "(1.0f + exp(g[j]))", gated()),
    ("slope of the sigmoid", "swiglu", "1.0f + g[j] * (1.0f - sigmoid)", "1.0f + g[j] * sigmoid", gated(backward=True)),
    ("the sine's sign", "rope", "!transposed, llama, y", "transposed, llama, y", rotated()),
    ("both halves with the first half's cosine", "rope", "rotate<T, W>(b, a, cos_b,", "rotate<T, W>(b, a, cos_a,",
     rotated()),
    ("dimensions behind the tables from the start of the head", "rope",
     "load_columns<W>(from + 2 * p.half_dim,", "load_columns<W>(from,", rotated()),
    ("ties at the k-th value dropped", "sampling", "ulong(token_key(reached.token)) << INDEX_BITS;", "reached.token;",
     lambda: filter_logits(make(2, 5000).round(), top_k=5).exp()),
    ("every slice's weight counts", "sampling", "kept.total = reached.mass;", ";", lambda: draws(top_p=0.2)),
    ("the middle of a bucket's weight", "sampling", "low + (middle << 20) + (high << 40)", "low + (high << 40)",
     lambda: draws(top_p=0.9)),
    ("the part of a bucket begins with the bucket", "sampling", "range.first -= part * width;", ";",
     lambda: filter_logits(misleading_row(5000), top_k=2000).exp()),
    ("the weight of what min_p drops", "sampling", "heavy_mass += weight >= filter.min_weight ? weight : 0;",
     "heavy_mass += weight;", lambda: draws(min_p=0.9)),
    ("keys in the place of values", "kv_append", "copy_unit(values, new_values,", "copy_unit(values, new_keys,",
     appended()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "old", "new", "run"),
    [bug[1:] for bug in ONLY_NUMBERS],
    ids=[f"{source}: {name}" for name, source, *_ in ONLY_NUMBERS],
)
def test_bug_shows_in_the_numbers_only(source, old, new, run):
    """No check fires; the results are off by far more than rounding, so the op's tests against float64 would fail."""
    text = metal_text(source)
    assert old in text
    with emulate():
        expected = tensors(run())
    with emulate(sources={source: text.replace(old, new, 1)}):
        actual = tensors(run())
    assert not all(relative_error(a, e) < 1e-5 for a, e in zip(actual, expected, strict=True))


def tensors(result: object) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
