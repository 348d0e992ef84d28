"""`model.generate` with the fused cache, sampler and decoder, for a model that need not be patched."""

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
    """Calls ``model.generate`` with the fused sampler, and a :class:`FusedKVCache` in place of a ``DynamicCache``.

    The tokens of a greedy or sampled generation with a model of a known family, after those of the prompt, take one op
    each, which returns nothing but the next token ids; see ``decode`` of :func:`apply_torch_fused`. A model
    patched by :func:`apply_torch_fused` stays so, and several threads may call this at a time; any other is as before
    when the call returns, and calls on it wait for each other.

    Args:
        model: a transformers model that can generate, or a pipeline, which has one.
        inputs: token ids ``(batch, tokens)``, integers, one sequence being ``(1, tokens)``; or what a tokenizer
            returns, a mapping with ``input_ids``; or None, and ``generate_kwargs`` have them: ``generate(model,
            **tokenizer("Hello", return_tensors="pt"))``.
        decode: False leaves the steps of a model that is not patched to transformers.
        generate_kwargs: passed on to ``model.generate``, the streamer included.

    Returns:
        What ``model.generate`` returns.

    Raises:
        TypeError: ``model`` is no model that can generate, or ``inputs`` are no tensor of integers or mapping with one.
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
