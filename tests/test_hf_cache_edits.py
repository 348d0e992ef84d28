"""A caller may edit and keep a FusedKVCache's keys and values, like a DynamicCache's."""
# ruff: noqa: F811 (a fixture is imported)

import pytest
import torch
from test_hf_cache import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    append,
    assert_same,
    caches,  # noqa: F401 (a fixture)
    config,
    reset,
    same,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from torch_fused.hf import FusedKVCache
from torch_fused.testing import make

# ---- what a caller edits --------------------------------------------------------------------------------------------

EDITS = {
    "the last tokens": lambda states: states[:, :, -2:],
    "the first tokens": lambda states: states[:, :, :3],
    "every second token": lambda states: states[:, :, ::2],
    "first and last tokens": lambda states: torch.cat([states[:, :, :1], states[:, :, -3:]], 2),
    "a prefix": lambda states: torch.cat([torch.ones_like(states[:, :, :4]), states], 2),
    "no tokens": lambda states: states[:, :, :0],
    "repeated": lambda states: states.repeat(3, 1, 1, 1),
    "selected": lambda states: states[1:],
    "expanded": lambda states: states[:1].expand(4, -1, -1, -1),
    "another dtype": lambda states: states.bfloat16(),
    "a parameter": lambda states: torch.nn.Parameter(states.clone(), requires_grad=False),
    "itself": lambda states: states,
    "negated in place": lambda states: states.neg_(),
}


@pytest.mark.parametrize("order", [("keys", "values"), ("values", "keys")], ids="-".join)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("spare", [None, 40])
def test_layers_are_edited_one_tensor_after_the_other(edit, order, spare):
    """Every edit, in both orders: the cache continues with what was assigned, like DynamicCache."""
    caches = FusedKVCache(config(), expected_len=spare), DynamicCache(config=config())
    append(caches, 6)
    append(caches, 1, seed=50)
    for cache in caches:
        for layer in cache.layers:
            for name in order:
                setattr(layer, name, edit(getattr(layer, name)))
    assert_same(*caches)
    batch = caches[1].layers[0].keys.shape[0]
    for step in range(3):
        for pair in zip(*append(caches, 1, batch=batch, seed=60 + step), strict=True):
            same(*pair)
        assert_same(*caches)
    for cache in caches:
        cache.crop(-2)
    append(caches, 2, batch=batch, seed=70)
    assert_same(*caches)


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("edit", ["the last tokens", "a prefix", "another dtype", "itself"])
def test_only_one_tensor_is_edited(caches, name, edit):
    """Keys and values continue with different lengths and dtypes; a later edit can make them equal again."""
    append(caches, 6)
    for cache in caches:
        for layer in cache.layers:
            setattr(layer, name, EDITS[edit](getattr(layer, name)))
    append(caches, 1, seed=50)
    assert_same(*caches)
    other = "values" if name == "keys" else "keys"
    for cache in caches:
        for layer in cache.layers:
            setattr(layer, other, EDITS[edit](getattr(layer, other)))
    append(caches, 2, seed=60)
    assert_same(*caches)


def test_an_edit_that_does_not_fit_is_an_error_in_the_next_update(caches):
    """Keys of another batch size: torch.cat's error, and neither tensor has changed."""
    append(caches, 6)
    layer = caches[0].layers[0]
    layer.keys = layer.keys[:1]
    held = layer.keys.clone(), layer.values.clone()
    states = make(2, HEADS, 1, HEAD_DIM)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        caches[0].update(states, states, 0)
    assert all(map(torch.equal, (layer.keys, layer.values), held))


def test_a_prefix_is_trained(caches):
    """Keys and values that require a gradient, in place or by assignment, get it."""
    gradients = []
    for cache in caches:
        append([cache], 4)
        layer = cache.layers[0]
        layer.keys.requires_grad_()
        layer.values = torch.nn.Parameter(layer.values.clone())
        prefix = layer.keys, layer.values
        states = make(2, HEADS, 2, HEAD_DIM)
        keys, values = cache.update(states, states, 0)
        (keys.square() * values).sum().backward()
        gradients += [[states.grad for states in prefix]]
    torch.testing.assert_close(*gradients)


def test_data_of_a_view_is_replaced(caches):
    """`.data` of the returned tensors, as in DynamicCache."""
    append(caches, 6)
    for cache in caches:
        for layer in cache.layers:
            layer.keys.data = layer.keys.data[:, :, 2:]
            layer.values.data = layer.values.data[:, :, 2:].clone()
    assert_same(*caches)
    append(caches, 1, seed=50)
    assert_same(*caches)


# ---- what a caller keeps --------------------------------------------------------------------------------------------

KEEP = {
    "keys": lambda cache: cache.layers[0].keys,
    "values": lambda cache: cache.layers[0].values,
    "a part of the keys": lambda cache: cache.layers[0].keys[:, :, 4:].transpose(1, 2),
    "an item": lambda cache: next(iter(cache))[1],
    "the result of update": lambda cache: cache.update(*[make(2, HEADS, 1, HEAD_DIM, seed=9)] * 2, 0)[0],
    "an array": lambda cache: torch.from_numpy(cache.layers[0].keys.numpy()),
}
CHANGE = {
    "crop and append": lambda cache: (cache.crop(-3), append([cache], 3, seed=70)),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "reorder and append": lambda cache: (cache.reorder_cache(torch.tensor([1, 1])), append([cache], 1, seed=70)),
    "reset and append": lambda cache: (reset(cache), append([cache], 9, seed=70)),
    "append and write": lambda cache: (append([cache], 1, seed=70), cache.layers[0].keys.zero_()),
    "write after append": lambda cache: (append([cache], 1, seed=70), cache.layers[0].values.zero_()),
}


@pytest.mark.parametrize("change", CHANGE.values(), ids=CHANGE)
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_what_was_kept_stays(keep, change):
    """No later call changes a tensor that a caller holds, and writing to it changes nothing in the cache."""
    caches = FusedKVCache(config(), max_cache_len=40), DynamicCache(config=config())
    append(caches, 8)
    kept = [keep(cache) for cache in caches]
    before = kept[0].clone()
    for cache in caches:
        change(cache)
    assert torch.equal(kept[0], before)
    assert torch.equal(*kept)
    for states in kept:
        states.fill_(7)
    assert_same(*caches)


def test_the_cache_takes_its_own_states(caches):
    """States that are views of the cache are appended to it."""
    append(caches, 5)
    for cache in caches:
        layer = cache.layers[0]
        cache.update(layer.keys[:, :, -2:], layer.values[:, :, :2], 0)
    assert_same(*caches)


def test_copies_only_while_a_view_exists():
    """Reading, crops and reorderings do not copy once the readers' tensors are gone."""
    cache = FusedKVCache(config(), max_cache_len=40)
    append([cache], 8)

    def places():
        return [states.data_ptr() for layer in cache.layers for states in (layer.keys, layer.values)]

    before = places()
    for step in range(8):
        kept = append([cache], 3, seed=step)
        del kept
        list(cache)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert places() == before
    kept = cache.layers[1].keys
    append([cache], 1)
    assert [a != b for a, b in zip(places(), before, strict=True)] == [False, False, True, True, False, False]
    before = places()
    append([cache], 1)  # kept is no longer a view of a buffer
    assert places() == before
    assert kept.shape[2] == 16


class Allocations(TorchDispatchMode):
    """Counts the elements of new tensors as large as `least`."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(argument.alias_info for argument in function._schema.returns):
            results = result if isinstance(result, (list, tuple)) else [result]
            self.count += sum(isinstance(t, torch.Tensor) and t.numel() >= self.least for t in results)
        return result


def test_speculative_decoding_copies_nothing():
    """Append candidates, read all keys, crop some: a step of assisted and prompt lookup decoding."""
    cache = FusedKVCache(config(), max_cache_len=200)
    append([cache], 100)
    with Allocations(least=100 * HEAD_DIM) as allocations:
        for step in range(20):
            for layer in range(LAYERS):
                states = make(2, HEADS, 5, HEAD_DIM, seed=step)
                keys, values = cache.update(states, states, layer)
                keys.amax(), values.amax()
            cache.crop(-4)
    assert allocations.count == 0


def test_backward_after_more_tokens():
    """Keys that were saved for the queries' gradient do not change while the cache continues and is cropped."""
    gradients = []
    for cache in (FusedKVCache(config(1), max_cache_len=40), DynamicCache(config=config(1))):
        states = make(2, HEADS, 3, HEAD_DIM)
        queries = make(2, HEADS, 3, HEAD_DIM, seed=1, requires_grad=True)
        outputs = []
        for step in range(4):
            keys, values = cache.update(states + step, states - step, 0)
            outputs.append(torch.nn.functional.scaled_dot_product_attention(queries, keys, values))
            cache.crop(-1)
        sum(output.square().sum() for output in outputs).backward()
        gradients.append(queries.grad)
    torch.testing.assert_close(*gradients)
