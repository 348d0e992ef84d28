"""layer_norm and its gradients beside F.layer_norm and a copy of the same bytes.

python benchmarks/bench_layer_norm.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import arguments, copies, copy_bandwidth, measure, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import layer_norm
from torch_fused.testing import NAMES

SHAPES = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000)]
CASES = {"torch_fused": layer_norm, "F.layer_norm": F.layer_norm}


def bench(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    nbytes = 2 * rows * cols * dtype.itemsize

    def buffers(_: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(*shape, device=device).to(dtype) for shape in ((rows, cols), (cols,), (cols,)))

    sets = copies(buffers, nbytes, device)
    copy = copy_bandwidth(nbytes, device)
    print(f"layer_norm ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():
        timing = measure(lambda x, w, b, call=call: call(x, (cols,), w, b), sets, device)
        report(label, timing, nbytes, copy, first)
        first = first or timing


def bench_backward(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    nbytes = 3 * rows * cols * dtype.itemsize
    copy = copy_bandwidth(nbytes, device)
    print(f"layer_norm backward ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():

        def buffers(_: int, call=call) -> tuple[torch.Tensor, ...]:
            shapes = ((rows, cols), (cols,), (cols,))
            x, w, b = (torch.randn(*shape, device=device).to(dtype).requires_grad_() for shape in shapes)
            return call(x, (cols,), w, b), x, w, b, torch.randn(rows, cols, device=device).to(dtype)

        timing = measure(
            lambda y, x, w, b, grad: torch.autograd.grad(y, (x, w, b), grad, retain_graph=True),
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
        bench_backward(4096, 4096 if args.device != "cpu" else 1024, dtype, args.device)
