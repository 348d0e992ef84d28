"""rms_norm, add_rms_norm, gradients: python -m pytest benchmarks/bench_rms_norm.py [--device cpu|cuda|mps] [--compile]

"llama" makes the roundings of Hugging Face's module, which is what it is to be compared with.
"""

import torch
import torch.nn.functional as F
from cases import DTYPES, Case, compiled, gradients, randn
from peers import peers

from torch_fused.functional import add_rms_norm, rms_norm
from torch_fused.ops.rms_norm import rms_norm_reference

EPS = 1e-6
SHAPES = [(1, 896), (128, 896), (4096, 896), (4096, 4096)]


def torchs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def hugging_face(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm_reference(x, weight.shape, weight, EPS, casting_mode="llama")


def add_torchs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return torchs(total, weight), total


def add_hugging_face(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return hugging_face(total, weight), total


NORM = {
    "torch_fused": lambda x, w: rms_norm(x, w.shape, w, EPS),
    "torch_fused llama": lambda x, w: rms_norm(x, w.shape, w, EPS, casting_mode="llama"),
    "F.rms_norm": torchs,
    "HF module": hugging_face,
}
ADD_NORM = {
    "torch_fused": lambda x, r, w: add_rms_norm(x, r, w, EPS, casting_mode="torch"),
    "torch_fused llama": lambda x, r, w: add_rms_norm(x, r, w, EPS),
    "add, F.rms_norm": add_torchs,
    "add, HF module": add_hugging_face,
}


def cases(device: str, full: bool) -> list[Case]:
    norm = NORM | {"torch.compile": compiled(torchs)} | peers("rms_norm")
    add_norm = ADD_NORM | {"torch.compile": compiled(add_torchs)}

    def case(op: str, rows: int, cols: int, dtype: torch.dtype, inputs: int, passes: int, contenders, **more) -> Case:
        def operands(device: str):
            return tuple(randn(*shape, dtype=dtype, device=device) for shape in ((rows, cols),) * inputs + ((cols,),))

        nbytes = passes * rows * cols * dtype.itemsize
        return Case(op, f"({rows}, {cols})", dtype, nbytes, operands, contenders, **more)

    both = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    shapes = [(4096, 896), (4096, 4096)]
    return [
        *(case("rms_norm", *shape, dtype, 1, 2, norm) for shape, dtype in both),
        *(case("add_rms_norm", *shape, dtype, 2, 4, add_norm) for shape, dtype in both),
        *(
            case("rms_norm backward", *shape, dtype, 1, 3, norm, prepare=gradients(2))
            for shape in shapes
            for dtype in DTYPES
        ),
    ]


def test_rms_norm(bench):
    bench()
