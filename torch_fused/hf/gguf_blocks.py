"""Splits the block formats of GGUF files into codes, scales and biases of groups of 32.

Source: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py, whose results are the reference.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import Q4_K
from torch import Tensor

from ..functional import dequantize, quantize

GROUP_SIZE = 32
K_TYPES = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
"""Types with scales that are products and do not fit float16 exactly."""
_BLOCK = 1 << 21  # bytes of a file converted at once; the temporary tensors are several times larger
BLOCK_BYTES = {
    Type.Q4_0: 18,
    Type.Q4_1: 20,
    Type.Q5_0: 22,
    Type.Q5_1: 24,
    Type.Q8_0: 34,
    Type.Q4_K: 144,
    Type.Q5_K: 176,
    Type.Q6_K: 210,
}


class Groups(NamedTuple):
    """A matrix as ``scale * code + bias``: codes ``(rows, blocks, ..., 32)``; scales and biases lack the last dim."""

    bits: int
    codes: Tensor
    scales: Tensor
    biases: Tensor


class Packed(NamedTuple):
    """A matrix in our layout. `error`: root mean square of the error divided by that of the matrix; 0 is exact."""

    bits: int
    weight: Tensor
    scales: Tensor
    biases: Tensor
    error: float

    def unpack(self) -> Tensor:
        """In float32."""
        return dequantize(*self[1:4], bits=self.bits, group_size=GROUP_SIZE, dtype=torch.float32)


def pack(data: Tensor, kind: Any, scales_dtype: torch.dtype) -> Packed:
    """Packs a tensor of a file, ``(rows, bytes)``. Scales that are too large for their dtype become infinite."""
    parts = [_pack_rows(rows, kind, scales_dtype) for rows in data.split(max(1, _BLOCK // data.shape[1]))]
    weight = torch.cat([packed.weight.view(torch.int32) for packed, _ in parts]).view(torch.uint32)
    scales = torch.cat([packed.scales for packed, _ in parts])
    biases = torch.cat([packed.biases for packed, _ in parts])
    wrong = sum((packed.error * size) ** 2 for packed, size in parts)
    whole = sum(size**2 for _, size in parts)
    return Packed(parts[0][0].bits, weight, scales, biases, (wrong / max(whole, 1e-30)) ** 0.5)


def _pack_rows(data: Tensor, kind: Any, scales_dtype: torch.dtype) -> tuple[Packed, float]:
    """Some rows, and their norm if they are not exact."""
    blocks = data.unflatten(-1, (-1, BLOCK_BYTES[kind]))
    if kind == Type.Q6_K:
        exact = _q6_k(blocks)
        anew = quantize(exact.to(scales_dtype), bits=8, group_size=GROUP_SIZE)
        return _with_error(Packed(8, *anew, 0.0), exact)
    bits, codes, *affine = GROUPS[kind](blocks)
    codes = codes.reshape(len(data), -1)
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    weight = codes.contiguous().view(torch.int32).view(torch.uint32)
    scales, biases = (t.reshape(len(data), -1) for t in affine)
    packed = Packed(bits, weight, scales.to(scales_dtype), biases.to(scales_dtype), 0.0)
    if kind not in K_TYPES:
        return packed, 0.0
    return _with_error(packed, packed._replace(scales=scales, biases=biases).unpack())


def _with_error(packed: Packed, exact: Tensor) -> tuple[Packed, float]:
    size = float(exact.norm())
    return packed._replace(error=float((packed.unpack() - exact).norm()) / max(size, 1e-30)), size


# ---- groups: each takes blocks ``(rows, blocks, bytes)`` of its format -----------------------------------------------


def _half(data: Tensor) -> Tensor:
    """The float16 in the last two bytes, in float32."""
    return data.contiguous().view(torch.float16)[..., 0].float()


def _nibbles(data: Tensor) -> Tensor:
    """The low halves of all bytes, then the high ones."""
    return torch.cat([data & 15, data >> 4], -1)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits as the fifth bit of one code each."""
    bits = data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q4_0(blocks: Tensor) -> Groups:
    scales = _half(blocks[..., :2])
    return Groups(4, _nibbles(blocks[..., 2:]), scales, -8 * scales)


def _q4_1(blocks: Tensor) -> Groups:
    return Groups(4, _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q5_0(blocks: Tensor) -> Groups:
    scales = _half(blocks[..., :2])
    return Groups(8, _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), scales, -16 * scales)


def _q5_1(blocks: Tensor) -> Groups:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8])
    return Groups(8, codes, _half(blocks[..., :2]), _half(blocks[..., 2:4]))


def _q8_0(blocks: Tensor) -> Groups:
    scales = _half(blocks[..., :2])
    return Groups(8, blocks[..., 2:] ^ 128, scales, -128 * scales)  # from signed


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and biases of the eight groups of a block of Q4_K or Q5_K, of 6 bits each."""
    packed = blocks[..., 4:16].reshape(-1, 12).numpy()
    scales, minima = (torch.from_numpy(t).view(*blocks.shape[:-1], 8).float() for t in Q4_K.get_scale_min(packed))
    return _half(blocks[..., :2])[..., None] * scales, -(_half(blocks[..., 2:4])[..., None] * minima)


def _q4_k(blocks: Tensor) -> Groups:
    return Groups(4, _nibbles(blocks[..., 16:].unflatten(-1, (4, 32))), *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Groups:
    fifth = blocks[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    codes = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)
    return Groups(8, codes | fifth << 4, *_k_scales(blocks))


GROUPS: dict[Any, Callable[[Tensor], Groups]] = {
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q5_1: _q5_1,
    Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
}


def _q6_k(blocks: Tensor) -> Tensor:
    """The whole matrix in float32, because our layout has no groups of 16."""
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low = torch.cat([low & 15, low >> 4], -1)  # (..., 2, 128)
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3
    codes = (low | high.flatten(-2) << 4).flatten(-2).float() - 32
    scales = _half(blocks[..., 208:])[..., None] * blocks[..., 192:208].view(torch.int8).float()
    return (codes.unflatten(-1, (16, 16)) * scales[..., None]).flatten(1)
