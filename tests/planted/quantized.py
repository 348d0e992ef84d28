"""Bugs in the kernels of packed matrices."""

from collections.abc import Callable

import torch

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


def tiled(group_size: int = 64, columns: int = 192, rows: int = 8200) -> Callable[[], object]:
    """Rows that two simdgroups share, and columns that end with half a tile."""
    packed = quantize(make(rows, columns, dtype=torch.bfloat16), bits=4, group_size=group_size)
    x, bias = make(columns, dtype=torch.bfloat16, seed=1), make(rows, dtype=torch.bfloat16, seed=2)
    return lambda: quantized_linear(x, *packed, bias, bits=4, group_size=group_size)


TILES, VECTORS = "quantized/packed_tiles.metal", "decode/vectors.metal.h"
PARTS = "        parts[simdgroup * 32 + lane] = float2(values[0], values[1]);\n"

BUGS = [
    Bug(
        "missing barrier after a vector is staged",
        "packed_tiles",
        BARRIER.replace("  ", "    ", 1) + "    const uint end",
        "\n    const uint end",
        tiled(),
        RACE,
        "quantized/packed_tile.metal.h",
        "",
    ),
    Bug(
        "missing barrier before the vector's next part is staged",
        "packed_tiles",
        "if (stage > 0) threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
        tiled(32, 2080),
        RACE,
        TILES,
        "shared.sums[word / SUMMED] = sum;",
    ),
    Bug(
        "missing barrier before the parts of a tile's rows are added up",
        "packed_tiles",
        PARTS + BARRIER.replace("  ", 8 * " ", 1),
        PARTS,
        tiled(),
        RACE,
        TILES,
        "parts[",
    ),
    Bug(
        "the parts of a tile's rows take the place of a vector that is in use",
        "packed_tiles",
        BARRIER.replace("  ", 8 * " ", 1) + PARTS,
        "\n" + PARTS,
        tiled(),
        RACE,
        TILES,
        "parts[",
    ),
    Bug(
        "a tile's words past the end",
        "packed_tiles",
        "min(first + span.words, span.last_word)",
        "first + span.words",
        tiled(rows=8208),
        OUTSIDE,
        VECTORS,
        "return *from",
    ),
    Bug(
        "a tile's groups past the end",
        "packed_tiles",
        "min((first + span.half_words) >> span.group_shift, span.last_group)",
        "(first + span.half_words) >> span.group_shift",
        tiled(rows=8208),
        OUTSIDE,
        TILES,
        "",
    ),
    Bug(
        "a tile's rows that are not there are written",
        "packed_tiles",
        "if (row > last) continue;",
        "",
        tiled(),
        OUTSIDE,
        TILES,
        "",
    ),
    Bug(
        "every lane of a row writes",
        "packed_tiles",
        "if (split == 0 && lanes.result == 0) {",
        "if (split == 0) {",
        tiled(),
        "data race on buffer 14",
        TILES,
        "*place = ",
    ),
    Bug(
        "codes read past the end of the row",
        "quantized",
        "column < p.cols, groups, packs[r][u]);",
        "true, groups, packs[r][u]);",
        multiplied(),
        OUTSIDE,
        VECTORS,
        "return *from",
    ),
    Bug(
        "the last rows are not held back",
        "quantized",
        "min(first + r, p.rows - 1)",
        "first + r",
        multiplied(rows=6),
        OUTSIDE,
        VECTORS,
        "return *from",
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
        VECTORS,
        ": from[i];",
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
    ("a tile's halves in the same group", "packed_tiles", "lanes.result / 4 * TILE / 2", "0", tiled()),
    ("the values of a tile's first half for both", "packed_tiles", "* 2 + lanes.result / 4];", "* 2];", tiled()),
    ("values of one word for half a tile", "packed_tiles", "distance < SUMMED;", "distance < 1;", tiled()),
    ("words staged in the order of memory", "packed_tiles", "staged_place<WORDS>(word), x", "word, x", tiled()),
    ("a tile's vector in one half only", "packed_tiles", "== pair / 2 * 4 ?", "== 0 ?", tiled()),
    ("columns of a row that are not added", "packed_tiles", "simd_shuffle_xor(rows[i], ushort(8))", "0.0f", tiled()),
    (
        "a tile's second row without its bias",
        "packed_tiles",
        "p.flags & (kBias << of)",
        "i == 0 && p.flags & kBias",
        tiled(),
    ),
    (
        "the first part of a tile's rows only",
        "packed_tiles",
        "s < splits; s++)",
        "s < 1; s++)",
        tiled(),
    ),
    (
        "the second round has the first one's rows",
        "packed_tiles",
        "source.first += GATED ? 8 : 16;",
        ";",
        tiled(rows=42253),
    ),
    ("unpacked without the bias", "quantized", "+ pack.bias;", "+ 0.0f;", unpacked()),
]
