"""Cases of ops.py: a step of a decoder as one op, dense and packed, beside a plain read of the same bytes.

The bytes are the weights and the cache. Shapes are batch x new tokens after a context.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from ops import Case

from torch_fused.functional import quantize
from torch_fused.ops.decode import decode_, decode_token_
from torch_fused.ops.decoder import LAYER_PARTS, Packed, make_decoder

GROUP_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """Of a model with random weights; its head is its embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    biased: bool = False  # q, k and v

    @property
    def matrices(self) -> int:
        """Weights in matrices, each read once per step."""
        layer = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocabulary * self.hidden

    @property
    def vectors(self) -> int:
        """Weights in norms and biases."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim if self.biased else 0
        return self.layers * (2 * self.hidden + biases) + self.hidden


SMOLLM2 = Sizes("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152)
QWEN = Sizes("Qwen2.5-0.5B", 24, 896, 14, 2, 64, 4864, 151936, biased=True)
LLAMA = Sizes("Llama-3.2-1B", 16, 2048, 32, 8, 64, 8192, 128256)

Shape = tuple[int, int, int]
SHAPES = {
    SMOLLM2: [(1, 1, 128), (1, 1, 4096), (1, 1, 32768), (4, 1, 128), (8, 1, 128), (1, 8, 128)],
    QWEN: [(1, 1, 128), (1, 1, 4096), (8, 1, 128)],
}
FEW = [(1, 1, 128), (1, 1, 4096), (8, 1, 128)]  # with packed weights


@lru_cache(maxsize=1)
def decoder(sizes: Sizes, bits: int, device: str, dtype: torch.dtype, int8_products: bool = True):
    """A model with dense matrices for 0 bits; scales, biases and norms are `dtype`."""

    def vector(count: int) -> torch.Tensor:
        return (torch.randn(count, device=device) * count**-0.5).to(dtype)

    def matrix(rows: int, columns: int):
        dense = (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)
        return Packed(*quantize(dense, bits=bits, group_size=GROUP_SIZE)) if bits else dense

    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    parts: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,), "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden),
        "o": (hidden, queries), "post_attention_norm": (hidden,), "gate": (sizes.intermediate, hidden),
        "up": (sizes.intermediate, hidden), "down": (hidden, sizes.intermediate),
    }  # fmt: skip
    if sizes.biased:
        parts |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    layers: list[torch.Tensor | Packed | None] = []
    for name in LAYER_PARTS * sizes.layers:
        shape = parts.get(name, ())
        layers.append(matrix(*shape) if len(shape) == 2 else vector(*shape) if shape else None)
    embedding = matrix(sizes.vocabulary, hidden)
    options = {"heads": sizes.heads, "eps": 1e-5, "scaling": sizes.head_dim**-0.5, "int8_products": int8_products}
    return make_decoder(embedding, layers, vector(hidden), embedding, **options)


def nbytes(sizes: Sizes, bits: int, shape: Shape, dtype: torch.dtype) -> int:
    """Of the weights and the cache, the new tokens included, each once."""
    batch, steps, length = shape
    cache = 2 * sizes.layers * batch * sizes.kv_heads * (length + steps) * sizes.head_dim
    groups = 2 * sizes.matrices // GROUP_SIZE if bits else 0
    codes = sizes.matrices * bits // 8 if bits else sizes.matrices * dtype.itemsize
    return codes + (groups + sizes.vectors + cache) * dtype.itemsize


def operands(sizes: Sizes, shape: Shape, device: str, dtype: torch.dtype) -> tuple:
    """What a step takes besides the model."""
    batch, steps, length = shape
    states = (batch, sizes.kv_heads, length + steps, sizes.head_dim)
    keys, values = ([torch.randn(states, device=device).to(dtype) for _ in range(sizes.layers)] for _ in range(2))
    ids = torch.zeros(batch, steps, dtype=torch.long, device=device)
    angles = torch.rand(length + steps, sizes.head_dim, device=device).to(dtype)
    return ids, ids, None, angles, angles, keys, values, length


def step(
    sizes: Sizes, bits: int, shape: Shape, device: str, dtype: torch.dtype, int8_products: bool = True
) -> Callable[[], object]:
    model, rest = decoder(sizes, bits, device, dtype, int8_products), operands(sizes, shape, device, dtype)
    return lambda: decode_(model, *rest, logits_to_keep=1)


def step_of_floats(*arguments) -> Callable[[], object]:
    return step(*arguments, int8_products=False)


def greedy_token(sizes: Sizes, bits: int, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """A step and the most probable token."""
    model, rest = decoder(sizes, bits, device, dtype), operands(sizes, shape, device, dtype)
    return lambda: decode_token_(model, *rest)


def plain_read(sizes: Sizes, bits: int, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], object]:
    return torch.ones(nbytes(sizes, bits, shape, dtype) // 4, device=device).sum


def cases(device: str, full: bool) -> list[Case]:
    def case(sizes: Sizes, bits: int, shape: Shape, dtype: torch.dtype) -> Case:
        contenders = {"torch_fused": step}
        if bits and device == "cpu":
            contenders["torch_fused, products of floats"] = step_of_floats
        return Case(
            "decode" if sizes is SMOLLM2 else f"decode, {sizes.name}",
            "{} x {} after {}".format(*shape),
            dtype,
            nbytes(sizes, bits, shape, dtype),
            lambda device: (sizes, bits, shape, device, dtype),
            contenders | {"a plain read": plain_read},
            prepare=lambda make, *operands: make(*operands),
            kind=f"{bits} bits" if bits else "",
        )

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    dense = [case(SMOLLM2, 0, shape, dtype) for dtype in dtypes for shape in SHAPES[SMOLLM2]]
    dense += [case(QWEN, 0, shape, torch.bfloat16) for shape in SHAPES[QWEN]]
    packed = [case(sizes, bits, shape, torch.bfloat16) for sizes in SHAPES for bits in (4, 8) for shape in FEW]
    return dense + packed
