"""A step of a decoder as one op, dense and packed, next to a plain read of the same bytes: weights and cache.

Shapes are batch x new tokens after a context. Models have random weights, and their embedding as head.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any

import torch
from cases import Case, listed
from models import GROUP_SIZE, made
from timing import Call

from torch_fused.hf import plan
from torch_fused.ops.decode import decode_
from torch_fused.testing import NAMES

kept, shapes = lru_cache(maxsize=1)(made), cache(partial(made, device="meta"))


def nbytes(name: str, bits: int, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of the weights, each read once, and the cache, the new tokens included."""
    model, (batch, steps, length) = shapes(name, dtype), shape
    per_weight = bits / 8 + 2 * dtype.itemsize / GROUP_SIZE if bits else dtype.itemsize
    sizes = [w.numel() * (per_weight if w.dim() == 2 else dtype.itemsize) for w in model.parameters()]
    states = 2 * batch * model.config.num_key_value_heads * (length + steps) * model.config.head_dim
    return int(sum(sizes)) + model.config.num_hidden_layers * states * dtype.itemsize


def step(model: Any, shape: Sequence[int], int8_products: bool = True) -> Call:
    (batch, steps, length), config = shape, model.config
    read = plan.read(model, int8_products)
    assert isinstance(read, plan.Plan), read
    new = {"device": model.device, "dtype": model.dtype}
    states = batch, config.num_key_value_heads, length + steps, config.head_dim
    keys, values = ([torch.randn(states, **new) for _ in range(config.num_hidden_layers)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long, device=model.device)
    angles = torch.rand(length + steps, config.head_dim, **new)
    return partial(decode_, read.decoder, ids, ids, None, angles, angles, keys, values, length, logits_to_keep=1)


def decode_case(device: str, name: str, bits: int, shape: Sequence[int], dtype: torch.dtype) -> Case:
    moved = nbytes(name, bits, shape, dtype)
    calls = {"torch_fused": step, "a plain read": lambda *_: torch.ones(moved // 4, device=device).sum}
    if bits and device == "cpu":
        calls["torch_fused, products of floats"] = partial(step, int8_products=False)
    return Case(
        "decode" if name == "SmolLM2-135M" else f"decode, {name}", "{} x {} after {}".format(*shape),
        NAMES[dtype], f"{bits} bits" if bits else "", calls,
        lambda: (kept(name, dtype, device, bits), shape), lambda make, *operands: make(*operands), moved,
    )  # fmt: skip


def decode(device: str) -> Iterator[Case]:
    for each in listed("decode", device):
        for bits, dtype, shape in product(each["bits"], each["dtypes"], each["shapes"]):
            yield decode_case(device, each["model"], bits, shape, getattr(torch, dtype))
