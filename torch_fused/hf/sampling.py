"""The token of a step drawn by the fused sampler, inside transformers' own generation loop.

The loop takes the softmax of the processed scores and draws from it, or takes their argmax. Here the last processors
hand out scores that wait: the draw, or the argmax, then goes to one fused op, and anything else that is done with them
runs the processors first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..ops.sampling import next_token

# In the order that `sample` applies them, which is transformers' order too, with what each passes on.
WARPERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    TemperatureLogitsWarper: lambda warper: {"temperature": warper.temperature},
    TopKLogitsWarper: lambda warper: {"top_k": warper.top_k},
    TopPLogitsWarper: lambda warper: {"top_p": warper.top_p},
    MinPLogitsWarper: lambda warper: {"min_p": warper.min_p},
}


def get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
    """The class's own list; its last processors are left to the fused sampler where that can do their work."""
    processors = type(self)._get_logits_processor(self, generation_config, *args, **kwargs)
    wants_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    return processors if wants_scores else FusedProcessorList(processors)


class FusedProcessorList(LogitsProcessorList):
    """Runs all processors but the last ones that the fused sampler knows; these are run when they are needed."""

    def __init__(self, processors: Sequence[LogitsProcessor]):
        super().__init__(processors)
        first = len(processors)
        order = list(WARPERS)
        following = len(order)
        while first > 0 and _is_known(processors[first - 1]) and order.index(type(processors[first - 1])) < following:
            first -= 1
            following = order.index(type(processors[first]))
        self._now = LogitsProcessorList(processors[:first])
        self._later = LogitsProcessorList(processors[first:])
        self._filters = {name: value for warper in self._later for name, value in WARPERS[type(warper)](warper).items()}

    @property
    def filters(self) -> dict[str, Any] | None:
        """What `sample` is given if it does the work of all processors; None if some must run before."""
        return None if self._now else self._filters

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        scores = self._now(input_ids, scores, **kwargs)
        return LazyScores.of(scores, self._filters, lambda: self._later(input_ids, scores))


def _is_known(warper: LogitsProcessor) -> bool:
    filters = type(warper) in WARPERS and getattr(warper, "filter_value", -torch.inf) == -torch.inf
    return filters and getattr(warper, "min_tokens_to_keep", 1) == 1


class LazyScores(Tensor):
    """Scores ``(batch, vocabulary)`` whose last processors have not run, or the softmax of those.

    Drawing one token from the softmax, and the argmax, run the fused sampler. Any other function gets the plain tensor
    that transformers' processors make. On the CPU a draw from a row with NaN or +inf raises RuntimeError, as
    torch.multinomial does, and the argmax is the first NaN. On a GPU, where looking for them would wait for the device,
    NaN is never chosen and +inf drawn with certainty.
    """

    _filters: dict[str, Any]
    _process: Callable[[], Tensor]
    _is_softmax: bool

    @classmethod
    def of(
        cls, scores: Tensor, filters: dict[str, Any], process: Callable[[], Tensor], is_softmax: bool = False
    ) -> "LazyScores":
        lazy = scores.as_subclass(cls)
        lazy._filters, lazy._process, lazy._is_softmax = filters, process, is_softmax
        return lazy

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], LazyScores):
            lazy, rest = args[0], (*args[1:], *kwargs.values())
            with torch._C.DisableTorchFunctionSubclass():
                if func is F.softmax and not lazy._is_softmax and kwargs.get("dim", -1) == -1:
                    return cls.of(lazy.as_subclass(Tensor), lazy._filters, lazy._process, is_softmax=True)
                if func is torch.multinomial and lazy._is_softmax and rest == (1,):
                    return next_token(lazy.as_subclass(Tensor), True, **lazy._filters).unsqueeze(-1)
                if func is torch.argmax and not lazy._is_softmax and not lazy._filters and rest == (-1,):
                    return next_token(lazy.as_subclass(Tensor), False)
        args, kwargs = tree_map(_processed, (args, kwargs))
        return func(*args, **kwargs)


def _processed(value: Any) -> Any:
    if not isinstance(value, LazyScores):
        return value
    with torch._C.DisableTorchFunctionSubclass():
        scores = value._process()
        return scores.softmax(-1) if value._is_softmax else scores
