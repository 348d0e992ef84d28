"""Decoders with random weights in the shapes of published ones, and a step of each as one op."""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import Case, listed
from timing import Call
from transformers import AutoConfig, AutoModelForCausalLM

from torch_fused.hf import plan, quantize_
from torch_fused.ops.decode import decode_
from torch_fused.testing import NAMES

GROUP_SIZE = 64  # of packed weights
MODELS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())


def config(name: str, **changes: int) -> Any:
    common = {"tie_word_embeddings": True, "max_position_embeddings": 65536}
    return AutoConfig.for_model(**common | MODELS[name] | changes)


def made(name: str, dtype: torch.dtype, device: str = "cpu", bits: int = 0, **changes: int) -> Any:
    """A model of these sizes; dense for 0 bits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, **changes)).to(dtype).eval()
    if bits:
        quantize_(model, bits=bits, group_size=GROUP_SIZE)
    return model


def adapted(model: Any, targets: str | list[str] = "all-linear", rank: int = 16, mixed: bool = False) -> Any:
    """With LoRA, by default on every matrix of the layers, in the model's dtype or, as PEFT has it, in float32."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return model if mixed else model.to(dtype)


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
    """Next to a plain read of the same bytes. Shapes are batch x new tokens after a context."""
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
