"""A step of a decoder as one op, dense and packed, next to a plain read of the same bytes: weights and cache.

Shapes are batch x new tokens after a context. Models have random weights, and their embedding as head.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from ops import OpCase
from record import Case
from timing import Call
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from torch_fused.hf import plan, quantize_
from torch_fused.ops.decode import decode_
from torch_fused.testing import NAMES

GROUP_SIZE = 64


def sizes(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
    }  # fmt: skip


MODELS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "SmolLM2-135M": (LlamaConfig, LlamaForCausalLM, sizes(30, 576, 9, 3, 1536, 49152)),
    "Qwen2.5-0.5B": (Qwen2Config, Qwen2ForCausalLM, sizes(24, 896, 14, 2, 4864, 151936)),
    "Llama-3.2-1B": (LlamaConfig, LlamaForCausalLM, sizes(16, 2048, 32, 8, 8192, 128256)),
}
Shape = tuple[int, int, int]
FEW: list[Shape] = [(1, 1, 128), (1, 1, 4096), (8, 1, 128)]
MANY: list[Shape] = [*FEW[:2], (1, 1, 32768), (4, 1, 128), (8, 1, 128), (1, 8, 128)]


def shaped(name: str, device: str, dtype: torch.dtype, bits: int = 0, **changes: int) -> Any:
    """A model of these sizes; dense for 0 bits."""
    config, model, known = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        made = model(config(**{**known, **changes}, tie_word_embeddings=True, max_position_embeddings=65536))
    made = made.to(dtype).eval()
    if bits:
        quantize_(made, bits=bits, group_size=GROUP_SIZE)
    return made


@lru_cache(maxsize=1)
def kept(*arguments: Any) -> Any:
    return shaped(*arguments)


@cache
def elements(name: str) -> tuple[int, int]:
    """Of its matrices, each read once per step, and of its vectors."""
    weights = list(shaped(name, "meta", torch.bfloat16).parameters())
    return tuple(sum(w.numel() for w in weights if (w.dim() == 2) == matrices) for matrices in (True, False))  # type: ignore[return-value]


def nbytes(name: str, bits: int, shape: Shape, dtype: torch.dtype) -> int:
    """Of the weights and the cache, the new tokens included, each once."""
    (batch, steps, length), (matrices, vectors), known = shape, elements(name), MODELS[name][2]
    head_dim = known["hidden_size"] // known["num_attention_heads"]
    states = 2 * known["num_hidden_layers"] * batch * known["num_key_value_heads"] * (length + steps) * head_dim
    codes = matrices * bits // 8 if bits else matrices * dtype.itemsize
    scales = 2 * matrices // GROUP_SIZE if bits else 0
    return codes + (scales + vectors + states) * dtype.itemsize


def operands(model: Any, shape: Shape) -> tuple:
    """What a step takes besides the model."""
    batch, steps, length = shape
    config, new = model.config, {"device": model.device, "dtype": model.dtype}
    head_dim = config.hidden_size // config.num_attention_heads
    states = (batch, config.num_key_value_heads, length + steps, head_dim)
    keys, values = ([torch.randn(states, **new) for _ in range(config.num_hidden_layers)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long, device=model.device)
    angles = torch.rand(length + steps, head_dim, **new)
    return ids, ids, None, angles, angles, keys, values, length


def decoder_of(model: Any, int8_products: bool = True) -> Any:
    read = plan.read(model, int8_products)
    assert isinstance(read, plan.Plan), read
    return read.decoder


def step(model: Any, shape: Shape, int8_products: bool = True) -> Call:
    return partial(decode_, decoder_of(model, int8_products), *operands(model, shape), logits_to_keep=1)


def decode(device: str, full: bool) -> list[Case]:
    def case(name: str, bits: int, shape: Shape, dtype: torch.dtype) -> Case:
        moved = nbytes(name, bits, shape, dtype)
        calls: dict[str, Callable[..., Call]] = {"torch_fused": step}
        if bits and device == "cpu":
            calls["torch_fused, products of floats"] = partial(step, int8_products=False)
        calls["a plain read"] = lambda model, shape: torch.ones(moved // 4, device=device).sum
        op = "decode" if name == "SmolLM2-135M" else f"decode, {name}"
        return OpCase(
            op, "{} x {} after {}".format(*shape), NAMES[dtype], f"{bits} bits" if bits else "", moved,
            lambda device: (kept(name, device, dtype, bits), shape), calls, lambda make, *rest: make(*rest),
        )  # fmt: skip

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    smollm2, qwen = list(MODELS)[:2]
    dense = [case(smollm2, 0, shape, dtype) for dtype in dtypes for shape in MANY]
    dense += [case(qwen, 0, shape, torch.bfloat16) for shape in FEW]
    return dense + [
        case(name, bits, shape, torch.bfloat16) for name in (smollm2, qwen) for bits in (4, 8) for shape in FEW
    ]
