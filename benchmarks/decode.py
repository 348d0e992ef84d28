"""A step of a decoder as one op, dense and packed, next to a plain read of the same bytes: weights and cache.

Shapes are batch x new tokens after a context. Models have random weights, and their embedding as head.
"""

from functools import cache, lru_cache, partial
from typing import Any

import torch
from models import CONFIGS, GROUP_SIZE, made
from ops import OpCase
from timing import Call

from torch_fused.hf import plan
from torch_fused.ops.decode import decode_
from torch_fused.testing import NAMES

Shape = tuple[int, int, int]
FEW: list[Shape] = [(1, 1, 128), (1, 1, 4096), (8, 1, 128)]
MANY: list[Shape] = [*FEW[:2], (1, 1, 32768), (4, 1, 128), (8, 1, 128), (1, 8, 128)]
kept, shapes = lru_cache(maxsize=1)(made), cache(partial(made, device="meta"))


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def nbytes(name: str, bits: int, shape: Shape, dtype: torch.dtype) -> int:
    """Of the weights, each read once, and the cache, the new tokens included."""
    (batch, steps, length), config = shape, CONFIGS[name]()
    weights = list(shapes(name, dtype).parameters())
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    vectors = sum(weight.numel() for weight in weights if weight.dim() == 1)
    states = 2 * config.num_hidden_layers * batch * config.num_key_value_heads * (length + steps) * head_dim(config)
    codes = matrices * bits // 8 if bits else matrices * dtype.itemsize
    scales = 2 * matrices // GROUP_SIZE if bits else 0
    return codes + (scales + vectors + states) * dtype.itemsize


def operands(model: Any, shape: Shape) -> tuple:
    """What a step takes besides the model."""
    (batch, steps, length), config = shape, model.config
    new = {"device": model.device, "dtype": model.dtype}
    states = (batch, config.num_key_value_heads, length + steps, head_dim(config))
    keys, values = ([torch.randn(states, **new) for _ in range(config.num_hidden_layers)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long, device=model.device)
    angles = torch.rand(length + steps, head_dim(config), **new)
    return ids, ids, None, angles, angles, keys, values, length


def step(model: Any, shape: Shape, int8_products: bool = True) -> Call:
    read = plan.read(model, int8_products)
    assert isinstance(read, plan.Plan), read
    return partial(decode_, read.decoder, *operands(model, shape), logits_to_keep=1)


def decode(device: str, full: bool) -> list[OpCase]:
    def case(name: str, bits: int, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> OpCase:
        moved = nbytes(name, bits, shape, dtype)
        calls = {"torch_fused": step}
        if bits and device == "cpu":
            calls["torch_fused, products of floats"] = partial(step, int8_products=False)
        calls["a plain read"] = lambda model, shape: torch.ones(moved // 4, device=device).sum
        return OpCase(
            "decode" if name == smollm2 else f"decode, {name}", "{} x {} after {}".format(*shape),
            NAMES[dtype], f"{bits} bits" if bits else "", moved,
            lambda: (kept(name, dtype, device, bits), shape), calls, lambda make, *rest: make(*rest),
        )  # fmt: skip

    smollm2, qwen = "SmolLM2-135M", "Qwen2.5-0.5B"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    dense = [case(smollm2, 0, shape, dtype) for dtype in dtypes for shape in MANY]
    few = [(qwen, 0), *((name, bits) for name in (smollm2, qwen) for bits in (4, 8))]
    if device != "cpu":
        few += [("Qwen3-0.6B", 0), ("Llama-3.2-1B", 0), ("Llama-3.2-1B", 4)]
    return dense + [case(*model, shape) for model in few for shape in FEW]
