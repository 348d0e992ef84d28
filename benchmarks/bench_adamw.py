"""One AdamW step over all parameters: python -m pytest benchmarks/bench_adamw.py [--device cpu|cuda|mps]"""

import torch
from cases import DTYPES, Case, randn

from torch_fused.optim import AdamW

CONTENDERS = {
    "torch_fused": AdamW,
    "torch fused=True": lambda params: torch.optim.AdamW(params, fused=True),
    "torch foreach=True": lambda params: torch.optim.AdamW(params, foreach=True),
}


def qwen_shapes(hidden: int, intermediate: int, key_values: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The parameters of a Qwen2 with tied embeddings."""
    attention = [(hidden, hidden), (hidden,), (key_values, hidden), (key_values,), (key_values, hidden), (key_values,)]
    rest = [(hidden, hidden), (intermediate, hidden), (intermediate, hidden), (hidden, intermediate), (hidden,)]
    return [(vocabulary, hidden), (hidden,)] + ([*attention, *rest, (hidden,)]) * layers


SMALL = qwen_shapes(384, 1024, 128, 5, 256)
QWEN = qwen_shapes(896, 4864, 128, 24, 151936)  # Qwen2.5-0.5B


def cases(device: str, full: bool) -> list[Case]:
    def case(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Case:
        def operands(device: str):
            params = [torch.nn.Parameter(randn(*shape, dtype=dtype, device=device)) for shape in shapes]
            for param in params:
                param.grad = torch.randn_like(param)
            return (params,)

        elements = sum(torch.Size(shape).numel() for shape in shapes)
        name = f"{elements / 1e6:.0f} million in {len(shapes)} tensors"
        nbytes = 7 * elements * dtype.itemsize  # four operands are read, three written
        return Case("adamw", name, dtype, nbytes, operands, CONTENDERS, prepare=lambda make, params: make(params).step)

    lists = [SMALL, QWEN] if full or device != "cpu" else [SMALL]  # 8 GB of operands, half a second a step
    return [case(shapes, dtype) for shapes in lists for dtype in DTYPES]


def test_adamw(bench):
    bench()
