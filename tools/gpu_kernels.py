"""Runs every GPU kernel once or more on small, awkward shapes, for compute-sanitizer; checks the results too."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import add_rms_norm
from torch_fused.ops.rms_norm import add_rms_norm_reference, rms_norm_backward_reference
from torch_fused.ops.sampling import filter_logits_reference, greedy_reference, sample_reference
from torch_fused.sampling import filter_logits, greedy, sample
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


def sampling() -> None:
    # One slice and several, with a tail; normal, equal and rounded logits, and a row with nothing to draw.
    for dtype in TOLERANCE:
        for vocabulary in (5, 2048, 9001):
            x = make(4, vocabulary, dtype=dtype)
            x[1], x[2], x[3] = 0, x[2].round(), float("nan")
            for kwargs in ({}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}):
                same("filter_logits", filter_logits(x.cuda(), **kwargs), filter_logits_reference(x, **kwargs))
                drawn = sample(x.cuda(), seed=1, return_valid=True, **kwargs)
                for actual, exact in zip(drawn, sample_reference(x, seed=1, **kwargs), strict=True):
                    same("sample", actual, exact)
            same("greedy", greedy(x.cuda()), greedy_reference(x))


def same(op: str, actual: torch.Tensor, exact: torch.Tensor) -> None:
    if not torch.equal(actual.cpu(), exact):
        sys.exit(f"{op}: {actual.dtype} {tuple(actual.shape)}: differs from the reference")


def check(op: str, actual: torch.Tensor, exact: torch.Tensor) -> None:
    error = relative_error(actual, exact)
    if not error < TOLERANCE[actual.dtype]:
        sys.exit(f"{op}: {actual.dtype} {tuple(actual.shape)}: relative error {error}")


rms_norm()
sampling()
torch.cuda.synchronize()
print("every kernel ran")
