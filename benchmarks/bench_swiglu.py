"""silu_mul and its gradient beside torch's composition and a copy of the same bytes.

python benchmarks/bench_swiglu.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import arguments, copies, copy_bandwidth, measure, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import silu_mul
from torch_fused.testing import NAMES

SHAPES = [(1, 4864), (128, 4864), (2048, 4864), (4096, 4096)]
CASES = {
    "torch_fused": lambda g, u: silu_mul(g, u, casting_mode="llama"),
    "F.silu(gate) * up": lambda g, u: F.silu(g) * u,
}


def bench(rows: int, cols: int, dtype: torch.dtype, device: str, *, backward: bool) -> None:
    nbytes = (5 if backward else 3) * rows * cols * dtype.itemsize
    copy = copy_bandwidth(nbytes, device)
    name = "silu_mul backward" if backward else "silu_mul"
    print(f"{name} ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():

        def buffers(_: int, call=call) -> tuple[torch.Tensor, ...]:
            gate, up, grad = (torch.randn(rows, cols, device=device).to(dtype) for _ in range(3))
            if not backward:
                return gate, up
            return call(gate.requires_grad_(), up.requires_grad_()), gate, up, grad

        def gradients(y, gate, up, grad):
            return torch.autograd.grad(y, (gate, up), grad, retain_graph=True)

        timing = measure(gradients if backward else call, copies(buffers, nbytes, device), device)
        report(label, timing, nbytes, copy, first)
        first = first or timing


if __name__ == "__main__":
    args = arguments(__doc__)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} CPU threads; 'x the time': torch_fused's is 1.00")
    for rows, cols in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            bench(rows, cols, dtype, args.device, backward=False)
    for dtype in (torch.float32, torch.bfloat16):
        bench(2048, 4864, dtype, args.device, backward=True)
