"""One AdamW step over all parameters beside torch's fused and foreach AdamW and a copy of the same bytes.

python benchmarks/bench_adamw.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
from harness import arguments, copy_bandwidth, measure, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.optim import AdamW
from torch_fused.testing import NAMES

CASES = {
    "torch_fused": AdamW,
    "torch fused=True": lambda params: torch.optim.AdamW(params, fused=True),
    "torch foreach=True": lambda params: torch.optim.AdamW(params, foreach=True),
}


def qwen_shapes(hidden: int, intermediate: int, key_values: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The parameters of a Qwen2 with tied embeddings."""
    attention = [(hidden, hidden), (hidden,), (key_values, hidden), (key_values,), (key_values, hidden), (key_values,)]
    rest = [(hidden, hidden), (intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,)]
    return [(vocabulary, hidden), (hidden,)] + ([*attention, *rest, (hidden,)]) * layers


SHAPES = {
    "8 million parameters": qwen_shapes(384, 1024, 128, 5, 256),
    "Qwen2.5-0.5B, 494 million parameters": qwen_shapes(896, 4864, 128, 24, 151936),
}


def bench(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    nbytes = 7 * elements * dtype.itemsize  # four operands are read, three written
    copy = copy_bandwidth(min(nbytes, 1 << 30), device)
    print(f"{name} in {len(shapes)} tensors, {NAMES[dtype]}, copy {copy / 1e9:.0f} GB/s")
    first = None
    for label, make in CASES.items():
        params = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        timing = measure(make(params).step, [()], device)
        report(label, timing, nbytes, copy, first)
        first = first or timing


if __name__ == "__main__":
    args = arguments(__doc__)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} CPU threads; 'x the time': torch_fused's is 1.00")
    for name, shapes in SHAPES.items():
        if args.device == "cpu" and shapes is not SHAPES["8 million parameters"]:
            continue  # 8 GB of operands
        for dtype in (torch.float32, torch.bfloat16):
            bench(name, shapes, dtype, args.device)
