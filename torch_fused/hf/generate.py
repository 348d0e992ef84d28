"""`model.generate` with a `FusedKVCache` and the fused sampler, for a model that need not be patched."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .patch import PatchHandle, prepare_cache_for_generation
from .sampling import get_logits_processor


def generate(model, inputs: Tensor | Mapping[str, Tensor], **generate_kwargs: Any):
    """Calls ``model.generate`` with the fused sampler, and a :class:`FusedKVCache` in place of a ``DynamicCache``.

    A model patched by :func:`apply_torch_fused` stays so; any other is as before when the call returns.

    Args:
        model: a transformers model that can generate.
        inputs: token ids ``(batch, tokens)``, or what a tokenizer returns: a mapping with ``input_ids``.
        generate_kwargs: passed on to ``model.generate``, the streamer included.

    Returns:
        What ``model.generate`` returns.

    Raises:
        TypeError: ``inputs`` is neither a tensor nor a mapping.

    Example:
        >>> generate(model, tokenizer("Hello", return_tensors="pt"), max_new_tokens=32)
    """
    if isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    elif not isinstance(inputs, Mapping):
        raise TypeError(f"generate: inputs must be a tensor of token ids or a mapping, got {type(inputs).__name__}")
    with PatchHandle(model) as handle:
        handle.bind_generation("_prepare_cache_for_generation", prepare_cache_for_generation)
        handle.bind_generation("_get_logits_processor", get_logits_processor)
        return model.generate(**inputs, **generate_kwargs)
