"""softmax and its gradient beside torch.softmax and a copy of the same bytes.

python benchmarks/bench_softmax.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
from harness import arguments, copies, copy_bandwidth, measure, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import softmax
from torch_fused.testing import NAMES

SHAPES = [(64, 1024), (4096, 1024), (4096, 8192), (32, 32000), (1, 151936)]
CASES = {"torch_fused": softmax, "torch.softmax": lambda x: torch.softmax(x, -1)}


def bench(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    nbytes = 2 * rows * cols * dtype.itemsize
    sets = copies(lambda i: (torch.randn(rows, cols, device=device).to(dtype),), nbytes, device)
    copy = copy_bandwidth(nbytes, device)
    print(f"softmax ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():
        timing = measure(call, sets, device)
        report(label, timing, nbytes, copy, first)
        first = first or timing


def bench_backward(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    nbytes = 3 * rows * cols * dtype.itemsize
    copy = copy_bandwidth(nbytes, device)
    print(f"softmax backward ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():

        def buffers(i: int, call=call) -> tuple[torch.Tensor, ...]:
            x = torch.randn(rows, cols, device=device).to(dtype).requires_grad_()
            return call(x), x, torch.randn(rows, cols, device=device).to(dtype)

        timing = measure(
            lambda y, x, grad: torch.autograd.grad(y, x, grad, retain_graph=True),
            copies(buffers, nbytes, device),
            device,
            samples=9,
        )
        report(label, timing, nbytes, copy, first)
        first = first or timing


if __name__ == "__main__":
    args = arguments(__doc__)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} CPU threads; 'x the time': torch_fused's is 1.00")
    with torch.no_grad():
        for rows, cols in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                bench(rows, cols, dtype, args.device)
    for dtype in (torch.float32, torch.bfloat16):
        bench_backward(4096, 1024, dtype, args.device)
