"""layer_norm and its gradients: python -m pytest benchmarks/bench_layer_norm.py [--device cpu|cuda|mps] [--compile]"""

import torch
import torch.nn.functional as F
from cases import DTYPES, Case, compiled, gradients, randn
from peers import peers

from torch_fused.functional import layer_norm
from torch_fused.ops.layer_norm import layer_norm_reference

SHAPES = [(64, 1024), (4096, 1024), (4096, 4096), (32, 32000)]


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, weight.shape, weight, bias)


def torchs(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def composed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm_reference(x, weight.shape, weight, bias)


def cases(device: str, full: bool) -> list[Case]:
    contenders = {
        "torch_fused": ours,
        "F.layer_norm": torchs,
        "torch composed": composed,
        "torch.compile": compiled(torchs),
        **peers("layer_norm"),
    }

    def case(op: str, rows: int, cols: int, dtype: torch.dtype, passes: int, **more) -> Case:
        def operands(device: str):
            return tuple(randn(*shape, dtype=dtype, device=device) for shape in ((rows, cols), (cols,), (cols,)))

        nbytes = passes * rows * cols * dtype.itemsize
        return Case(op, f"({rows}, {cols})", dtype, nbytes, operands, contenders, **more)

    forward = [case("layer_norm", *shape, dtype, 2) for shape in SHAPES for dtype in DTYPES]
    shapes = [(4096, 1024), (4096, 4096)]
    return forward + [
        case("layer_norm backward", *shape, dtype, 3, prepare=gradients(3)) for shape in shapes for dtype in DTYPES
    ]


def test_layer_norm(bench):
    bench()
