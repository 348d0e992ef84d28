"""When a generation ends, known as late as one step after the token that ends it."""

import contextlib
from typing import Any

import torch
from torch import Tensor


class OnItsWay:
    """An asynchronous copy of a tensor to the host; waits only when its values are read."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event = None if tensor.is_cpu else torch.Event(tensor.device)
        if self._event is not None:
            with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
                self._event.record()

    def get(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy


class EndingOfAll:
    """The end of several sequences: the device knows which of them have ended, and fills these with padding.

    Args:
        padding: the token to fill them with; None if no token ends a sequence.
    """

    _goes_on: OnItsWay

    def __init__(self, criteria: Any, padding: Tensor | None, input_ids: Tensor):
        self._criteria = criteria
        self._padding = padding
        self._unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens if self._padding is None else torch.where(self._unfinished, tokens, self._padding)

    def look_at(self, input_ids: Tensor, tokens: Tensor) -> None:
        """Starts to look at the sequences, which end with these new tokens."""
        self._unfinished = self._unfinished & ~self._criteria(input_ids, None)
        self._goes_on = OnItsWay(self._unfinished.any())

    def has_come(self) -> bool:
        return not self._goes_on.get()


class EndingOfOne:
    """The end of a single sequence, at which the host looks while the device computes the next token."""

    _tokens: OnItsWay

    def __init__(self, criteria: Any, prompt: OnItsWay):
        self._criteria = criteria
        self._prompt = prompt
        self._sequence: Tensor | None = None

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens

    def look_at(self, input_ids: Tensor, tokens: Tensor) -> None:
        self._tokens = OnItsWay(tokens)

    def has_come(self) -> bool:
        before = self._prompt.get() if self._sequence is None else self._sequence
        self._sequence = torch.cat([before, self._tokens.get()[:, None]], dim=-1)
        return bool(self._criteria(self._sequence, None).all())
