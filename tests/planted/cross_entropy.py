"""Bugs in the cross entropy kernel."""

from collections.abc import Callable

import torch

from torch_fused.ops.cross_entropy import cross_entropy_
from torch_fused.testing import make

from .bug import Bug


def losses(classes: int = 300, start: int = 0, per_row: bool = False) -> Callable[[], object]:
    """The losses of three rows, one of them ignored; rows of logits are views with offset `start`."""

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = make(3, classes + start, scale=3.0)[:, start:]
        scale = torch.tensor([0.5, 1.0, 2.0]) if per_row else torch.tensor(0.5)
        target = torch.tensor([5, -100, classes - 1])
        return cross_entropy_(logits, target, scale, label_smoothing=0.1, z_loss=0.01), logits

    return run


BUGS = [
    Bug(
        "every threadgroup takes the first row",
        "cross_entropy",
        "logits + long(row) * p.stride",
        "logits + long(0 * row) * p.stride",
        losses(),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "the gradient goes to the next thread's columns",
        "cross_entropy",
        "store_columns<W>(in, column, p.cols, p.aligned, x);\n  }\n}",
        "store_columns<W>(in, column + W, p.cols, p.aligned, x);\n  }\n}",
        losses(),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "packs for misaligned rows",
        "cross_entropy",
        "load_columns<W>(in, column, p.cols, p.aligned, x, -INFINITY);",
        "load_columns<W>(in, column, p.cols, true, x, -INFINITY);",
        losses(start=1),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
    Bug(
        "each simdgroup writes the loss",
        "cross_entropy",
        "hit / W % threads == thread_id",
        "lane == 0",
        losses(),
        r"data race on buffer 3 \(write-after-write",
        "cross_entropy/cross_entropy.metal",
        "losses[row] = loss;",
    ),
    Bug(
        "a scale for each row where there is one",
        "cross_entropy",
        "scale[p.per_row ? row : 0]",
        "scale[row]",
        losses(),
        "out-of-bounds.*read of 4 bytes",
        "cross_entropy/cross_entropy.metal",
        "scale[p.per_row ? row : 0]",
    ),
]

ONLY_NUMBERS = [
    ("the first row's scale for all rows", "cross_entropy", "p.per_row ? row : 0", "0", losses(per_row=True)),
    ("the tail counts in the sum of the logits", "cross_entropy", "if (column + j < p.cols) total", "total",
     losses(301)),
    ("a thread's own sum of the logits", "cross_entropy",
     "if (p.smoothing > 0.0f) total = threadgroup_sum(total, scratch_total, place);", "", losses()),
    ("the target after the right one", "cross_entropy", "uint(index) : 0u", "uint(index) + 1u : 0u", losses()),
    ("the target's share ignores the smoothing", "cross_entropy", "by * (1.0f - p.smoothing)", "by", losses()),
    ("no smoothing in the gradient", "cross_entropy", "factor - uniform -", "factor -", losses()),
    ("half of the gradient of a square", "cross_entropy", "2.0f * p.z_loss", "p.z_loss", losses()),
    ("ignored rows count", "cross_entropy", "index == p.ignore_index", "false", losses()),
    ("gradients of the first maximum", "cross_entropy", "exp(x[j] - all.largest)", "exp(x[j] - mine.largest)",
     losses()),
]  # fmt: skip
