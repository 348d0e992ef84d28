"""Bugs in the kernels of packed matrices."""

from collections.abc import Callable

from torch_fused.functional import dequantize, quantize, quantized_linear
from torch_fused.testing import make

from .bug import BARRIER, OUTSIDE, RACE, Bug


def multiplied(
    vectors: int = 1, rows: int = 8, columns: int = 1056, bits: int = 4, start: int = 0
) -> Callable[[], object]:
    """Groups of 32: rows that two simdgroups share, with a last block of one or two lanes."""
    packed = quantize(make(rows, columns), bits=bits, group_size=32)
    x = make(vectors, columns + start, seed=1)[:, start:]
    return lambda: quantized_linear(x, *packed, bits=bits, group_size=32)


def unpacked(columns: int = 96) -> Callable[[], object]:
    packed = quantize(make(3, columns), bits=4, group_size=32)
    return lambda: dequantize(*packed, bits=4, group_size=32)


BUGS = [
    Bug(
        "codes read past the end of the row",
        "quantized",
        "column < p.cols, groups, packs[r][u]);",
        "true, groups, packs[r][u]);",
        multiplied(),
        OUTSIDE,
        "quantized/packed.metal.h",
        "",
    ),
    Bug(
        "the last rows are not held back",
        "quantized",
        "min(first + r, p.rows - 1)",
        "first + r",
        multiplied(rows=6),
        OUTSIDE,
        "quantized/packed.metal.h",
        "",
    ),
    Bug(
        "results of rows that are not there",
        "quantized",
        "lane >= uint(R * C) || row >= p.rows || vector",
        "lane >= uint(R * C) || vector",
        multiplied(rows=6),
        OUTSIDE,
        "quantized/quantized.metal",
        "output[ulong(vector) * p.rows + row]",
    ),
    Bug(
        "missing barrier before the simdgroups' sums are combined",
        "quantized",
        BARRIER.replace("  ", "    ", 1),
        "\n",
        multiplied(),
        RACE,
        "quantized/quantized.metal",
        "sum += scratch[(simdgroup + s) * 32 + lane];",
    ),
    Bug(
        "every simdgroup writes",
        "quantized",
        "if (split > 0 || lane",
        "if (lane",
        multiplied(),
        "data race on buffer 5",
        "quantized/quantized.metal",
        "output[ulong(vector) * p.rows + row]",
    ),
    Bug(
        "vectors that are not there",
        "quantized",
        "x + long(min(first_vector + c, p.vectors - 1)) * p.x_stride",
        "x + long(first_vector + c) * p.x_stride",
        multiplied(vectors=3),
        OUTSIDE,
        "decode/vectors.metal.h",
        "",
    ),
    Bug(
        "packs for misaligned vectors",
        "quantized",
        "load_pack<T, WHOLE>(x",
        "load_pack<T, true>(x",
        multiplied(start=1),
        "misaligned read of 16 bytes",
        "decode/vectors.metal.h",
        "const uint4 raw = column < cols ? from[i] : uint4(0u);",
    ),
    Bug(
        "every threadgroup unpacks the first row",
        "quantized",
        "const uint row = group / p.groups;",
        "const uint row = 0;",
        unpacked(),
        "data race on buffer 3",
        "common/pack.metal.h",
        "",
    ),
]

# (name, source, old, new, run)
ONLY_NUMBERS = [
    (
        "the group before",
        "quantized",
        "return (column >> shift) * size();",
        "return 0;",
        multiplied(),
    ),
    ("codes from the wrong bits", "quantized", "at = j * BITS % 32,", "at = 0,", multiplied()),
    ("the bias as it is", "quantized", "float(bias) * sums.all)", "float(bias))", multiplied()),
    ("one vector's sum for all", "quantized", "first_vector + c, p.vectors", "first_vector, p.vectors", multiplied(3)),
    ("the first share only", "quantized", "s < p.splits && split == 0", "s < 1 && split == 0", multiplied()),
    ("unpacked without the bias", "quantized", "+ pack.bias;", "+ 0.0f;", unpacked()),
]
