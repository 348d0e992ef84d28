"""The model of a decode step: the names of its parts, and the object that the op takes."""

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
"""The parts of a layer, in the order of the op's flat list."""

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
"""The arguments of the decoder class, in order."""


class Adapter(NamedTuple):
    """A low-rank adapter (LoRA) of one matrix of a layer: adds ``scale * b @ (a @ x)`` to its product with ``x``."""

    place: int
    """Index of the matrix in the list of layers."""
    a: Tensor
    """``(rank, inputs)``, with a rank of at most 256."""
    b: Tensor
    """``(results, rank)``."""
    scale: float


class Numbers(NamedTuple):
    """A decoder's numeric settings, as in :func:`make_decoder`."""

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
    """A `torch.classes.torch_fused.Decoder` in Python, without checks: for the reference, and for torch.compile."""

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
    """A packed matrix, as returned by :func:`quantize`."""

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
    """Makes a Llama-like decoder for :func:`decode_`. Its tensors are checked once, here, and not copied.

    Layers have RMS norms, attention with rotary positions and grouped queries, and gated feed-forward layers, as in
    Llama, Qwen2 and Qwen3, with the variations of Mistral, Gemma, OLMo, Phi-3, Granite and SmolLM3 below. Each tensor
    may be float32, float16 or bfloat16; ``gate`` and ``up`` must have the same dtype. Any matrix may be packed instead,
    as ``Packed(weight, scales, biases)`` of 4 or 8 bits; ``gate`` and ``up`` must have the same format.

    Args:
        embedding: ``(vocabulary, hidden)``.
        layers: the tensors of all layers in one list, in the order of `LAYER_PARTS`. Matrices are ``(outputs, inputs)``
            with dense rows; biases and norms may be None. ``input_norm`` and ``post_attention_norm`` come before
            attention and the feed-forward layers; the output norms are applied to the outputs of these, before the
            residual addition. ``q_norm`` and ``k_norm`` have shape ``(head_dim,)`` to norm each head, or the size of
            all queries or keys to norm all heads together. In a mixture of experts, ``router`` is ``(experts, hidden)``
            and ``experts_gate``, ``experts_up`` and ``experts_down`` stack the experts' dense matrices; ``gate``,
            ``up`` and ``down`` are then the shared expert's, or None, and the output of the shared expert is multiplied
            by the sigmoid of its product with ``shared_gate``, ``(1, hidden)``, if that is not None. These are None in
            layers without experts.
        norm: ``(hidden,)``, the weight of the last norm.
        head: ``(vocabulary, hidden)``; may be the embedding.
        heads: number of query heads.
        eps: of all norms.
        scaling: multiplies the products of queries and keys.
        norm_offset: added to the weights of all norms; 1 for Gemma.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies the outputs of attention and the feed-forward layers before the residual addition.
        logits_scale: multiplies the logits.
        attention_softcap: if not 0, scores become ``cap * tanh(score / cap)``.
        logits_softcap: the same for the logits, after scaling.
        experts_per_token: number of experts per token, at most 32; the ones with the largest router logits.
        normalise_experts: whether to normalise the weights of these experts, a softmax over all experts, to sum to 1.
        activation: of the gate: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
        windows: per layer, the number of last cache slots that a token attends to, including its own; 0 for all. None:
            0 for every layer.
        tables: per layer, the index of its table if ``cos`` and ``sin`` of :func:`decode_` are stacked tables; -1 for a
            layer without rotary positions. None: 0 for every layer.
        int8_products: on the CPU, round activations to int8, with one scale per 8 values, and multiply packed rows as
            integers, which is faster; except for ``v``, and for 8 bits in groups of 32. False: multiply in float32.
        adapters: low-rank adapters of matrices; one matrix may have several.

    Returns:
        A ``torch.classes.torch_fused.Decoder``, which holds the tensors. In-place changes of their values take effect.
        If a tensor gets other memory or another shape, for example by ``parameter.data = tensor``, ``is_current()`` is
        False and :func:`decode_` raises.

    Raises:
        RuntimeError: a tensor has the wrong shape, dtype, device or layout; the message names it.
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
    """Converts the arguments of :func:`make_decoder` to those of the class, or of `DecoderParts`."""
    none = [0] * (len(layers) // len(LAYER_PARTS))
    groups: list[Tensor] = []

    def take(matrix: Matrix | None) -> Tensor | None:
        if not isinstance(matrix, Packed):
            return matrix
        groups.extend((matrix.scales, matrix.biases))
        return matrix.weight

    taken = [take(matrix) for matrix in (embedding, head, *layers)]  # the order in `groups`
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
