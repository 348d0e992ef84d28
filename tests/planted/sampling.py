"""Bugs in the sampling kernels."""

import torch

from torch_fused.sampling import filter_logits, greedy, sample
from torch_fused.testing import make, misleading_row

from .bug import BARRIER, OUTSIDE, RACE, Bug

SECOND_MAXIMUM = "  value = simd_max(place.lane < place.simdgroups ? scratch[place.lane] : 0u);\n"


def draws(rows: int = 2, vocabulary: int = 5000, **filters: float) -> torch.Tensor:
    """A draw from each row, with logits so flat that another position in the order is another token."""
    return sample(make(rows, vocabulary) * 0.1, seed=1, **filters).float()


BUGS = [
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
]

ONLY_NUMBERS = [
    ("ties at the k-th value dropped", "sampling", "ulong(token_key(reached.token)) << INDEX_BITS;", "reached.token;",
     lambda: filter_logits(make(2, 5000).round(), top_k=5).exp()),
    ("every slice's weight counts", "sampling", "kept.total = reached.mass - (out ? weight : 0);", ";",
     lambda: draws(top_p=0.2)),
    ("a top_p that is reached exactly keeps one more", "sampling", "reached.token + (out ? 1 : 0)", "reached.token",
     lambda: filter_logits(torch.tensor([0.3, 0.1, 0.1, 0.5]).log(), top_p=0.8).exp()),
    ("logits that are not divided", "sampling", "float(logit) / filter.divisor", "float(logit)",
     lambda: filter_logits(make(2, 300), temperature=0.5).exp()),
    ("the middle of a bucket's weight", "sampling", "low + (middle << 20) + (high << 40)", "low + (high << 40)",
     lambda: draws(top_p=0.9)),
    ("the part of a bucket begins with the bucket", "sampling", "range.first -= part * width;", ";",
     lambda: filter_logits(misleading_row(5000), top_k=2000).exp()),
    ("the weight of what min_p drops", "sampling", "heavy_mass += weight >= filter.min_weight ? weight : 0;",
     "heavy_mass += weight;", lambda: draws(min_p=0.9)),
]  # fmt: skip
