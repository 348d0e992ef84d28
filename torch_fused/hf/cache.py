"""A key/value cache that is updated in place, so that the cost of a token does not depend on the sequence length."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..ops.kv_cache import kv_append_reference, kv_update_
from .transformers_private import CACHE as CACHE

SPARE = 64
"""Tokens before its window that a layer keeps, so that tokens can be cropped."""

ALLOCATE_AT_ONCE = 256 * 2**20
"""Largest cache in bytes that is allocated for its final length with the first token; a larger one grows."""


# Not public in torch. Takes `_storage(tensor)` of a tensor that is alive.
_use_count = torch._C._storage_Use_Count


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


_one = torch.empty(1)
SOLE = _use_count(_storage(_one))
"""The use count of a storage with a single tensor."""

PLAIN = (Tensor, nn.Parameter)

Pair = tuple[Any, Any]
"""Keys and values."""


class FusedLayer(DynamicLayer):
    """The cache of one layer: two buffers with the first `get_seq_length()` tokens in use.

    ``keys`` and ``values`` are as in `DynamicLayer`, ``(batch, heads, tokens, head_dim)``: views of the part in use, or
    the tensors that were assigned. New tokens are written in place after that part, if nobody else holds a view of the
    buffers; otherwise the tokens move to new buffers first. Tensors that were returned or assigned are therefore never
    written, and a caller may keep or edit them.

    Args:
        final_length: the expected length of the sequence in tokens, if known.
        byte_budget: bytes that may be allocated at once for ``final_length`` tokens.
    """

    # The tokens are in `_held` or, if it is None, in the first `_length` tokens of the buffers. Keys and values change
    # place in one assignment, so that an interrupt keeps them consistent.
    _held: Pair | None = (None, None)
    is_initialized = False
    window = 0  # the number of last tokens that a token attends to, including its own; 0 for all
    dropped = 0  # number of tokens dropped from the start
    edited = False  # whether a caller has chosen the number of tokens
    _keys: Any = None
    _values: Any = None
    _length = 0
    _room = -1  # up to this length, tokens are written without calling `_prepare`
    _dtypes: Pair | None = None  # the buffers' dtypes, if keys and values have the same
    _kind: tuple | None = None  # the buffers' dtypes, device and batch size
    _storages: Pair | None = None  # the buffers' storages, for their use counts
    _locked = False  # the buffers are inference tensors, which cannot be written outside inference mode

    def __init__(self, final_length: int | None = None, byte_budget: int = 0):
        self.final_length = final_length
        self.byte_budget = byte_budget
        super().__init__()

    # ---- keys and values as tensors ---------------------------------------------------------------------------------

    @property
    def keys(self):
        return self._hand_out()[0]

    @keys.setter
    def keys(self, keys):
        before = self.get_seq_length()
        self._hold(keys, self._hand_out()[1])
        self.edited |= self.get_seq_length() != before

    @property
    def values(self):
        return self._hand_out()[1]

    @values.setter
    def values(self, values):
        self._hold(self._hand_out()[0], values)

    def _hand_out(self) -> Pair:
        """Keys and values; the same two tensors until the number of tokens changes."""
        if self._held is None:
            self._room = -1
            self._held = self._used(self._keys), self._used(self._values)
        return self._held

    def _hold(self, keys: Tensor | None, values: Tensor | None) -> None:
        """Sets the keys and values to these tensors, which are never written."""
        if self._held is not None and keys is self._held[0] and values is self._held[1]:
            return
        self._room = -1
        self._held = keys, values
        self._keys = self._values = None

    def _take_back(self) -> None:
        """Drops the returned views if they still are views of the buffers."""
        # A compiler cannot check this; there, the returned tensors are copied.
        if self._held is None or self._keys is None or self._values is None or is_dynamo_compiling():
            return
        for view, buffer in zip(self._held, (self._keys, self._values), strict=True):
            if view.requires_grad or _place(view) != _place(self._used(buffer)):
                return
        self._held = None

    def _used(self, buffer: Tensor) -> Tensor:
        return buffer.narrow(2, 0, self._length)

    # ---- appending --------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends ``(batch, heads, tokens, head_dim)`` states and returns all keys and values.

        If a gradient is needed, the result is a differentiable concatenation, as in `DynamicLayer`.
        """
        length = self._length + key_states.shape[-2]
        if (
            length > self._room
            or (key_states.dtype, value_states.dtype) != self._dtypes
            or (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad))
            or not self._may_write()
        ):
            return self._update_slowly(key_states, value_states)
        try:
            views = kv_update_(self._keys, self._values, key_states, value_states, self._length)
        except RuntimeError:
            if _is_transforming():  # the op has no rule for it
                return self._update_slowly(key_states, value_states)
            raise
        self._length = length
        return views

    def _update_slowly(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        if value_states.shape[-2] != tokens:
            raise RuntimeError(
                f"FusedKVCache: value_states must have as many tokens as key_states, {tokens}, got "
                f"{value_states.shape[-2]}"
            )
        if not self._prepare((key_states, value_states), tokens):
            keys, values = self._hand_out()
            keys, values = torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
            self._hold(keys, values)
            return keys, values
        if self._dtypes == (key_states.dtype, value_states.dtype):
            views = kv_update_(self._keys, self._values, key_states, value_states, self._length)
        else:
            kv_append_reference(self._keys, self._values, key_states, value_states, self._length)
            views = tuple(buffer.narrow(2, 0, self._length + tokens) for buffer in (self._keys, self._values))
        self._length += tokens
        return views

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.dtype != value_states.dtype:  # handled differently in different versions of transformers
            super().lazy_initialization(key_states, value_states)
            return
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = key_states.new_empty(0)
        self._hold(empty, empty)
        self.is_initialized = True

    def _may_write(self) -> bool:
        """Whether the buffers may be written, because nobody else holds them."""
        if is_dynamo_compiling():  # a compiler cannot count; `_hand_out` has not returned them
            return self._room >= 0
        if self._storages is None:
            self._storages = _storage(self._keys), _storage(self._values)
            self._locked = self._keys.is_inference()
        keys, values = self._storages
        alone = _use_count(keys) == SOLE == _use_count(values)
        return alone and not (self._locked and not torch.is_inference_mode_enabled())

    def _prepare(self, new: Pair, tokens: int) -> bool:
        """Makes sure that the tokens are in writable buffers with room for `tokens` more like `new`.

        Returns False if only `torch.cat` gives the result of a `DynamicLayer`: with gradients, for keys and values with
        different numbers of tokens, or for states that do not fit.
        """
        self._take_back()
        old = (self._keys, self._values) if self._held is None else self._held
        # `torch.cat` ignores an empty vector, except for its dtype; a `DynamicLayer` starts with two.
        begins = self._held is not None and all(type(t) is Tensor and t.shape == (0,) for t in old)
        if not _match(*new) or not (begins or (_match(old[0], new[0], 3) and _match(old[1], new[1], 3))):
            return False
        if self._held is not None and not begins and old[0].shape[2] != old[1].shape[2]:
            return False
        if _is_transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in (*old, *new))):
            return False
        dtypes = _promote(old[0], new[0]), _promote(old[1], new[1])
        length = self._length if self._held is None else 0 if begins else old[0].shape[2]
        if (
            self._held is not None
            or dtypes != (old[0].dtype, old[1].dtype)
            or length + tokens > min(old[0].shape[2], old[1].shape[2])
            or not self._may_write()
        ):
            del old
            self._move(length, self._capacity_for(length + tokens, new, dtypes), new, dtypes)
        self._room = min(self._keys.shape[2], self._values.shape[2])
        return True

    def _move(self, length: int, capacity: int, new: Pair, dtypes: Pair) -> None:
        """Copies the tokens into new buffers, keys first, so that their old memory can be reused for the values."""
        self._room, self._storages = -1, None
        for i, name in enumerate(("_keys", "_values")):
            old = getattr(self, name) if self._held is None else self._held[i]
            batch, heads, _, head_dim = new[i].shape
            buffer = new[i].new_empty((batch, heads, capacity, head_dim), dtype=dtypes[i])
            if length:
                buffer.narrow(2, 0, length).copy_(old.detach().narrow(2, 0, length))
            setattr(self, name, buffer)
        self._length = length
        self._dtypes = dtypes if dtypes[0] == dtypes[1] else None
        self._kind = (*dtypes, buffer.device, batch)
        self._held = None

    def _capacity_for(self, length: int, new: Pair, dtypes: Pair) -> int:
        """Tokens to allocate when `length` are needed: the final length if it is small enough, else 1.5 times."""
        if self.final_length is None or self.final_length < length:
            return length + length // 2
        token_bytes = sum(t.shape[0] * t.shape[1] * t.shape[3] * dt.itemsize for t, dt in zip(new, dtypes, strict=True))
        if self.final_length * token_bytes <= self.byte_budget:
            return self.final_length
        return min(length + length // 2, self.final_length)

    def owns_buffers(self) -> bool:
        """Whether the tokens are in our buffers, after moving them there if possible, for `room_for`."""
        self._take_back()
        return self._held is None or (self.is_initialized and self._prepare(self._held, 0))

    def has_room(self, tokens: int) -> bool:
        """Whether this many new tokens fit in the buffers, if nobody else holds a view of them."""
        return self._length + tokens <= self._room

    def make_room(self, tokens: int) -> None:
        """Makes sure that this many new tokens can be written to the buffers. `advance` then counts them."""
        if not self.has_room(tokens) or not self._may_write():
            self._prepare((self._keys, self._values), tokens)

    def advance(self, tokens: int) -> None:
        self._length += tokens

    # ---- the rest of a DynamicLayer ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self._length if self._held is None and self.is_initialized else super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"FusedKVCache: crop takes the negative number of tokens to remove, or 0, got {tokens_to_remove}"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self._take_back()
        if self._held is None:
            self._length = max(0, self._length + tokens_to_remove)
        else:
            self._hold(*self._changed(lambda states: states[..., :tokens_to_remove, :]))

    def reset(self) -> None:
        self._room = -1
        self.is_initialized = self.edited = False
        self._hold(None, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.get_seq_length() == 0:
            return
        self._take_back()
        reordered = self._changed(lambda states: states.index_select(0, beam_idx.to(states.device)))
        if self._held is None and len(beam_idx) == self._keys.shape[0] and self._may_write():
            # Back into the same buffers, so that the next token needs no reallocation.
            room, self._room, self._held = self._room, -1, reordered
            for buffer, states in zip((self._keys, self._values), reordered, strict=True):
                self._used(buffer).copy_(states)
            self._held = None
            self._room = room
        else:
            self._hold(*reordered)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._hold(*self._changed(lambda states: states.repeat_interleave(repeats, dim=0)))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length() > 0:
            self._hold(*self._changed(lambda states: states[indices, ...]))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Pair:
        keys, values = (self._used(self._keys), self._used(self._values)) if self._held is None else self._held
        return change(keys), change(values)

    @property
    def nbytes(self) -> int:
        """Bytes of the two buffers, including the unused part."""
        return _nbytes(self._held if self._keys is None else (self._keys, self._values))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles contain only the tokens in use."""
        state = self.__dict__.copy()
        state.update(_held=self._changed(_compact), _keys=None, _values=None, _room=-1, _storages=None)
        return state


class FusedSlidingLayer(FusedLayer):
    """The cache of a sliding-window layer: a token attends to the last ``sliding_window`` tokens, including itself.

    When its buffers are full, it drops tokens outside the window of the next token, except the last `SPARE`, so that a
    few can still be cropped. With ``record_past``, which assisted generation sets, it drops none. `update` returns the
    tokens that the new ones may attend to.
    """

    is_sliding = True
    record_past = False

    def __init__(self, sliding_window: int, final_length: int | None = None, byte_budget: int = 0):
        self.window = self.sliding_window = sliding_window
        super().__init__(final_length, byte_budget)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def _prepare(self, new: Pair, tokens: int) -> bool:
        self._take_back()
        full = self._held is None and self._length + tokens > self._keys.shape[2]
        outside = self._length - (self.window - 1 + SPARE)
        if full and outside > 0 and not self.record_past and not is_dynamo_compiling():
            kept = tuple(self._used(b).narrow(2, outside, self._length - outside) for b in (self._keys, self._values))
            # In one step, so that an interrupt keeps them consistent.
            self.__dict__.update(_held=kept, _keys=None, _values=None, _room=-1, dropped=self.dropped + outside)
        return super()._prepare(new, tokens)

    def _capacity_for(self, length: int, new: Pair, dtypes: Pair) -> int:
        capacity = super()._capacity_for(length, new, dtypes)
        return capacity if self.record_past else max(length, min(capacity, self.window + SPARE + self.window // 8))

    def get_seq_length(self) -> int:
        return self.dropped + super().get_seq_length()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises RuntimeError if the window would be incomplete after this crop."""
        held = self.get_seq_length() - self.dropped
        if tokens_to_remove < 0 < self.dropped and held + tokens_to_remove < self.window - 1:
            raise RuntimeError(
                f"FusedKVCache: cannot crop {-tokens_to_remove} tokens: a layer with a window of {self.window} has "
                f"dropped earlier tokens, so at most {held - self.window + 1} can be cropped. To keep all tokens, call "
                "activate_past_recording() first."
            )

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.dropped = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        seen = self.sliding_window - 1 + key_states.shape[-2]
        first = keys.shape[-2] - seen
        return (keys, values) if first <= 0 else (keys.narrow(2, first, seen), values.narrow(2, first, seen))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of tokens that `update` will return, and the position of the first."""
        first = max(self.get_seq_length() - self.sliding_window + 1, 0)
        return self.get_seq_length() - first + query_length, first


def _match(a: Any, b: Any, *dims: int) -> bool:
    """Whether both are plain 4-D tensors on one device with the same batch size, heads and sizes in `dims`."""
    return (
        type(a) in PLAIN
        and type(b) in PLAIN
        and a.dim() == b.dim() == 4
        and a.shape[:2] == b.shape[:2]
        and 0 not in a.shape[:2]
        and all(a.shape[dim] == b.shape[dim] for dim in dims)
        and a.device == b.device
        and a.layout == b.layout == torch.strided
    )


def _place(tensor: Tensor) -> tuple:
    """The memory that the tensor views."""
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _is_transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is active, where nothing may be written in place."""
    if is_dynamo_compiling():  # it supports neither check
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _promote(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def _compact(tensor: Any) -> Any:
    """The tensor, without the rest of its storage."""
    if type(tensor) is not Tensor or tensor.requires_grad or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class FusedKVCache(DynamicCache):
    """A drop-in replacement for :class:`transformers.DynamicCache` that appends in O(new tokens).

    It works everywhere a ``DynamicCache`` does: greedy search, sampling, beam search, left padding, several return
    sequences, assisted decoding, several turns, copying and pickling. In grad mode, states that require a gradient are
    concatenated as in ``DynamicCache``, so training with ``use_cache=True`` stays correct.

    Tensors that were taken out of the cache or assigned to it are never written: if somebody still holds a view of its
    buffers, the cache moves its tokens to new memory first. ``layers[i].keys`` and ``values`` may be assigned and
    edited in any order, as in a ``DynamicCache``. Dtypes are promoted as in ``torch.cat``.

    A layer's buffers are allocated once if the final length is known and the whole cache needs at most 256 MB.
    Otherwise they grow by half, one layer at a time. Layers with a sliding window keep the window and a few tokens
    before it, so that ``crop`` can remove a few; after ``activate_past_recording()`` they keep all tokens. Layers with
    linear attention use transformers' own cache.

    Args:
        config: the model's configuration.
        max_cache_len: the maximum number of tokens; exceeding it is an error. None for no limit.
        expected_len: the expected length of the sequence in tokens, a hint for the allocation and not a limit. None if
            unknown.

    Raises:
        ValueError: ``max_cache_len`` is below 1. In ``update``: the cache has no room for the new tokens; it has not
            changed then. In a forward: an earlier forward was interrupted, so layers differ in length; ``crop(0)`` cuts
            them to the shorter length.

    Example:
        >>> cache = FusedKVCache(model.config)
        >>> tokens = model.generate(input_ids, cache=cache, max_new_tokens=32)  # past_key_values before 5.24
    """

    is_compileable = False  # like `DynamicCache`, for which `generate` checks the exact class

    def __init__(self, config: PreTrainedConfig, *, max_cache_len: int | None = None, expected_len: int | None = None):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"FusedKVCache: max_cache_len must be at least 1 or None, got {max_cache_len}")
        super().__init__(config=config)
        self._max_cache_len = max_cache_len
        final_length = expected_len if max_cache_len is None else max_cache_len
        own = (DynamicLayer, DynamicSlidingWindowLayer)  # other subclasses store tokens differently
        byte_budget = ALLOCATE_AT_ONCE // max(1, sum(type(layer) in own for layer in self.layers))
        self.layers = [_fused(layer, final_length, byte_budget) for layer in self.layers]
        attention = [i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin)]
        self._first, self._last = (attention[0], attention[-1]) if attention else (0, 0)
        self._change = 0  # tokens that the last forward, step or crop adds to each layer
        self._in_forward = False  # whether that was more than an `update` of the first layer
        self._asked = False  # whether mask sizes were requested, which starts a forward

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self._max_cache_len is not None:
            held, new = self.get_seq_length(layer_idx), key_states.shape[-2]
            if held + new > self._max_cache_len:
                raise ValueError(
                    f"FusedKVCache: the cache is full: max_cache_len is {self._max_cache_len} tokens, {held} are in "
                    f"use, got {new} more. Use a larger max_cache_len, or call crop() or reset()."
                )
        layers: list[Any] = self.layers
        if layer_idx == self._first:
            self._check_whole()
            self._change, self._in_forward, self._asked = key_states.shape[-2], self._asked, False
        elif self._in_forward and not layers[layer_idx].is_initialized:
            self._check_prompt(layer_idx)
        return layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if layer_idx == self._first:  # a forward starts
            self._check_whole()
            self._asked = True
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes ``-tokens_to_remove`` tokens from the end.

        0 removes tokens that an interrupted call added only to the first layers; in a ``DynamicCache`` it does nothing.
        """
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, FusedSlidingLayer):
                layer.check_crop(tokens_to_remove)  # all layers, before any is cropped
        torn = self._is_torn()
        if torn and tokens_to_remove == 0:
            if any(self.is_linear):
                raise ValueError("FusedKVCache: a call was interrupted; linear attention cannot be cropped; reset() it")
            shortest = min(self._lengths())
            for layer in layers:
                if isinstance(layer, DynamicLayer):
                    layer.crop(shortest - layer.get_seq_length())
        elif not torn and tokens_to_remove < 0:
            self._change, self._in_forward = max(tokens_to_remove, -layers[self._first].get_seq_length()), True
        super().crop(tokens_to_remove)

    # ---- interrupted calls: the first layers have more, or fewer, tokens than the others ----------------------------

    def _lengths(self) -> list[int]:
        return [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]

    def _is_torn(self) -> bool:
        """Whether the last forward, step or crop reached only the first layers."""
        layers: list[Any] = self.layers
        first, last = layers[self._first].get_seq_length(), layers[self._last].get_seq_length()
        if first == last or first - last != self._change or last == 0:
            return False
        lengths = self._lengths()
        return (
            len(set(lengths)) == 2
            and lengths == sorted(lengths, reverse=first > last)
            and not self._any_edited()
            and (self._in_forward or lengths[1] == first)  # a caller may use the first layer alone
        )

    def _check_whole(self) -> None:
        if self._is_torn():
            first, *_, last = self._lengths()
            raise ValueError(
                f"FusedKVCache: an earlier call was interrupted: the first layers have {first} tokens, the last has "
                f"{last}. Call crop(0) to cut all layers to the shorter length, or reset() to empty them."
            )

    def _check_prompt(self, layer_idx: int) -> None:
        """Raises if a layer gets its first tokens while the first layer already had some."""
        lengths = self._lengths()
        held = lengths[0] - self._change
        reached = len([layer for layer in self.layers[:layer_idx] if isinstance(layer, CacheLayerMixin)])
        if held > 0 and all(lengths[:reached]) and not any(lengths[reached:]) and not self._any_edited():
            raise ValueError(
                f"FusedKVCache: an earlier prompt was interrupted: the first layers have {held} tokens, layer "
                f"{layer_idx} has none. Call reset()."
            )

    def _any_edited(self) -> bool:
        return any(getattr(layer, "edited", False) for layer in self.layers)

    def is_uniform(self, dtype: torch.dtype, device: torch.device, batch: int) -> bool:
        """Whether all layers have the same number of tokens, with this dtype, device and batch size, in our buffers."""
        self._check_whole()
        layers: list[Any] = self.layers
        kind, length = (dtype, dtype, device, batch), layers[0].get_seq_length()
        return all(
            (layer._held is None or layer.owns_buffers()) and layer.get_seq_length() == length and layer._kind == kind
            for layer in layers
        )

    def room_for(self, tokens: int, *, undisturbed: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The key and value buffers of all layers, with room for this many new tokens.

        Args:
            undisturbed: nobody can have got hold of the buffers since the last call.
        """
        layers: list[Any] = self.layers
        if not (undisturbed and all(layer.has_room(tokens) for layer in layers)):
            for layer in layers:
                layer.make_room(tokens)
        return [layer._keys for layer in layers], [layer._values for layer in layers]

    def advance(self, tokens: int) -> None:
        """Counts this many tokens, which were written to the buffers from `room_for`."""
        layers: list[Any] = self.layers
        self._change, self._in_forward = tokens, True
        for layer in layers:
            layer.advance(tokens)

    @property
    def max_cache_len(self) -> int | None:
        """The maximum number of tokens, or None. (Some transformers versions have a deprecated property like this.)"""
        return self._max_cache_len

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return super().get_max_length(layer_idx) if self.max_cache_len is None else self.max_cache_len

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all layers, including the unused parts."""
        return sum(_layer_nbytes(layer) for layer in self.layers)


def _fused(layer: Any, final_length: int | None, byte_budget: int) -> Any:
    if type(layer) is DynamicSlidingWindowLayer:
        return FusedSlidingLayer(layer.sliding_window, final_length, byte_budget)
    return FusedLayer(final_length, byte_budget) if type(layer) is DynamicLayer else layer


def _layer_nbytes(layer) -> int:
    if isinstance(layer, FusedLayer):
        return layer.nbytes
    return _nbytes((getattr(layer, "keys", None), getattr(layer, "values", None)))
