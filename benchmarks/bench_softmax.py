"""softmax and its gradient: python -m pytest benchmarks/bench_softmax.py [--device cpu|cuda|mps] [--compile]"""

import torch
from cases import DTYPES, Case, compiled, gradients, randn
from peers import peers

from torch_fused.functional import softmax

SHAPES = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000), (1, 151936), (64, 151936)]


def composed(x: torch.Tensor) -> torch.Tensor:
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def torch_softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def cases(device: str, full: bool) -> list[Case]:
    contenders = {
        "torch_fused": softmax,
        "torch.softmax": torch_softmax,
        "torch composed": composed,
        "torch.compile": compiled(torch_softmax),
        **peers("softmax"),
    }

    def case(op: str, rows: int, cols: int, dtype: torch.dtype, passes: int, **more) -> Case:
        def operands(device: str):
            return (randn(rows, cols, dtype=dtype, device=device),)

        nbytes = passes * rows * cols * dtype.itemsize
        return Case(op, f"({rows}, {cols})", dtype, nbytes, operands, contenders, **more)

    forward = [case("softmax", *shape, dtype, 2) for shape in SHAPES for dtype in DTYPES]
    shapes = [(4096, 1024), (4096, 4096)]
    return forward + [
        case("softmax backward", *shape, dtype, 3, prepare=gradients(1)) for shape in shapes for dtype in DTYPES
    ]


def test_softmax(bench):
    bench()
