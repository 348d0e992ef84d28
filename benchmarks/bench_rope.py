"""apply_rotary_pos_emb and its gradients: python -m pytest benchmarks/bench_rope.py [--device cpu|cuda|mps] [--compile]

Shapes are (batch, tokens, query heads, key heads, head_dim).
"""

import torch
from cases import DTYPES, Case, compiled, gradients, randn
from peers import peers
from transformers.models.llama import modeling_llama

from torch_fused.functional import apply_rotary_pos_emb

# Qwen2.5-0.5B's decode and prefill, Qwen3-8B's prefill.
SHAPES = [(1, 1, 14, 2, 64), (1, 128, 14, 2, 64), (1, 2048, 14, 2, 64), (1, 2048, 32, 8, 128)]


def cases(device: str, full: bool) -> list[Case]:
    contenders = {
        "torch_fused": apply_rotary_pos_emb,
        "torch_fused llama": lambda *tensors: apply_rotary_pos_emb(*tensors, casting_mode="llama"),
        "transformers": modeling_llama.apply_rotary_pos_emb,
        "torch.compile": compiled(modeling_llama.apply_rotary_pos_emb),
        **peers("apply_rotary_pos_emb"),
    }

    def case(op: str, shape: tuple[int, ...], dtype: torch.dtype, **more) -> Case:
        batch, tokens, q_heads, k_heads, head_dim = shape

        def operands(device: str):
            q, k = (randn(batch, tokens, n, head_dim, dtype=dtype, device=device) for n in (q_heads, k_heads))
            cos, sin = (randn(1, tokens, head_dim, dtype=dtype, device=device) for _ in range(2))
            return q.transpose(1, 2), k.transpose(1, 2), cos, sin

        nbytes = (2 * batch * (q_heads + k_heads) + 2) * tokens * head_dim * dtype.itemsize
        return Case(op, str(shape), dtype, nbytes, operands, contenders, **more)

    return [
        *(case("apply_rotary_pos_emb", shape, dtype) for shape in SHAPES for dtype in DTYPES),
        *(case("apply_rotary_pos_emb backward", SHAPES[2], dtype, prepare=gradients(2)) for dtype in DTYPES),
    ]


def test_rope(bench):
    bench()
