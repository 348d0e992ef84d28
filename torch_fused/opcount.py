"""Counts the ops that reach a device, which is the number of launches per token on MPS or CUDA."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Ops that are views or bookkeeping, and do not reach the device.
_FREE = {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::detach", "aten::alias"}


class OpCounter(TorchDispatchMode):
    """Counts ops by name while it is active, except views.

    Example:
        >>> with OpCounter() as ops:
        ...     model(**inputs)
        >>> ops.total
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def ops_per_token(generate, tokens: int) -> float:
    """Ops per decoded token: those of ``generate(tokens + 1)`` minus those of ``generate(1)``, over ``tokens``."""
    totals = []
    for count in (1, tokens + 1):
        with torch.no_grad(), OpCounter() as ops:
            generate(count)
        totals.append(ops.total)
    return (totals[1] - totals[0]) / tokens
