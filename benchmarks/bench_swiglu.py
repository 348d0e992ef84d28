"""silu_mul, gelu_mul, gradients: python -m pytest benchmarks/bench_swiglu.py [--device cpu|cuda|mps] [--compile]"""

import torch
import torch.nn.functional as F
from cases import DTYPES, Case, compiled, gradients, randn
from peers import peers

from torch_fused.functional import gelu_mul, silu_mul

SHAPES = [(1, 4864), (128, 4864), (2048, 4864), (4096, 4096)]


def torchs(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def torchs_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def cases(device: str, full: bool) -> list[Case]:
    silu = {
        "torch_fused": silu_mul,
        "torch_fused llama": lambda gate, up: silu_mul(gate, up, casting_mode="llama"),
        "F.silu(gate) * up": torchs,
        "torch.compile": compiled(torchs),
        **peers("silu_mul"),
    }
    gelu = {
        "torch_fused": lambda gate, up: gelu_mul(gate, up, approximate="tanh"),
        "torch_fused exact": gelu_mul,
        "F.gelu(gate) * up": torchs_gelu,
        "torch.compile": compiled(torchs_gelu),
        **peers("gelu_mul"),
    }

    def case(op: str, rows: int, cols: int, dtype: torch.dtype, passes: int, **more) -> Case:
        def operands(device: str):
            return tuple(randn(rows, cols, dtype=dtype, device=device) for _ in range(2))

        nbytes = passes * rows * cols * dtype.itemsize
        contenders = silu if op.startswith("silu") else gelu
        return Case(op, f"({rows}, {cols})", dtype, nbytes, operands, contenders, **more)

    shapes = [(2048, 4864), (4096, 4096)]
    found = []
    for op in ("silu_mul", "gelu_mul"):
        found += [case(op, *shape, dtype, 3) for shape in SHAPES for dtype in DTYPES]
        backward = f"{op} backward"
        found += [case(backward, *shape, dtype, 5, prepare=gradients(2)) for shape in shapes for dtype in DTYPES]
    return found


def test_swiglu(bench):
    bench()
