"""One step of a whole decoder, from token ids to logits, as one op."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoder import LAYER_PARTS, Numbers
from .kv_cache import kv_append_reference
from .library import COMPOSED, refuse_vmap, register
from .quantized import dequantize_reference
from .rms_norm import rms_norm_reference

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def _unpack(parts: Sequence[Tensor | None], norm: Tensor, groups: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The embedding, the head and the parts of layers; packed ones are unpacked to the norm's dtype."""
    rest = iter(groups)
    names = ("embedding", "head", *LAYER_PARTS * (len(parts) // len(LAYER_PARTS)))
    columns = {name: len(norm) for name in names}
    for name, part in zip(names, parts, strict=True):
        if part is not None and name in ("q", "gate"):
            columns["o" if name == "q" else "down"] = len(part)
        if part is None or part.dtype != torch.uint32:
            yield part
            continue
        scales, biases = next(rest), next(rest)
        size = {"bits": part.shape[1] * 32 // columns[name], "group_size": columns[name] // scales.shape[1]}
        yield dequantize_reference(part, scales, biases, dtype=norm.dtype, **size)


def decode_reference(
    model: Any,
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    logits_to_keep: int,
    dropped: Sequence[int] = (),
) -> Tensor:
    """`decode_` in plain torch, in the embedding's dtype, without its checks."""
    embedding, layers, norm, head, groups, heads, numbers, activation, windows, tables, _, *adapters = model.arguments()
    n = Numbers(*numbers)
    if groups:
        embedding, head, *layers = _unpack((embedding, head, *layers), norm, groups)
    layers = list(layers)
    for i, (place, scale) in enumerate(zip(*adapters[1:], strict=True)):
        a, b = (matrix.to(embedding) for matrix in adapters[0][2 * i : 2 * i + 2])
        layers[place] = layers[place].to(embedding) + scale * (b @ a)
    batch, steps = token_ids.shape
    slots = torch.arange(length + steps, device=token_ids.device)
    newest = length + torch.arange(steps, device=token_ids.device)[:, None]
    causal = slots <= newest
    if starts is not None:
        causal = causal & (slots >= starts[:, None, None])
    causal = causal.expand(batch, steps, length + steps)[:, None]
    states = F.embedding(token_ids, embedding) * n.embedding_scale
    cos, sin = (table if table.dim() == 3 else table[None] for table in (cos, sin))

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else rms_norm_reference(x, x.shape[-1:], weight.to(x) + n.norm_offset, n.eps)

    def placed(x: Tensor, weight: Tensor | None, table: int) -> Tensor:
        """Queries or keys, split into heads, normed and rotated."""
        of_each = weight is not None and len(weight) == head_dim
        x = normed(x, None if of_each else weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        x = normed(x, weight if of_each else None)
        if table < 0:
            return x
        return _rotate(x, *(angles[table][positions][:, None].to(x) for angles in (cos, sin)))

    for i, (keys_buffer, values_buffer, window, table) in enumerate(zip(keys, values, windows, tables, strict=True)):
        first = i * len(LAYER_PARTS)
        gone = dropped[i] if dropped else 0
        visible = (causal & (slots > newest - window) if window else causal)[..., gone:]
        own = [t if t is None else t.to(states) for t in layers[first : first + len(LAYER_PARTS)]]
        part: dict[str, Any] = dict(zip(LAYER_PARTS, own, strict=True))
        x = normed(states, part["input_norm"])
        q, k, v = (F.linear(x, part[name], part[f"{name}_bias"]) for name in "qkv")
        head_dim = q.shape[-1] // heads
        q, k = placed(q, part["q_norm"], table), placed(k, part["k_norm"], table)
        v = v.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        kv_append_reference(keys_buffer, values_buffer, k.to(keys_buffer), v.to(values_buffer), length - gone)
        k, v = (
            t[:, :, : length + steps - gone].to(states).repeat_interleave(heads // t.shape[1], 1)
            for t in (keys_buffer, values_buffer)
        )
        # Masked slots may hold NaN.
        k, v = (t.masked_fill(~visible.any(2).transpose(1, 2)[:, None, :, 0, None], 0) for t in (k, v))
        scores = _capped(q @ k.transpose(-1, -2) * n.scaling, n.attention_softcap).masked_fill(~visible, -torch.inf)
        x = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), part["o"], part["o_bias"])
        states = states + normed(x, part["attention_output_norm"]) * n.residual_scale
        x = normed(states, part["post_attention_norm"])
        x = _feed_forward(x, part, ACTIVATIONS[activation], n)
        states = states + normed(x, part["feed_forward_output_norm"]) * n.residual_scale
    logits = F.linear(normed(states[:, -logits_to_keep:], norm), head.to(states)) * n.logits_scale
    return _capped(logits, n.logits_softcap).to(torch.promote_types(torch.float32, states.dtype))


def _feed_forward(x: Tensor, part: dict[str, Any], activation: Any, n: Numbers) -> Tensor:
    result = torch.zeros_like(x)
    if part["gate"] is not None:
        result = F.linear(activation(F.linear(x, part["gate"])) * F.linear(x, part["up"]), part["down"])
    if part["router"] is None:
        return result
    if part["shared_gate"] is not None:
        result = result * F.linear(x, part["shared_gate"]).sigmoid()
    probabilities, chosen = F.linear(x, part["router"]).softmax(-1).topk(int(n.experts_per_token))
    if n.normalise_experts:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    gate, up, down = (part[f"experts_{name}"][chosen] for name in ("gate", "up", "down"))
    outputs = down @ (activation(gate @ x[..., None, :, None]) * (up @ x[..., None, :, None]))
    return result + (outputs.squeeze(-1) * probabilities[..., None]).sum(-2)


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap) if cap else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    return torch.cat([rotated * cos + torch.cat([-second, first], -1) * sin, passed], -1)


def _decode_fake(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep, dropped=()):
    vocabulary = model.arguments()[3].shape[0]
    kept = logits_to_keep or token_ids.shape[1]
    return cos.new_empty(token_ids.shape[0], kept, vocabulary, dtype=torch.float32)


register("decode_", reference=decode_reference, fake=_decode_fake)
COMPOSED["decode_token_"] = ("decode_", "greedy", "sample")
refuse_vmap("decode_token_")


def decode_(
    model: Any,
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    *,
    logits_to_keep: int = 0,
    dropped: Sequence[int] = (),
) -> Tensor:
    """Runs new tokens through a whole decoder and appends their keys and values to the cache.

    Activations are float32; only keys and values are rounded, to the cache's dtype. On a GPU the op takes five launches
    per layer, one more for each output norm and for each norm over all heads, and two per call for the embedding and
    the head. The host reads nothing from the device.

    Args:
        model: the decoder that :func:`make_decoder` returned.
        token_ids: ``(batch, steps)`` int64, 1 to 8 sequences of 1 to 8 new tokens each.
        positions: ``(batch, steps)`` int64, each token's row in ``cos`` and ``sin``.
        starts: ``(batch,)`` int64, the first cache slot that each sequence attends to; None for no left padding.
        cos: ``(positions, rotary_dim)``, contiguous, with both halves as in transformers' rotary embedding. Dimensions
            of a head from ``rotary_dim`` on are not rotated. ``(tables, positions, rotary_dim)`` if layers use
            different tables.
        sin: like ``cos``.
        keys: a tensor ``(batch, kv_heads, capacity, head_dim)`` per layer, written in place at slots
            ``length : length + steps``; any strides with a dense last dimension; float32, float16 or bfloat16. The
            tensors of all layers must not overlap with each other or with other arguments.
        values: like ``keys``.
        length: number of cache slots in use.
        logits_to_keep: compute logits only for this many last tokens of each sequence; 0 for all.
        dropped: per layer, the number of first slots that its buffers no longer hold; ``length`` includes them. A layer
            with a window may drop slots that its next token does not attend to; other layers may not. Empty: none.

    Returns:
        Logits ``(batch, logits_to_keep or steps, vocabulary)``, float32.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, the cache is full, or an argument
            requires a gradient; the message names it. Nothing is written then.
        IndexError: on the CPU, a token id, position or start is out of range. On a GPU they are not checked: a token id
            outside the vocabulary gives NaN, and positions and starts are clamped to their range.
    """
    return _call(_decode, model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep, dropped)


_decode = torch.ops.torch_fused.decode_.default


def decode_token_(
    model: Any,
    token_ids: Tensor,
    positions: Tensor,
    starts: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    length: int,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    dropped: Sequence[int] = (),
) -> Tensor:
    """:func:`decode_`, then ``next_token`` of `torch_fused.ops.sampling` for each sequence.

    Args:
        model, token_ids, positions, starts, cos, sin, keys, values, length, dropped: as in :func:`decode_`.
        do_sample: draw with torch's default generator; otherwise take the most likely token.
        temperature, top_k, top_p, min_p: as in :func:`torch_fused.sampling.sample`; used only with ``do_sample``.

    Returns:
        Token ids ``(batch,)``, int64.

    Raises:
        The same errors as :func:`decode_` and ``next_token``. If logits are NaN or have nothing to draw, the new keys
            and values have already been written after ``length``.
    """
    return _call(
        _decode_token,
        model,
        token_ids,
        positions,
        starts,
        cos,
        sin,
        keys,
        values,
        length,
        do_sample,
        temperature,
        top_k,
        top_p,
        min_p,
        dropped,
    )


_decode_token = torch.ops.torch_fused.decode_token_.default


def _call(op: Any, model: Any, *args: Any) -> Tensor:
    # Torch looks for a fake decoder in all arguments and lists of arguments. That takes as long as several launches.
    is_real = not torch.compiler.is_compiling() and isinstance(model, torch.ScriptObject)
    return (op._op if is_real else op)(model, *args)
