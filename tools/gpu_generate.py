"""Generates with small models on a GPU, for compute-sanitizer; checks the tokens, and that each step is one op.

Torch's matrix products are replaced by elementwise ones. Of cuBLAS's newest kernels initcheck does not see what they
write, and racecheck can fail in them.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from torch_fused.hf import apply_torch_fused, quantize_

NEW, VOCABULARY = 6, 640
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}
QWEN2, QWEN3, LLAMA = Qwen2Config(**SIZES), Qwen3Config(**SIZES, head_dim=64), LlamaConfig(**SIZES)
F32, BF16 = torch.float32, torch.bfloat16


class Request(NamedTuple):
    config: Any
    dtype: torch.dtype
    bits: int  # of packed weights; 0: dense
    batch: int
    prompt: int
    sampled: bool = False


REQUESTS = (
    *(Request(QWEN2, F32, 0, batch, 20) for batch in (1, 3, 8)),
    *(Request(QWEN2, BF16, 0, batch, 20) for batch in (1, 8)),
    Request(LLAMA, BF16, 0, 2, 20, sampled=True),
    *(Request(QWEN3, BF16, bits, batch, 20) for bits in (4, 8) for batch in (1, 8)),
    Request(QWEN3, F32, 4, 3, 20),
    # Contexts of several chunks of attention.
    *(Request(QWEN3, BF16, bits, *sizes) for bits in (0, 4) for sizes in ((1, 700), (8, 300))),
    Request(QWEN3, F32, 8, 1, 700),
)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product in float32, or float64 for float64, some rows at a time."""
    wide = torch.promote_types(a.dtype, torch.float32)
    a, columns = a.to(wide), b.to(wide).transpose(-1, -2).unsqueeze(-3)
    rows = max(1, (1 << 26) // max(1, columns.numel()))
    return torch.cat([(part.unsqueeze(-2) * columns).sum(-1) for part in a.split(rows, dim=-2)], dim=-2)


def product_and_sum(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    found = product(a, b) * alpha
    return (found if beta == 0 else found + beta * x).to(a.dtype)


def replace_products() -> torch.library.Library:
    """Of all CUDA tensors, for as long as the library that it returns is kept."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        library.impl(name, lambda a, b: product(a, b).to(a.dtype), "CUDA")
    for name in ("addmm", "baddbmm"):
        library.impl(name, product_and_sum, "CUDA")
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return library


def generate(request: Request, device: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.config, dtype=request.dtype).to(device).eval()
    if request.bits:
        quantize_(model, bits=request.bits, group_size=32)
    ids = torch.randint(5, VOCABULARY, (request.batch, request.prompt)).to(device)
    mask = torch.ones_like(ids)
    mask[1:2, : request.prompt // 3] = 0
    never = VOCABULARY  # an end that never comes, for which the host looks at each token
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": never, "pad_token_id": 0}
    options |= {"do_sample": True, "top_k": 20, "top_p": 0.9} if request.sampled else {"do_sample": False}
    exact = request.dtype == F32 and not request.bits
    expected = model.generate(ids, **options) if exact else None
    handle = apply_torch_fused(model)
    found = model.generate(ids, **options)
    assert found.shape == (request.batch, request.prompt + NEW), f"{request}: {found.shape}"
    assert expected is None or torch.equal(found, expected), f"{request}: other tokens than transformers'"
    assert f"{NEW - 1} calls as one op" in str(handle.report()), f"{request}: {handle.report()}"


def main() -> int:
    library = replace_products()
    for request in REQUESTS:
        generate(request, "cuda")
    torch.cuda.synchronize()
    del library
    print(f"gpu_generate: {len(REQUESTS)} requests right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
