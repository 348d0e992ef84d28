"""Bugs in the cross entropy kernels."""

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


def chunks(classes: int = 2496, chunk: int = 1248, per_row: bool = False) -> Callable[[], object]:
    """The loss of three rows, one of them ignored, and its gradients, in chunks of classes."""

    def run() -> tuple[torch.Tensor, ...]:
        hidden, weight = make(3, 8, dtype=torch.bfloat16), make(classes, 8, dtype=torch.bfloat16, seed=1)
        target = torch.tensor([5, -100, classes - 1])
        grad = torch.tensor([0.5, 1.0, 2.0]) if per_row else torch.tensor(0.5)
        return torch.ops.torch_fused._linear_cross_entropy_gradients(
            hidden, weight, target, None, grad, -100, 0.1, "none" if per_row else "sum", 0.01, True, True, False, chunk
        )

    return run


def scale(start: int = 0) -> Callable[[], object]:
    """Numbers from offset `start` on, multiplied in place by several threadgroups."""

    def run() -> torch.Tensor:
        x = make(20000 + start, dtype=torch.bfloat16)[start:]
        torch.ops.torch_fused._scale_(x, torch.tensor(0.3))
        return x

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
        "losses[row] = loss_of_row",
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
    Bug(
        "every threadgroup sums the first row's chunk",
        "cross_entropy_classes",
        "sums[row] = all.packed();",
        "sums[0 * row] = all.packed();",
        chunks(),
        r"data race on buffer 2 \(",
        "cross_entropy/cross_entropy_classes.metal",
        "sums[row] = all.packed();",
    ),
    Bug(
        "each simdgroup adds to the row's sums",
        "cross_entropy_classes",
        "if (thread_id != 0) return;",
        "if (lane != 0) return;",
        chunks(),
        r"data race on buffer 2 \(write-after-write",
        "cross_entropy/cross_entropy_classes.metal",
        "sums[row] = all.packed();",
    ),
    Bug(
        "the logit of a target that another chunk has",
        "cross_entropy_classes",
        "if (hit < p.cols) all.of_target",
        "all.of_target",
        chunks(),
        "out-of-bounds.*read of 2 bytes",
        "cross_entropy/cross_entropy_classes.metal",
        "all.of_target = float(in[hit]);",
    ),
    Bug(
        "a chunk's gradient goes to the next pack",
        "cross_entropy_classes",
        "store_columns<W>(in, first, p.stride, true, x);",
        "store_columns<W>(in, first + W, p.stride, true, x);",
        chunks(),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "a scale for each row of a chunk where there is one",
        "cross_entropy_classes",
        "scale[p.per_row ? row : 0]",
        "scale[row]",
        chunks(),
        "out-of-bounds.*read of 4 bytes",
        "cross_entropy/cross_entropy_classes.metal",
        "scale[p.per_row ? row : 0]",
    ),
    Bug(
        "every threadgroup scales the first numbers",
        "scale",
        "long(group) * chunk",
        "long(0 * group) * chunk",
        scale(),
        r"data race on buffer 0 \(",
        "common/pack.metal.h",
        "",
    ),
    Bug(
        "packs for misaligned numbers",
        "scale",
        "count, p.aligned);",
        "count, true);",
        scale(start=1),
        "misaligned read of 16 bytes",
        "common/pack.metal.h",
        "const uint4 raw = from[i];",
    ),
]

ONLY_NUMBERS = [
    ("the first row's scale for all rows", "cross_entropy", "p.per_row ? row : 0", "0", losses(per_row=True)),
    ("the tail counts in the sum of the logits", "cross_entropy", "if (column + j < p.cols) total", "total",
     losses(301)),
    ("a thread's own sum of the logits", "cross_entropy",
     "if (p.smoothing > 0.0f) total = threadgroup_sum(total, scratch_total, place);", "", losses()),
    ("the target after the right one", "cross_entropy", "uint(index) : 0u", "uint(index) + 1u : 0u", losses()),
    ("the target's share ignores the smoothing", "cross_entropy", "scale * (1.0f - smoothing)", "scale", losses()),
    ("no smoothing in the gradient", "cross_entropy", "factor - uniform -", "factor -", losses()),
    ("half of the gradient of a square", "cross_entropy", "2.0f * z_loss", "z_loss", losses()),
    ("ignored rows count", "cross_entropy", "index == p.ignore_index", "false", losses()),
    ("gradients of the first maximum", "cross_entropy", "RowGradient::of(all, by",
     "RowGradient::of({mine.largest, all.sum}, by", losses()),
    ("each chunk begins the sums", "cross_entropy_classes", "if (p.begin > 0) all", "if (false) all", chunks()),
    ("no shift to the larger of two maxima", "cross_entropy_classes", "+ other.sum * exp(other.largest - by)",
     "+ other.sum", chunks()),
    ("the target's class as the chunk's column", "cross_entropy_classes", "uint(index - long(p.begin))", "uint(index)",
     chunks()),
    ("the chunk's tail counts in the sum of the logits", "cross_entropy_classes",
     "column + i * step + j < p.cols ? x[i * W + j] : 0.0f", "x[i * W + j]", chunks(2500)),
    ("a thread's own sum of the chunk's logits", "cross_entropy_classes",
     "if (p.smoothing > 0.0f) total = threadgroup_sum(total, scratch_total, place);", "", chunks()),
    ("the last chunk's sum of the logits", "cross_entropy_classes", "all.total += total", "all.total = total",
     chunks()),
    ("the mean of the logits over a chunk", "cross_entropy_classes", "all.total, p.classes",
     "all.total, p.cols", chunks()),
    ("the smoothing spread over a chunk", "cross_entropy_classes", "by, p.classes", "by, p.cols", chunks()),
    ("the first row's scale for all rows of a chunk", "cross_entropy_classes", "p.per_row ? row : 0", "0",
     chunks(per_row=True)),
    ("a pack twice, and one not", "cross_entropy_classes", "packs[i].unpack(x + i * W)", "packs[0].unpack(x + i * W)",
     chunks(classes=5000, chunk=4992)),
    ("the gradient of the largest logit's square", "cross_entropy_classes", "2.0f * z_loss * lse",
     "2.0f * z_loss * exps.largest", chunks()),
    ("a pack multiplied twice", "scale", "packs[i].unpack(values);\n",
     "packs[i].unpack(values);\n    if (i == 1) values[0] *= by;\n", scale()),
]  # fmt: skip
