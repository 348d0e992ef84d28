"""One step of a whole decoder, from token ids to logits, as one op."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import kv_append_reference
from .library import COMPOSED, refuse_vmap, register
from .quantized import dequantize_reference
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
    "attention_output_norm",
    "post_attention_norm",
    "gate",
    "up",
    "down",
    "feed_forward_output_norm",
    "router",
    "experts_gate",
    "experts_up",
    "experts_down",
    "shared_gate",
)
"""What a layer has, in the order of the op's flat list of all layers."""

DECODER_PARTS = (
    "embedding",
    "layers",
    "norm",
    "head",
    "groups",
    "heads",
    "numbers",
    "activation",
    "windows",
    "tables",
    "int8_products",
    "adapters",
    "adapter_places",
    "adapter_scales",
)
"""What the class of a decoder takes, in its order."""

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Adapter(NamedTuple):
    """A low-rank adapter (LoRA) of one matrix of a layer: adds ``scale * b @ (a @ x)`` to its product with ``x``."""

    place: int
    """Of the matrix in the list of layers."""
    a: Tensor
    """``(rank, inputs)``, with a rank of at most 256."""
    b: Tensor
    """``(results, rank)``."""
    scale: float


class Numbers(NamedTuple):
    """A decoder's numbers, as :func:`make_decoder` takes them."""

    eps: float
    scaling: float
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    experts_per_token: float = 0
    normalise_experts: float = False


@torch._library.register_fake_class("torch_fused::Decoder")
class DecoderParts:
    """A `torch.classes.torch_fused.Decoder` in Python, unchecked: for the reference, and for torch.compile to trace."""

    def __init__(self, *parts):
        for name, part in zip(DECODER_PARTS, parts, strict=True):
            setattr(self, name, part)

    @classmethod
    def __obj_unflatten__(cls, flat):
        return cls(*(part for _, part in flat))

    def arguments(self):
        return tuple(getattr(self, name) for name in DECODER_PARTS)

    def is_current(self):
        return True


class Packed(NamedTuple):
    """A packed matrix, as :func:`quantize` returns it."""

    weight: Tensor
    scales: Tensor
    biases: Tensor


Matrix = Tensor | Packed


def make_decoder(
    embedding: Matrix,
    layers: Sequence[Matrix | None],
    norm: Tensor,
    head: Matrix,
    *,
    heads: int,
    eps: float,
    scaling: float,
    norm_offset: float = 0.0,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logits_scale: float = 1.0,
    attention_softcap: float = 0.0,
    logits_softcap: float = 0.0,
    experts_per_token: int = 0,
    normalise_experts: bool = False,
    activation: str = "silu",
    windows: Sequence[int] | None = None,
    tables: Sequence[int] | None = None,
    int8_products: bool = True,
    adapters: Sequence[Adapter] = (),
) -> Any:
    """A Llama-like decoder as :func:`decode_` takes it: checked here, once, and read where it is from then on.

    Layers have RMS norms, attention with rotary positions and grouped queries, and gated feed-forward layers, as those
    of Llama, Qwen2 and Qwen3, or with the variations of Mistral, Gemma, OLMo, Phi-3, Granite and SmolLM3 below. Each
    tensor may have a dtype of its own, float32, float16 or bfloat16; those of ``gate`` and ``up`` are the same. Any
    matrix may be packed instead, a ``Packed(weight, scales, biases)`` of 4 or 8 bits; ``gate`` and ``up`` alike.

    Args:
        embedding: ``(vocabulary, hidden)``.
        layers: for each layer the tensors named by `LAYER_PARTS`, one after the other in one list: matrices are
            ``(results, inputs)`` with dense rows; the biases and the norms may be None. ``input_norm`` and
            ``post_attention_norm`` come before attention and the feed-forward layers, the output norms are of what
            these give, before it is added; ``q_norm`` and ``k_norm`` are ``(head_dim,)``, for each head, or as long as
            all of the queries or keys, for all heads as one. In a mixture of experts ``router`` is
            ``(experts, hidden)``, and the dense ``experts_gate``, ``experts_up`` and ``experts_down`` have each
            expert's matrix; ``gate``, ``up`` and ``down`` are then those of an expert that all tokens share, or None,
            and ``shared_gate`` is ``(1, hidden)``, whose product's sigmoid multiplies what the shared expert gives, or
            None. Layers without experts have None there.
        norm: ``(hidden,)``, the last norm's weight.
        head: ``(vocabulary, hidden)``; may be the embedding itself.
        heads: query heads.
        eps: of all norms.
        scaling: of the products of queries and keys.
        norm_offset: added to all weights of norms: 1 for Gemma.
        embedding_scale: multiplies what the embedding gives.
        residual_scale: multiplies what attention and the feed-forward layers add.
        logits_scale: multiplies the logits.
        attention_softcap: where not 0, scores become ``cap * tanh(score / cap)``.
        logits_softcap: the same of the logits, after their scale.
        experts_per_token: how many experts a token takes, those of the largest logits; at most 32.
        normalise_experts: whether their weights, which are the softmax over all experts, are made to sum to 1.
        activation: of the gate: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        windows: for each layer how many of the last cache slots a token attends, its own included; 0 for all. None:
            0 for every layer.
        tables: for each layer the index of its table where ``cos`` and ``sin`` of :func:`decode_` are stacked tables;
            -1 for a layer without positions. None: 0 for every layer.
        int8_products: on the CPU, packed rows are multiplied as integers, with vectors rounded to int8 a block of 32,
            which is faster, but for ``v`` and for 8 bits in groups of 32. False: all as float32.
        adapters: low-rank adapters of matrices of layers, several of one matrix if wanted.

    Returns:
        A ``torch.classes.torch_fused.Decoder``. It holds the tensors; values changed in place are seen. When a tensor
        is given other memory or another shape, as by ``parameter.data = tensor``, its ``is_current()`` is False, and
        :func:`decode_` raises.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype, device or layout; the message names it.
    """
    arguments = decoder_arguments(
        embedding,
        layers,
        norm,
        head,
        heads=heads,
        activation=activation,
        windows=windows,
        tables=tables,
        int8_products=int8_products,
        adapters=adapters,
        eps=eps,
        scaling=scaling,
        norm_offset=norm_offset,
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        logits_scale=logits_scale,
        attention_softcap=attention_softcap,
        logits_softcap=logits_softcap,
        experts_per_token=experts_per_token,
        normalise_experts=normalise_experts,
    )
    return torch.classes.torch_fused.Decoder(*arguments)


def decoder_arguments(
    embedding: Matrix,
    layers: Sequence[Matrix | None],
    norm: Tensor,
    head: Matrix,
    *,
    heads: int,
    activation: str = "silu",
    windows: Sequence[int] | None = None,
    tables: Sequence[int] | None = None,
    int8_products: bool = True,
    adapters: Sequence[Adapter] = (),
    **numbers: float,
) -> tuple:
    """What :func:`make_decoder` takes as the arguments of the class, or of `DecoderParts`."""
    none = [0] * (len(layers) // len(LAYER_PARTS))
    groups: list[Tensor] = []

    def take(matrix: Matrix | None) -> Tensor | None:
        if not isinstance(matrix, Packed):
            return matrix
        groups.extend((matrix.scales, matrix.biases))
        return matrix.weight

    taken = [take(matrix) for matrix in (embedding, head, *layers)]  # the order of their groups
    return (
        taken[0],
        taken[2:],
        norm,
        taken[1],
        groups,
        heads,
        [float(number) for number in Numbers(**numbers)],
        activation,
        list(none if windows is None else windows),
        list(none if tables is None else tables),
        int8_products,
        [matrix for adapter in adapters for matrix in (adapter.a, adapter.b)],
        [adapter.place for adapter in adapters],
        [float(adapter.scale) for adapter in adapters],
    )


def _unpack(parts: Sequence[Tensor | None], norm: Tensor, groups: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The embedding, the head and the parts of layers, the packed ones in the norm's dtype."""
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
        """Queries or keys as heads, normed and rotated."""
        of_each = weight is not None and len(weight) == head_dim
        x = normed(x, None if of_each else weight).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        x = normed(x, weight if of_each else None)
        if table < 0:
            return x
        return _rotate(x, *(angles[table][positions][:, None].to(x) for angles in (cos, sin)))

    for i, (keys_buffer, values_buffer, window, table) in enumerate(zip(keys, values, windows, tables, strict=True)):
        first = i * len(LAYER_PARTS)
        visible = causal & (slots > newest - window) if window else causal
        own = [t if t is None else t.to(states) for t in layers[first : first + len(LAYER_PARTS)]]
        part: dict[str, Any] = dict(zip(LAYER_PARTS, own, strict=True))
        x = normed(states, part["input_norm"])
        q, k, v = (F.linear(x, part[name], part[f"{name}_bias"]) for name in "qkv")
        head_dim = q.shape[-1] // heads
        q, k = placed(q, part["q_norm"], table), placed(k, part["k_norm"], table)
        v = v.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        kv_append_reference(keys_buffer, values_buffer, k.to(keys_buffer), v.to(values_buffer), length)
        k, v = (
            t[:, :, : length + steps].to(states).repeat_interleave(heads // t.shape[1], 1)
            for t in (keys_buffer, values_buffer)
        )
        # Slots that are not attended may hold anything.
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


def _decode_fake(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep):
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
) -> Tensor:
    """Runs new tokens through a whole decoder and appends their keys and values to the cache.

    Everything between the weights is float32; only the keys and values are rounded, to the cache's dtype. On a GPU it
    takes five launches a layer, one more for each output norm and each norm of all heads, and two more; the host reads
    nothing of the device.

    Args:
        model: what :func:`make_decoder` made.
        token_ids: ``(batch, steps)`` int64, 1 to 8 sequences of 1 to 8 new tokens each.
        positions: ``(batch, steps)`` int64, each token's row of ``cos`` and ``sin``.
        starts: ``(batch,)`` int64, the first cache slot that each sequence attends; None for 0: no left padding.
        cos: ``(positions, rotary_dim)``, contiguous, both halves as transformers' rotary embedding makes them;
            dimensions of a head past ``rotary_dim`` pass through. ``(tables, positions, rotary_dim)`` if layers have
            tables of their own.
        sin: as ``cos``.
        keys: a tensor ``(batch, kv_heads, capacity, head_dim)`` for each layer, written in place at slots
            ``length : length + steps``; any strides with a dense last dimension; float32, float16 or bfloat16. No
            element may be one of another tensor here, of another layer's neither.
        values: as ``keys``.
        length: slots of the cache that are in use.
        logits_to_keep: how many last tokens of each sequence get logits; 0 for all.

    Returns:
        Logits ``(batch, logits_to_keep or steps, vocabulary)``, float32.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype, device or layout, the cache has no room, or a gradient would
            be lost; the message names it. Nothing is written then.
        IndexError: on the CPU, a token id, a position or a start is out of range. On a GPU these are not looked at: an
            id that is not in the vocabulary gives NaN, a position or a start is taken as the nearest in range.
    """
    return _decode(model, token_ids, positions, starts, cos, sin, keys, values, length, logits_to_keep)


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
) -> Tensor:
    """:func:`decode_`, then the next token of each sequence, as ``next_token`` of `torch_fused.ops.sampling`.

    Args:
        model, token_ids, positions, starts, cos, sin, keys, values, length: as in :func:`decode_`.
        do_sample: draw with torch's default generator; otherwise take the most probable token.
        temperature, top_k, top_p, min_p: as in :func:`torch_fused.sampling.sample`; only for ``do_sample``.

    Returns:
        Token ids ``(batch,)``, int64.

    Raises:
        As :func:`decode_` and ``next_token``. Only logits that have nothing to draw, or are NaN, are found after the
            step, when the new keys and values have been written behind ``length``.
    """
    return _decode_token(
        model, token_ids, positions, starts, cos, sin, keys, values, length, do_sample, temperature, top_k, top_p, min_p
    )


_decode_token = torch.ops.torch_fused.decode_token_.default
