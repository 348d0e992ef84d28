"""When a generation ends, known as late as one step after the token that ends it."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.generation import MaxLengthCriteria


class ToHost:
    """Asynchronous copies of tensors of one size to the host, one after the other; waits only in `get`.

    On CUDA they have a stream of their own, so that no step waits for a copy.
    """

    _sent: Tensor | None = None
    _memory: Tensor
    _event: torch.Event | None = None
    _stream: torch.cuda.Stream | None = None

    def send(self, tensor: Tensor) -> None:
        if self._sent is None:
            self._memory = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._event = None if tensor.is_cpu else torch.Event(tensor.device)
            self._stream = torch.cuda.Stream(tensor.device) if tensor.is_cuda else None
        self._sent = tensor  # lives until it is copied
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._memory.copy_(tensor, non_blocking=True)
            if self._event is not None:
                self._event.record()

    def get(self) -> Tensor:
        """The tensor that was sent last."""
        if self._event is not None:
            self._event.synchronize()
        return self._memory.clone()


def max_length(criteria: Any) -> int | None:
    """The number of tokens at which a generation ends, prompt included."""
    return min((each.max_length for each in criteria if type(each) is MaxLengthCriteria), default=None)


def _only_ends(criteria: Any) -> bool:
    """Whether this is a maximum length that cannot warn of positions that the model was not trained for."""
    if type(criteria) is not MaxLengthCriteria:
        return False
    positions = criteria.max_position_embeddings
    return positions is None or criteria.max_length <= positions


class EndingOfAll:
    """The end of several sequences: the device knows which of them have ended, and fills these with padding.

    Args:
        padding: the token to fill them with; None if no token ends a sequence.
    """

    def __init__(self, criteria: Any, padding: Tensor | None, input_ids: Tensor):
        self._criteria = criteria
        self._padding = padding
        self._unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self._goes_on = ToHost()

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens if self._padding is None else torch.where(self._unfinished, tokens, self._padding)

    def look_at(self, sequences: "Sequences") -> None:
        """Starts to look at the newest tokens."""
        self._unfinished = self._unfinished & ~self._criteria(sequences.ids(), None)
        self._goes_on.send(self._unfinished.any())

    def has_come(self) -> bool:
        return not self._goes_on.get()


class EndingOfOne:
    """The end of a single sequence, at which the host looks while the device computes the next token.

    The loop itself ends at `max_length`. It waits for no token if that is the only end.
    """

    def __init__(self, criteria: Any, input_ids: Tensor):
        self._criteria = [each for each in criteria if not _only_ends(each)]
        self._prompt, self._token = ToHost(), ToHost()
        self._sequence: Tensor | None = None
        if self._criteria:
            self._prompt.send(input_ids)

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens

    def look_at(self, sequences: "Sequences") -> None:
        if self._criteria:
            self._token.send(sequences.last)

    def has_come(self) -> bool:
        if not self._criteria:
            return False
        before = self._prompt.get() if self._sequence is None else self._sequence
        self._sequence = torch.cat([before, self._token.get()], dim=-1)
        return any(bool(each(self._sequence, None)) for each in self._criteria)


class Sequences:
    """Token ids, joined only when all of them are asked for."""

    def __init__(self, input_ids: Tensor):
        self._ids, self._new = input_ids, []  # type: ignore[var-annotated]
        self.last = input_ids[:, -1:]
        self.length = input_ids.shape[1]

    def append(self, tokens: Tensor) -> None:
        self.last = tokens[:, None]
        self._new.append(self.last)
        self.length += 1

    def ids(self) -> Tensor:
        """``(batch, length)``."""
        if self._new:
            self._ids, self._new = torch.cat([self._ids, *self._new], dim=-1), []
        return self._ids
