"""quantized_linear: python -m pytest benchmarks/bench_quantized.py [--device cpu|cuda|mps] [--compile]"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import DTYPES, Case, randn

from torch_fused.functional import dequantize, quantize, quantized_linear

# Projections and the head of a model of half a billion weights, and a projection of one of eight.
SHAPES = [(1, 896, 896), (1, 4864, 896), (1, 896, 4864), (1, 151936, 896), (1, 4096, 4096), (8, 4864, 896)]
MANY = [(128, 4864, 896)]
GROUP_SIZE = 64


def cases(device: str, full: bool) -> list[Case]:
    def case(bits: int, vectors: int, rows: int, cols: int, dtype: torch.dtype) -> Case:
        def operands(device: str):
            weight = randn(rows, cols, dtype=dtype, device=device)
            packed = quantize(weight, bits=bits, group_size=GROUP_SIZE)
            return randn(vectors, cols, dtype=dtype, device=device), weight, packed

        options = {"bits": bits, "group_size": GROUP_SIZE}
        contenders: dict[str, Callable] = {
            "torch_fused": lambda x, dense, packed: quantized_linear(x, *packed, **options),
            "F.linear, not packed": lambda x, dense, packed: F.linear(x, dense),
        }
        if device == "cpu" and vectors <= 8:
            int8 = torch.ops.torch_fused._quantized_linear_int8
            contenders["torch_fused int8"] = lambda x, dense, packed: int8(x, *packed, **options)
        if vectors > 8:
            contenders["dequantize, F.linear"] = lambda x, dense, packed: F.linear(x, dequantize(*packed, **options))
        scales = 2 * rows * cols // GROUP_SIZE
        nbytes = rows * cols * bits // 8 + (scales + vectors * (rows + cols)) * dtype.itemsize
        shape = f"({vectors}, {cols}) x ({rows}, {cols})"
        return Case("quantized_linear", shape, dtype, nbytes, operands, contenders, kind=f"{bits} bits")

    return [case(bits, *shape, dtype) for shape in SHAPES + MANY for bits in (4, 8) for dtype in DTYPES]


def test_quantized_linear(bench):
    bench()
