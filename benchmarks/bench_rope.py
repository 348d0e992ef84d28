"""apply_rotary_pos_emb beside Hugging Face's function and a copy of the same bytes.

python benchmarks/bench_rope.py [--device cpu|cuda|mps] [--threads N]
"""

import sys
from pathlib import Path

import torch
from harness import arguments, copies, copy_bandwidth, measure, report
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torch_fused.functional import apply_rotary_pos_emb
from torch_fused.testing import NAMES

# (batch, tokens, q heads, k heads, head_dim): Qwen2.5-0.5B's decode and prefill, Qwen3-8B's prefill.
SHAPES = [(1, 1, 14, 2, 64), (1, 128, 14, 2, 64), (1, 2048, 14, 2, 64), (1, 2048, 32, 8, 128)]
CASES = {
    "torch_fused": lambda *tensors: apply_rotary_pos_emb(*tensors, casting_mode="llama"),
    "transformers": modeling_llama.apply_rotary_pos_emb,
}


def bench(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    batch, tokens, q_heads, k_heads, head_dim = shape

    def buffers(_: int) -> tuple[torch.Tensor, ...]:
        q, k = (torch.randn(batch, tokens, n, head_dim, device=device).to(dtype) for n in (q_heads, k_heads))
        cos, sin = (torch.randn(1, tokens, head_dim, device=device).to(dtype) for _ in range(2))
        return q.transpose(1, 2), k.transpose(1, 2), cos, sin

    nbytes = (2 * batch * (q_heads + k_heads) + 2) * tokens * head_dim * dtype.itemsize
    sets = copies(buffers, nbytes, device)
    copy = copy_bandwidth(nbytes, device)
    print(f"rotary of {shape} {NAMES[dtype]}, copy of the same bytes {copy / 1e9:.0f} GB/s")
    first = None
    for label, call in CASES.items():
        timing = measure(call, sets, device)
        report(label, timing, nbytes, copy, first)
        first = first or timing


if __name__ == "__main__":
    args = arguments(__doc__)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} CPU threads; 'x the time': torch_fused's is 1.00")
    with torch.no_grad():
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                bench(shape, dtype, args.device)
