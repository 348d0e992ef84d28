"""`model.generate` with the fused cache, sampler and decode step, for a model that may or may not be patched."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .inputs import find_model, merge_inputs
from .loop import generate_by_loop
from .patch import PatchHandle, lock_of, prepare_cache_for_generation
from .transformers_private import PREPARE_CACHE


def generate(
    model, inputs: Tensor | Mapping[str, Tensor] | None = None, *, decode: bool = True, **generate_kwargs: Any
):
    """Calls ``model.generate`` with the fused sampler, and a :class:`FusedKVCache` instead of a ``DynamicCache``.

    In greedy decoding and sampling with a model of a supported family, each token after the prompt takes one op, which
    returns only the next token ids; see ``decode`` of :func:`apply_torch_fused`. A model patched by
    :func:`apply_torch_fused` stays patched, and several threads may call this at the same time. Any other model is
    unchanged when the call returns, and calls on it wait for each other.

    Args:
        model: a transformers model that can generate, or a pipeline with one.
        inputs: integer token ids ``(batch, tokens)``; or a mapping with ``input_ids``, such as a tokenizer's result; or
            None if ``generate_kwargs`` contain them: ``generate(model, **tokenizer("Hello", return_tensors="pt"))``.
        decode: False leaves the decode steps of an unpatched model to transformers.
        generate_kwargs: passed to ``model.generate``, including a streamer.

    Returns:
        The result of ``model.generate``.

    Raises:
        TypeError: ``model`` cannot generate, or ``inputs`` are not a tensor of integers or a mapping with one.
        ValueError: the token ids have another shape.

    Example:
        >>> tokens = generate(model, tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)
    """
    model = find_model("generate", model, can="generate")
    generate_kwargs = merge_inputs(inputs, generate_kwargs)
    with lock_of(model), PatchHandle(model) as handle:
        handle.bind_generation(PREPARE_CACHE, prepare_cache_for_generation)
        handle.bind_generation("generate", generate_by_loop)
        if decode:
            handle.bind_causal_lms()
            handle.bind_decoder()
        if handle.patched:
            return model.generate(**generate_kwargs)
    return model.generate(**generate_kwargs)  # a patched model serves several threads at a time
