"""rms_norm and add_rms_norm beside F.rms_norm, Hugging Face's module and a copy of the same bytes.

python benchmarks/bench_rms_norm.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import arguments, copies, copy_bandwidth, measure, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import add_rms_norm, rms_norm
from torch_fused.ops.rms_norm import rms_norm_reference
from torch_fused.testing import NAMES

SHAPES = [(1, 896), (128, 896), (4096, 896), (4096, 4096)]


def hugging_face(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm_reference(x, weight.shape, weight, 1e-6, casting_mode="llama")


def bench(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    size = rows * cols * dtype.itemsize

    def buffers(i: int) -> tuple[torch.Tensor, ...]:
        x, residual = (torch.randn(rows, cols, device=device).to(dtype) for _ in range(2))
        return x, residual, torch.randn(cols, device=device).to(dtype)

    sets = copies(buffers, 2 * size, device)
    shape = (cols,)
    for name, nbytes, cases in (
        (
            "rms_norm",
            2 * size,
            {
                "torch_fused": lambda x, r, w: rms_norm(x, shape, w, 1e-6),
                "torch_fused llama": lambda x, r, w: rms_norm(x, shape, w, 1e-6, casting_mode="llama"),
                "F.rms_norm": lambda x, r, w: F.rms_norm(x, shape, w, 1e-6),
                "HF module": lambda x, r, w: hugging_face(x, w),
            },
        ),
        (
            "add_rms_norm",
            4 * size,
            {
                "torch_fused": lambda x, r, w: add_rms_norm(x, r, w, casting_mode="torch"),
                "torch_fused llama": lambda x, r, w: add_rms_norm(x, r, w),
                "add, F.rms_norm": lambda x, r, w: F.rms_norm(x + r, shape, w, 1e-6),
                "add, HF module": lambda x, r, w: hugging_face(x + r, w),
            },
        ),
    ):
        copy = copy_bandwidth(nbytes, device)
        print(f"{name} ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
        first = None
        for label, call in cases.items():
            timing = measure(call, sets, device)
            report(label, timing, nbytes, copy, first)
            first = first or timing


def bench_backward(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    nbytes = 3 * rows * cols * dtype.itemsize

    def buffers(fused: bool):
        def make(i: int) -> tuple[torch.Tensor, ...]:
            x = torch.randn(rows, cols, device=device).to(dtype).requires_grad_()
            w = torch.randn(cols, device=device).to(dtype).requires_grad_()
            y = rms_norm(x, (cols,), w, 1e-6) if fused else F.rms_norm(x, (cols,), w, 1e-6)
            return y, x, w, torch.randn(rows, cols, device=device).to(dtype)

        return make

    copy = copy_bandwidth(nbytes, device)
    print(f"rms_norm backward ({rows}, {cols}) {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, fused in (("torch_fused", True), ("F.rms_norm", False)):
        sets = copies(buffers(fused), nbytes, device)
        timing = measure(
            lambda y, x, w, g: torch.autograd.grad(y, (x, w), g, retain_graph=True), sets, device, samples=9
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
        bench_backward(4096, 4096 if args.device != "cpu" else 896, dtype, args.device)
