"""Calls a model without a cache in a way that does not wait for the GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .families import family_of_model
from .transformers_private import CACHE


class NoCache(DynamicCache):
    """A cache that stays empty.

    Without a cache, transformers looks for several sequences in one row, by comparing position ids on the device, and
    waits for the result before it starts the first layer. With one, it does not look.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def without_waiting(model: Any, forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    """`forward(**given)` of a causal language model, with `NoCache` if that gives the same result."""
    if not _may_have_no_cache(model, given):
        return forward(**given)
    outputs = forward(**{**given, CACHE: NoCache()})
    if type(outputs.get(CACHE)) is not NoCache:
        return outputs
    return type(outputs)(**{name: value for name, value in outputs.items() if name != CACHE})


def _may_have_no_cache(model: Any, given: dict[str, Any]) -> bool:
    """Whether the model would use no cache and make the position ids, which then are of one sequence in each row."""
    family = family_of_model(model)
    if family is None or family.text != "model" or family.linear_attention:
        return False
    use_cache, return_dict = given.get("use_cache"), given.get("return_dict")
    return (
        all(given.get(name) is None for name in (CACHE, "past_key_values", "attention_mask", "position_ids"))
        and not (model.config.use_cache if use_cache is None else use_cache)
        and bool(model.config.return_dict if return_dict is None else return_dict)
        and not model.model.gradient_checkpointing  # which warns of a cache
        and not torch.jit.is_tracing()
    )
