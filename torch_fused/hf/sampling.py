"""Splits transformers' logits processors into those that run as before and those that the fused sampler replaces."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# In the order of `sample`, which is also transformers' order, with the arguments each one sets.
WARPERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    TemperatureLogitsWarper: lambda warper: {"temperature": warper.temperature},
    TopKLogitsWarper: lambda warper: {"top_k": warper.top_k},
    TopPLogitsWarper: lambda warper: {"top_p": warper.top_p},
    MinPLogitsWarper: lambda warper: {"min_p": warper.min_p},
}


def split_processors(processors: Sequence[LogitsProcessor]) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """The processors that still run, and the arguments of `sample` that replace the last ones."""
    first = len(processors)
    order = list(WARPERS)
    following = len(order)
    while first > 0 and _is_known(processors[first - 1]) and order.index(type(processors[first - 1])) < following:
        first -= 1
        following = order.index(type(processors[first]))
    filters: dict[str, Any] = {}
    for warper in processors[first:]:
        filters |= WARPERS[type(warper)](warper)
    return LogitsProcessorList(processors[:first]), filters


def _is_known(warper: LogitsProcessor) -> bool:
    filters = type(warper) in WARPERS and getattr(warper, "filter_value", -torch.inf) == -torch.inf
    return filters and getattr(warper, "min_tokens_to_keep", 1) == 1
