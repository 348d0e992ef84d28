"""Decoders with random weights in the shapes of published ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from torch_fused.hf import quantize_

GROUP_SIZE = 64  # of packed weights


def sizes(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
        "head_dim": hidden // heads, "tie_word_embeddings": True, "max_position_embeddings": 65536,
    }  # fmt: skip


CONFIGS: dict[str, Callable[..., Any]] = {
    "SmolLM2-135M": partial(LlamaConfig, **sizes(30, 576, 9, 3, 1536, 49152)),
    "Qwen2.5-0.5B": partial(Qwen2Config, **sizes(24, 896, 14, 2, 4864, 151936)),
    "Qwen2.5-1.5B": partial(Qwen2Config, **sizes(28, 1536, 12, 2, 8960, 151936)),
    "Qwen2.5-3B": partial(Qwen2Config, **sizes(36, 2048, 16, 2, 11008, 151936)),
    "Qwen3-0.6B": partial(Qwen3Config, **sizes(28, 1024, 16, 8, 3072, 151936) | {"head_dim": 128}),
    "Llama-3.2-1B": partial(LlamaConfig, **sizes(16, 2048, 32, 8, 8192, 128256)),
    "a small Qwen2": partial(Qwen2Config, **sizes(5, 384, 6, 2, 1024, 256)),
    # 8 experts for each token, as in Qwen3-30B-A3B 8 of 128.
    "8 layers of 64 experts": partial(
        Qwen3MoeConfig, **sizes(8, 768, 12, 4, 6144, 32000) | {"tie_word_embeddings": False},
        moe_intermediate_size=384, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True,
    ),
}  # fmt: skip


def made(name: str, dtype: torch.dtype, device: str = "cpu", bits: int = 0, **changes: int) -> Any:
    """A model of these sizes; dense for 0 bits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](**changes)).to(dtype).eval()
    if bits:
        quantize_(model, bits=bits, group_size=GROUP_SIZE)
    return model


def adapted(model: Any, targets: str | list[str] = "all-linear", rank: int = 16, mixed: bool = False) -> Any:
    """With LoRA, by default on every matrix of the layers, in the model's dtype or, as PEFT has it, in float32."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return model if mixed else model.to(dtype)
