"""A key / value cache that is written in place, so that a token costs the same however long the sequence is."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..ops.kv_cache import kv_update_

CACHE = "cache"
"""Transformers' name for the cache, as an argument and in its outputs; before 5.24 it was ``past_key_values``."""
if CACHE not in signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE = "past_key_values"

ALLOCATE_AT_ONCE = 256 * 2**20
"""Bytes up to which a whole cache is allocated for its final length with the first token; a larger one grows."""


class FusedLayer(DynamicLayer):
    """The cache of one layer: two buffers, of which the first `get_seq_length()` tokens are in use.

    ``keys`` and ``values`` are views of the part in use, ``(batch, heads, tokens, head_dim)``; the next tokens are
    written behind it, and `crop` only forgets. A tensor assigned to them is never written: it is copied into a buffer
    of our own when the next token comes.

    Args:
        final_length: tokens the sequence is expected to reach, if known.
        byte_budget: bytes that may be allocated at once for ``final_length`` tokens.
    """

    def __init__(self, final_length: int | None = None, byte_budget: int = 0):
        self.final_length = final_length
        self.byte_budget = byte_budget
        super().__init__()

    # `_capacity` is the number of tokens that may be written in place: 0 while the tensors are not ours.

    @property
    def keys(self):
        return None if self._keys is None else self._keys.narrow(2, 0, self._length)

    @keys.setter
    def keys(self, keys):
        self._keys = keys
        self._length = 0 if keys is None else keys.shape[2]
        self._capacity = 0

    @property
    def values(self):
        return None if self._values is None else self._values.narrow(2, 0, self._length)

    @values.setter
    def values(self, values):
        self._values = values
        self._capacity = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Autocast gives float32 keys, from the rotation, and values of a half dtype.
        self.dtype = torch.promote_types(key_states.dtype, value_states.dtype)
        self.device = key_states.device
        self.keys, self.values = (
            states.new_empty((*states.shape[:2], 0, states.shape[3]), dtype=self.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends ``(batch, heads, tokens, head_dim)`` states and returns all keys and values.

        With gradients enabled and needed, the result is a differentiable concatenation, as `DynamicLayer` makes it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (self._keys, self._values, key_states, value_states)
        ):
            keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
            self.keys, self.values = keys, values
            return keys, values
        if key_states.dtype != value_states.dtype:
            key_states, value_states = key_states.to(self.dtype), value_states.to(self.dtype)
        length = self._length + key_states.shape[2]
        self._make_room(length)
        views = kv_update_(self._keys, self._values, key_states, value_states, self._length)
        self._length = length
        return views

    def _make_room(self, length: int) -> None:
        # Torch lets nobody write to an inference tensor outside of inference mode.
        locked = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if length > self._capacity or locked:
            self._reallocate(self._capacity_for(length))

    def _capacity_for(self, length: int) -> int:
        """Tokens to allocate when `length` are needed: the final length if small enough, else half as many again."""
        if self.final_length is None or self.final_length < length:
            return length + length // 2
        token_bytes = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in (self._keys, self._values))
        if self.final_length * token_bytes <= self.byte_budget:
            return self.final_length
        return min(length + length // 2, self.final_length)

    def _reallocate(self, capacity: int) -> None:
        """Moves the tokens in use into new buffers, one after the other, so that the old one can be reused."""
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            if self._length:
                new.narrow(2, 0, self._length).copy_(old.detach().narrow(2, 0, self._length))
            setattr(self, name, new)
        self._capacity = capacity

    def room_for(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The two buffers, with room for that many tokens behind those in use. `advance` makes these count."""
        self._make_room(self._length + tokens)
        return self._keys, self._values

    def advance(self, tokens: int) -> None:
        self._length += tokens

    def get_seq_length(self) -> int:
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"FusedKVCache: crop takes minus the number of tokens to remove, or 0, got {tokens_to_remove}"
            )
        self._length = max(0, self._length + tokens_to_remove)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._capacity == 0:
            super().reorder_cache(beam_idx)
            return
        # Back into the same buffers: no reallocation with the next token.
        for states in (self.keys, self.values):
            states.copy_(states.index_select(0, beam_idx.to(states.device)))

    @property
    def nbytes(self) -> int:
        """Bytes that the two buffers hold, the unused part included."""
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values) if t is not None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the tokens in use only."""
        state = self.__dict__.copy()
        if self._keys is not None:
            state["_keys"], state["_values"] = (
                t.clone(memory_format=torch.contiguous_format) for t in (self.keys, self.values)
            )
            state["_capacity"] = 0
        return state


class FusedKVCache(DynamicCache):
    """A drop-in for :class:`transformers.DynamicCache` in which appending costs O(new tokens), whatever the length.

    It works wherever a ``DynamicCache`` does: greedy search, sampling, beams, left padding, several return sequences,
    assisted decoding, several turns, copying and pickling. Under grad mode, states that require a gradient are
    concatenated as in ``DynamicCache``, so training with ``use_cache=True`` stays right.

    A layer's buffers are allocated once if the final length is known and the whole cache needs at most 256 MB; else
    they grow by half, one layer at a time. Sliding-window layers of hybrid models are transformers' own.

    Args:
        config: the model's configuration.
        max_cache_len: tokens the cache may hold; more are an error. None for no limit.
        expected_len: tokens the sequence is expected to reach: a hint for the allocation, not a limit. None if unknown.

    Raises:
        ValueError: ``max_cache_len`` is below 1. Later, from ``update``: more tokens than ``max_cache_len`` leaves room
            for; the cache stays as it was.

    Example:
        >>> cache = FusedKVCache(model.config)
        >>> tokens = model.generate(input_ids, cache=cache, max_new_tokens=32)  # past_key_values before 5.24
    """

    def __init__(self, config: PreTrainedConfig, *, max_cache_len: int | None = None, expected_len: int | None = None):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"FusedKVCache: max_cache_len must be at least 1 or None, got {max_cache_len}")
        super().__init__(config=config)
        self._max_cache_len = max_cache_len
        final_length = expected_len if max_cache_len is None else max_cache_len
        byte_budget = ALLOCATE_AT_ONCE // max(1, sum(type(layer) is DynamicLayer for layer in self.layers))
        # Only plain attention layers: a subclass keeps its tokens in another way.
        self.layers = [
            FusedLayer(final_length, byte_budget) if type(layer) is DynamicLayer else layer for layer in self.layers
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.max_cache_len is not None:
            held, new = self.get_seq_length(layer_idx), key_states.shape[2]
            if held + new > self.max_cache_len:
                raise ValueError(
                    f"FusedKVCache: full: max_cache_len is {self.max_cache_len} tokens and {held} are held, got {new} "
                    "more. Make the cache longer, crop() or reset() it."
                )
        layer: Any = self.layers[layer_idx]
        return layer.update(key_states, value_states, *args, **kwargs)

    def room_for(self, tokens: int) -> tuple[list[Tensor], list[Tensor]]:
        """The buffers of all layers' keys and of their values, with room for that many tokens behind those in use."""
        layers: list[Any] = self.layers
        buffers = [layer.room_for(tokens) for layer in layers]
        return [keys for keys, _ in buffers], [values for _, values in buffers]

    def advance(self, tokens: int) -> None:
        """Counts that many tokens, which have been written to what `room_for` returned, as held."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.advance(tokens)

    @property
    def max_cache_len(self) -> int | None:
        """Tokens the cache may hold, or None. (Some transformers versions have a deprecated property of this name.)"""
        return self._max_cache_len

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return super().get_max_length(layer_idx) if self.max_cache_len is None else self.max_cache_len

    @property
    def nbytes(self) -> int:
        """Bytes held by the buffers of all layers, the unused parts included."""
        return sum(_layer_nbytes(layer) for layer in self.layers)


def _layer_nbytes(layer) -> int:
    if isinstance(layer, FusedLayer):
        return layer.nbytes
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
