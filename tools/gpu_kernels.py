"""Runs every GPU kernel once or more on small, awkward shapes, for compute-sanitizer; checks the results too."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import add_rms_norm
from torch_fused.ops.rms_norm import add_rms_norm_reference, rms_norm_backward_reference
from torch_fused.ops.softmax import softmax_backward_reference, softmax_reference
from torch_fused.testing import make, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def rms_norm() -> None:
    # One pack a thread, two, four, and rows too long for registers; aligned, odd, and misaligned by a view.
    for dtype in TOLERANCE:
        for cols in (5, 896, 3001, 6000, 9000, 40000):
            for start in (0, 3):
                x, residual = (make(3, cols + start, dtype=dtype, seed=s)[:, start:] for s in range(2))
                weight = make(cols, dtype=dtype, seed=2)
                moved = [t.cuda() for t in (x, residual, weight)]
                for actual, exact in zip(
                    add_rms_norm(*moved), add_rms_norm_reference(x, residual, weight), strict=True
                ):
                    check("add_rms_norm", actual, exact)
                args = (x, residual, residual, (cols,), weight, 1e-6, "torch", 0.0, True)
                moved = [t.cuda() if isinstance(t, torch.Tensor) else t for t in args]
                results = torch.ops.torch_fused.rms_norm_backward(*moved)
                for actual, exact in zip(results, rms_norm_backward_reference(*args), strict=True):
                    check("rms_norm_backward", actual, exact)


def softmax() -> None:
    # As above; then long rows enough to give each a threadgroup, and few that share many.
    for dtype in TOLERANCE:
        for rows, cols in ((3, 5), (3, 896), (3, 3001), (3, 6000), (130, 17000), (3, 40001)):
            for start in (0, 3):
                x, grad = (make(rows, cols + start, dtype=dtype, seed=s)[:, start:] for s in range(2))
                y = softmax_reference(x)
                check("softmax", torch.ops.torch_fused.softmax(x.cuda()), y)
                backward = torch.ops.torch_fused.softmax_backward(grad.cuda(), y.cuda())
                check("softmax_backward", backward, softmax_backward_reference(grad, y))


def check(op: str, actual: torch.Tensor, exact: torch.Tensor) -> None:
    error = relative_error(actual, exact)
    if not error < TOLERANCE[actual.dtype]:
        sys.exit(f"{op}: {actual.dtype} {tuple(actual.shape)}: relative error {error}")


rms_norm()
softmax()
torch.cuda.synchronize()
print("every kernel ran")
