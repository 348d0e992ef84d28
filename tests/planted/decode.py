"""Bugs in the kernels of the decode step."""

from collections.abc import Callable

import torch
from decode_step import Shape, Step
from decode_step import adapters as adapters_of
from test_decode_packed import packed_step

from .bug import BARRIER, RACE, Bug


def step(
    head_dim: int = 64, intermediate: int = 504, family: str = "qwen3", adapters: bool = False, **options
) -> Callable[[], list[torch.Tensor]]:
    """Two new tokens of two sequences after a context of two chunks, with the kernels for whole packs."""
    shape = Shape(family, 1, 128, 8, 2, head_dim, head_dim, intermediate, vocabulary=101, experts=6)

    def run() -> list[torch.Tensor]:
        call = Step(shape, **{"batch": 2, "steps": 2, "length": 300, **options})
        if adapters:
            call.model["adapters"] = adapters_of(call, 4)
        return [call.run(), *call.args["keys"], *call.args["values"]]

    return run


def packed(bits: int = 4, **options) -> Callable[[], list[torch.Tensor]]:
    """A step of a model with all matrices packed."""

    def run() -> list[torch.Tensor]:
        call = packed_step(bits, length=100, **options)
        return [call.run(), *call.args["keys"], *call.args["values"]]

    return run


ATTENTION, ATTENDED, PRODUCT, TILES, EMBED, VECTORS = (
    f"decode/{name}"
    for name in (
        "decode_attention.metal",
        "attended.metal.h",
        "multiply.metal.h",
        "tiles.metal.h",
        "decode_product.metal",
        "vectors.metal.h",
    )
)

SEVERAL_PACKED = packed(group_size=64, batch=3, dtype=torch.bfloat16)

BUGS = [
    Bug(
        "missing barrier after the queries and the new keys are placed",
        "decode_attention",
        "    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);\n",
        "\n",
        step(),
        RACE,
        ATTENTION,
        "",
    ),
    Bug(
        "the new keys are not there for other simdgroups",
        "decode_attention",
        "mem_flags::mem_threadgroup | mem_flags::mem_device",
        "mem_flags::mem_threadgroup",
        step(),
        "data race on buffer [12]",
        VECTORS,
        "from[i]",
    ),
    Bug(
        "missing barrier before the simdgroups' parts are merged",
        "decode_attention",
        BARRIER.replace("  ", "    ", 1) + "    for (uint i = thread_id",
        "\n    for (uint i = thread_id",
        step(),
        RACE,
        ATTENTION,
        "merged_stats[room",
    ),
    Bug(
        "a chunk's last keys are not held back by its end",
        "decode_attention",
        "min(first + u * KEYS + lane_group, end - 1)",
        "first + u * KEYS + lane_group + 700",
        step(),
        "out-of-bounds",
        VECTORS,
        "from[i]",
    ),
    Bug(
        "a new value is appended too late",
        "decode_attention",
        "head_values + ulong(p.length + step) * p.values_slot",
        "head_values + ulong(p.length + step + 700) * p.values_slot",
        step(batch=1),
        "out-of-bounds",
        ATTENTION,
        "to[d] = T(value[d])",
    ),
    Bug(
        "all chunks write one result",
        "decode_attention",
        "query % group_heads) * p.chunks + chunk;",
        "query % group_heads) * p.chunks;",
        step(),
        "data race on buffer",
        ATTENTION,
        "[place",
    ),
    Bug(
        "slots are read before they are written",
        "decode_attention",
        "first_slot + KEYS * U <= p.length;",
        "true;",
        step(),
        RACE,
        ATTENTION,
        "to[d] = T(x)",
    ),
    Bug(
        "missing barrier before the parts of a row are added up",
        "decode_product",
        BARRIER.replace("  ", "    ", 1) + "    for (uint s = 1;",
        "\n    for (uint s = 1;",
        step(intermediate=2008),
        RACE,
        PRODUCT,
        "shared.sums[(simdgroup + s)",
    ),
    Bug(
        "missing barrier before the parts of a tile are added up",
        "decode_tiles",
        BARRIER.replace("  ", "    ", 1) + "    if (split > 0) return;",
        "\n    if (split > 0) return;",
        step(dtype=torch.bfloat16),
        RACE,
        TILES,
        "shared.sums[own + 32 * s]",
    ),
    Bug(
        "rows of a tile past the last one are written",
        "decode_tiles",
        "&& row <= last;",
        ";",
        step(dtype=torch.bfloat16, intermediate=508),
        "out-of-bounds|data race",
        TILES,
        "*places[i]",
    ),
    Bug(
        "columns past the last one are read",
        "decode_product",
        "column >= cols ? uint4(0u) : ",
        "",
        step(),
        "out-of-bounds",
        VECTORS,
        "read_once(from + i) : from[i]",
    ),
    Bug(
        "all vectors write one result",
        "decode_product",
        "results + ulong(vector) * p.result_stride + row",
        "results + row",
        step(),
        "data race on buffer 8",
        PRODUCT,
        "*result",
    ),
    Bug(
        "missing barrier before the vectors are multiplied",
        "decode_attended",
        BARRIER.replace("  ", "    ", 1) + "#pragma unroll\n    for (int c",
        "\n#pragma unroll\n    for (int c",
        step(),
        RACE,
        ATTENDED,
        "combined.columns[",
    ),
    Bug(
        "missing barrier before the next columns take the place",
        "decode_attended",
        "    threadgroup_barrier(mem_flags::mem_threadgroup);  // the columns before are done with\n",
        "\n",
        step(head_dim=128),
        RACE,
        ATTENDED,
        "combined.columns[",
    ),
    Bug(
        "a chunk is taken from another head",
        "decode_attended",
        "from + c * p.head_dim, 0",
        "from + c * p.cols, 0",
        step(),
        "out-of-bounds",
        VECTORS,
        "from[i]",
    ),
    Bug(
        "missing barrier before the squares of simdgroups are added up",
        "decode_product",
        "squares[simdgroup] = sum;\n" + BARRIER,
        "squares[simdgroup] = sum;\n\n",
        step(family="olmo2"),
        RACE,
        EMBED,
        "squares[",
    ),
    Bug(
        "one element more than the embedding has",
        "decode_product",
        "i < p.hidden; i += threads",
        "i <= p.hidden; i += threads",
        step(),
        "out-of-bounds|data race",
        EMBED,
        "states[ulong(token)",
    ),
]

ONLY_NUMBERS = [
    ("positions turn the other way", "decode_attention", "? -other : other", "? other : -other", step()),
    ("the sum forgets its old maximum", "decode_attention", "sum = fma(sum, keep, weight);", "sum += weight;",
     step(length=700)),
    ("a team's members count alike", "decode_attention", "part.y * weight)", "part.y)", step()),
    ("a weight is another slot's", "decode_attention", "ushort(key_group * LANES + u)", "ushort(u)", step()),
    ("the window has a slot too many", "decode_attention", "slot < low", "slot + 1 < low", step(windows=[20])),
    ("a token sees those after it", "decode_attention", "min(end, p.length + step + 1)", "end", step()),
    ("padding is attended", "decode_attention", "p.flags & kStarts ?", "false ?", step(starts=[0, 200])),
    ("no norm of the keys", "decode_attention", "(key, p.flags & kKeyNorm,", "(key, false,", step()),
    ("the residual is left out", "decode_product", "fma(value, p.scale, residual)", "value", step()),
    ("the norm takes the weights for the values", "decode_product", "squares[c] = fma(x[j], x[j], squares[c]);",
     "squares[c] = fma(weight[j], weight[j], squares[c]);", step(batch=1, steps=1)),
    ("the norm of several vectors sums no squares", "decode_product", "sum = fma(x.get(j), x.get(j), sum);",
     "sum += x.get(j);", step()),
    ("codes come in the wrong order", "decode_packed4", "at = j * BITS % 32,", "at = (32 - BITS) - j * BITS % 32,",
     packed()),
    ("the biases of groups are left out", "decode_packed8", "return fma(step, fraction(j, kOne), float(bias) - step);",
     "return fma(step, fraction(j, kOne), -step);", packed(bits=8)),
    ("a tile has half of the runs twice", "decode_tiles", "at.vector_halves[i] = row % 2", "at.vector_halves[i] = 0",
     step(dtype=torch.bfloat16)),
    ("a tile's second row is the first", "decode_tiles", "first + 8 * i, last)", "first, last)",
     step(dtype=torch.bfloat16)),
    ("one chain of a tile's sums is lost", "decode_tiles", "sums[i % 4] += parts[i / 4][i % 4];",
     "sums[i % 4] = parts[i / 4][i % 4];",
     step(dtype=torch.bfloat16)),
    ("the parts of a tile's row are not added up", "decode_tiles", "s < p.splits; s++", "s < 1; s++",
     step(dtype=torch.bfloat16)),
    ("squares of a tile's vectors are swapped", "decode_tiles", "squares[v] / float(p.cols)",
     "squares[1 - v] / float(p.cols)", step(dtype=torch.bfloat16)),
    ("a tile's up is not gated", "decode_tiles", "p.activation) * (sums[2 + v] * scale)", "p.activation)",
     step(dtype=torch.bfloat16)),
    ("the other row's scale in a packed tile", "decode_packed_tiles", "value_of<T>(tile.scales[k / 2])",
     "value_of<T>(tile.scales[1 - k / 2])", SEVERAL_PACKED),
    ("a packed tile's products are added twice", "decode_packed_tiles", "parts0[k] = parts1[k] = 0.0f;", ";",
     SEVERAL_PACKED),
    ("codes of a packed tile are not counted from zero", "decode_packed_tiles",
     "fma(bias - scale, of_x[k % 2], sums[k])", "fma(bias, of_x[k % 2], sums[k])", SEVERAL_PACKED),
    ("the values of a lane's own runs only", "decode_packed_tiles", "sum_of_runs(of_x, lane);", ";", SEVERAL_PACKED),
    ("the first group of a packed row for all", "decode_packed_tiles", "rows.groups().before(column);", "0;",
     SEVERAL_PACKED),
    ("chunks count alike", "decode_attended", "const float weight = exp2(stat[c].x - largest);",
     "const float weight = 1.0f;", step()),
    ("up is not gated", "decode_product", "p.activation) * (up * scale)", "p.activation)", step()),
    ("scores are not capped", "decode_attention", "if (p.softcap > 0.0f)", "if (false)", step(family="gemma")),
    ("the norm's weights are not shifted", "decode_product", "weight[j] += p.norm_offset;", ";", step(family="gemma")),
    ("the norm of a head is not shifted", "decode_attention", "(norm[i] + p.norm_offset)", "norm[i]",
     step(family="gemma")),
    ("what is added is not scaled", "decode_attended", "fma(sum + shift, p.scale, residual)", "sum + shift + residual",
     step(family="granite")),
    ("experts count alike", "decode_experts", "fma(weights[choice], ", "fma(1.0f, ", step(family="qwen3_moe")),
    ("an expert is chosen twice", "decode_experts", "if (lane + 32 * i == where) mine[i] = -1.0f;", ";",
     step(family="qwen3_moe")),
    ("the shared expert is not gated", "decode_experts", "if (p.flags & kSharedGate)", "if (false)",
     step(family="qwen2_moe")),
    ("an adapter's gate is not activated", "decode_product", "activate(gates[i], p.activation) * ups[i]",
     "gates[i] * ups[i]", step(adapters=True)),
    ("an output's norm replaces the states", "decode_product", "p.flags & kAdd ? y[i] + normed : normed", "normed",
     step(family="olmo2")),
]  # fmt: skip
