"""One step of a whole decoder, from token ids to logits, as one op on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import kv_append_reference
from .library import COMPOSED, refuse_vmap, register
from .rms_norm import rms_norm_reference

LAYER_PARTS = (
    "input_norm",
    "q",
    "q_bias",
    "k",
    "k_bias",
    "v",
    "v_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "post_attention_norm",
    "gate",
    "up",
    "down",
)
"""What a layer has, in the order of the op's flat list of all layers."""


def decode_reference(
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    embedding: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Sequence[Tensor | None],
    norm: Tensor,
    head: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    heads: int,
    eps: float,
    scaling: float,
    logits_to_keep: int,
) -> Tensor:
    """`decode_` in plain torch, in the tensors' dtype, without its checks."""
    batch, steps = token_ids.shape
    slots = torch.arange(length + steps)
    visible = slots <= length + torch.arange(steps)[:, None]
    if starts is not None:
        visible = visible & (slots >= starts[:, None, None])
    visible = visible.expand(batch, steps, length + steps)[:, None]
    cos, sin = cos[positions][:, None], sin[positions][:, None]
    states = F.embedding(token_ids, embedding)
    for keys_buffer, values_buffer, first in zip(keys, values, range(0, len(layers), len(LAYER_PARTS)), strict=True):
        part: dict[str, Any] = dict(zip(LAYER_PARTS, layers[first : first + len(LAYER_PARTS)], strict=True))
        x = rms_norm_reference(states, states.shape[-1:], part["input_norm"], eps)
        q, k, v = (F.linear(x, part[name], part[f"{name}_bias"]) for name in "qkv")
        q, k, v = (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
        if part["q_norm"] is not None:
            q = rms_norm_reference(q, q.shape[-1:], part["q_norm"], eps)
        if part["k_norm"] is not None:
            k = rms_norm_reference(k, k.shape[-1:], part["k_norm"], eps)
        kv_append_reference(keys_buffer, values_buffer, _rotate(k, cos, sin), v, length)
        k, v = (
            t[:, :, : length + steps].repeat_interleave(heads // t.shape[1], 1) for t in (keys_buffer, values_buffer)
        )
        # Slots that are not attended may hold anything.
        k, v = (t.masked_fill(~visible.any(2).transpose(1, 2)[:, None, :, 0, None], 0) for t in (k, v))
        x = F.scaled_dot_product_attention(_rotate(q, cos, sin), k, v, visible, scale=scaling)
        states = states + F.linear(x.transpose(1, 2).flatten(2), part["o"], part["o_bias"])
        x = rms_norm_reference(states, states.shape[-1:], part["post_attention_norm"], eps)
        states = states + F.linear(F.silu(F.linear(x, part["gate"])) * F.linear(x, part["up"]), part["down"])
    states = rms_norm_reference(states[:, -logits_to_keep:], states.shape[-1:], norm, eps)
    return F.linear(states, head).to(torch.promote_types(torch.float32, states.dtype))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, passed], -1)


def _decode_fake(
    token_ids,
    positions,
    starts,
    embedding,
    cos,
    sin,
    layers,
    norm,
    head,
    keys,
    values,
    length,
    heads,
    eps,
    scaling,
    logits_to_keep,
):
    kept = logits_to_keep or token_ids.shape[1]
    return embedding.new_empty(token_ids.shape[0], kept, head.shape[0], dtype=torch.float32)


register("decode_", reference=decode_reference, fake=_decode_fake)
COMPOSED["decode_token_"] = ("decode_", "greedy", "sample")
refuse_vmap("decode_token_")


def decode_(
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    embedding: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Sequence[Tensor | None],
    norm: Tensor,
    head: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    *,
    heads: int,
    eps: float,
    scaling: float,
    logits_to_keep: int = 0,
) -> Tensor:
    """Runs new tokens through a whole Llama-like decoder and appends their keys and values to the cache.

    The decoder is Llama's, Qwen2's or Qwen3's: RMS norm, attention with rotary positions and grouped queries, SwiGLU.
    All weights have one dtype, float32, float16 or bfloat16, and are read where they are; everything between them is
    float32, only the keys and values are rounded to the cache's dtype, the weights' own. On the CPU only.

    Args:
        token_ids: ``(batch, steps)`` int64, 1 to 8 sequences of 1 to 8 new tokens each.
        positions: ``(batch, steps)`` int64, each token's row of ``cos`` and ``sin``.
        starts: ``(batch,)`` int64, the first cache slot that each sequence attends; None for 0: no left padding.
        embedding: ``(vocabulary, hidden)``.
        cos: ``(positions, rotary_dim)``, contiguous, both halves as transformers' rotary embedding makes them;
            dimensions of a head past ``rotary_dim`` pass through.
        sin: as ``cos``.
        layers: for each layer the tensors named by `LAYER_PARTS`, one after the other in one list: matrices are
            ``(results, inputs)`` with dense rows, the biases and the norms of queries and keys may be None.
        norm: ``(hidden,)``, the last norm's weight.
        head: ``(vocabulary, hidden)``; may be the embedding itself.
        keys: a tensor ``(batch, kv_heads, capacity, head_dim)`` for each layer, written in place at slots
            ``length : length + steps``; any strides with a dense last dimension. No element may be one of another
            tensor here, of another layer's neither.
        values: as ``keys``.
        length: slots of the cache that are in use.
        heads: query heads.
        eps: of all norms.
        scaling: of the products of queries and keys.
        logits_to_keep: how many last tokens of each sequence get logits; 0 for all.

    Returns:
        Logits ``(batch, logits_to_keep or steps, vocabulary)``, float32.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout, the cache has no room, or a gradient would
            be lost; the message names it. Nothing is written then.
        IndexError: a token id, a position or a start is out of range.
    """
    return _decode(
        token_ids,
        positions,
        starts,
        embedding,
        cos,
        sin,
        layers,
        norm,
        head,
        keys,
        values,
        length,
        heads,
        eps,
        scaling,
        logits_to_keep,
    )


_decode = torch.ops.torch_fused.decode_.default


def decode_token_(
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    embedding: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Sequence[Tensor | None],
    norm: Tensor,
    head: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    *,
    heads: int,
    eps: float,
    scaling: float,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """:func:`decode_`, then the next token of each sequence, as ``next_token`` of `torch_fused.ops.sampling`.

    Args:
        token_ids, positions, starts, embedding, cos, sin, layers, norm, head, keys, values, length, heads, eps,
            scaling: as in :func:`decode_`.
        do_sample: draw with torch's default CPU generator; otherwise take the most probable token.
        temperature, top_k, top_p, min_p: as in :func:`torch_fused.sampling.sample`; only for ``do_sample``.

    Returns:
        Token ids ``(batch,)``, int64.

    Raises:
        As :func:`decode_` and ``next_token``. Only logits that have nothing to draw, or are NaN, are found after the
            step, when the new keys and values have been written behind ``length``.
    """
    return _decode_token(
        token_ids,
        positions,
        starts,
        embedding,
        cos,
        sin,
        layers,
        norm,
        head,
        keys,
        values,
        length,
        heads,
        eps,
        scaling,
        do_sample,
        temperature,
        top_k,
        top_p,
        min_p,
    )


_decode_token = torch.ops.torch_fused.decode_token_.default
