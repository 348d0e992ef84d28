"""The model of a decode step: its parts by name, and the object that the op takes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        windows: for each layer how many of the last cache slots a token attends to, its own included; 0 for all. None:
            0 for every layer.
        tables: for each layer the index of its table where ``cos`` and ``sin`` of :func:`decode_` are stacked tables;
            -1 for a layer without positions. None: 0 for every layer.
        int8_products: on the CPU, packed rows are multiplied as integers, with vectors rounded to int8, 8 values a
            scale, which is faster, except ``v`` and 8 bits in groups of 32. False: all as float32.
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
