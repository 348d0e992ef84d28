"""FusedKVCache holds what DynamicCache holds, in fewer copies."""

import contextlib
import copy
import io
import itertools
import pickle
import random
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

import torch_fused.hf.cache
from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.testing import make

LAYERS, HEADS, HEAD_DIM = 3, 2, 8


def config(layers=LAYERS, **changes):
    return Qwen2Config(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        intermediate_size=32,
        vocab_size=16,
        **changes,
    )


def append(caches, tokens, batch=2, seed=0):
    """Appends the same random states to every layer of each cache; gives the last layer's results, one per cache."""
    results = []
    for layer in range(LAYERS):
        keys = make(batch, tokens, HEADS, HEAD_DIM, seed=seed + 2 * layer).transpose(1, 2)
        values = make(batch, tokens, HEADS, HEAD_DIM, seed=seed + 2 * layer + 1).transpose(1, 2)
        results = [cache.update(keys, values, layer) for cache in caches]
    return results


# An older transformers' DynamicCache keeps its tokens in a reset, writes zeros over them, and crops no empty cache.
OLD = "reset" not in vars(DynamicLayer)


def reset(cache):
    if OLD and type(cache) is DynamicCache:
        for layer in cache.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
    cache.reset()


def assert_same(fused, stock):
    assert fused.get_seq_length() == stock.get_seq_length()
    for ours, theirs in zip(fused.layers, stock.layers, strict=True):
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)


@pytest.fixture
def caches():
    return FusedKVCache(config()), DynamicCache(config=config())


def test_append_through_several_growths(caches):
    """A prompt, then single tokens past the 1.5x boundary several times: every result is DynamicCache's."""
    for step, tokens in enumerate([5, *[1] * 30, 7, 0, 40, 1]):
        (keys, values), (stock_keys, stock_values) = append(caches, tokens, seed=100 * step)
        assert torch.equal(keys, stock_keys)
        assert torch.equal(values, stock_values)
        assert_same(*caches)


def test_appending_moves_nothing_while_there_is_room(caches):
    """The buffers stay where they are, so a token costs its own size only."""
    fused, _ = caches
    append([fused], 64)
    before = fused.layers[0].keys.data_ptr()
    for step in range(32):
        append([fused], 1, seed=step)
        assert fused.layers[0].keys.data_ptr() == before
    append([fused], 1)
    assert fused.layers[0].keys.data_ptr() != before


@pytest.mark.parametrize("argument", ["max_cache_len", "expected_len"])
def test_known_length_is_allocated_once(argument):
    """With the final length known, nothing is ever moved, and nbytes is that length exactly."""
    cache = FusedKVCache(config(), **{argument: 100})
    append([cache], 3)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for step in range(97):
        append([cache], 1, seed=step)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.nbytes == LAYERS * 2 * 100 * 2 * HEADS * HEAD_DIM * 4


def test_too_large_a_length_is_not_allocated_at_once(monkeypatch):
    """Past the limit for the whole cache it grows instead, and never beyond the known length."""
    token_bytes = LAYERS * 2 * 2 * HEADS * HEAD_DIM * 4
    monkeypatch.setattr(torch_fused.hf.cache, "ALLOCATE_AT_ONCE", 100 * token_bytes - 1)
    cache = FusedKVCache(config(), max_cache_len=100)
    append([cache], 80)
    assert cache.nbytes == 100 * token_bytes
    cache = FusedKVCache(config(), max_cache_len=100)
    append([cache], 40)
    assert cache.nbytes == 60 * token_bytes


def test_a_hint_is_not_a_limit():
    """More tokens than expected_len are taken."""
    cache, stock = FusedKVCache(config(), expected_len=4), DynamicCache(config=config())
    append([cache, stock], 3)
    append([cache, stock], 9, seed=1)
    assert_same(cache, stock)


@pytest.mark.parametrize("hybrid", [False, True])
def test_full_is_an_error_that_changes_nothing(hybrid):
    """One token too many raises at the first layer, sliding ones included, and every layer is as it was."""
    changes = hybrid_changes() if hybrid else {}
    cache = FusedKVCache(config(**changes), max_cache_len=6)
    append([cache], 5)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="max_cache_len is 6 tokens and 5 are held, got 2 more"):
        append([cache], 2, seed=1)
    assert_same(cache, before)
    append([cache], 1, seed=1)
    assert cache.get_seq_length() == 6
    assert cache.get_max_length() == 6


def test_refuses_a_length_of_nothing():
    """max_cache_len=0 would be a cache that holds no token."""
    with pytest.raises(ValueError, match="max_cache_len must be at least 1 or None, got 0"):
        FusedKVCache(config(), max_cache_len=0)


def test_crop_keeps_the_buffers(caches):
    """Tokens taken back are overwritten in place by the next ones."""
    fused = caches[0]
    append(caches, 10)
    before = fused.layers[0].keys.data_ptr()
    for cache in caches:
        cache.crop(0)
        cache.crop(-4)
    assert_same(*caches)
    append(caches, 3, seed=7)
    assert_same(*caches)
    assert fused.layers[0].keys.data_ptr() == before
    with pytest.raises(ValueError, match="crop takes minus the number of tokens to remove, or 0, got 4"):
        fused.crop(4)


@pytest.mark.parametrize("use", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_batch_operations(caches, use):
    """What beam search and its relatives do to a cache, repeated and followed by more tokens."""
    argument = (3,) if use == "batch_repeat_interleave" else (torch.tensor([1, 1]),)
    batch = 2
    for cache in caches:
        getattr(cache, use)(*argument)  # before the first token
    append(caches, 5)
    for step in range(2):
        for cache in caches:
            getattr(cache, use)(*argument)
        assert_same(*caches)
        batch *= 3 if use == "batch_repeat_interleave" else 1
        append(caches, 4, batch=batch, seed=10 * step)
        assert_same(*caches)


def test_a_tensor_of_the_users_is_never_written(caches):
    """Keys assigned from outside are copied before the first write, also after a crop or a reordering."""
    fused, _ = caches
    append([fused], 4)
    theirs = torch.ones(2, HEADS, 6, HEAD_DIM)
    for layer in fused.layers:
        layer.keys, layer.values = theirs, theirs
    fused.crop(-2)
    fused.reorder_cache(torch.tensor([1, 0]))
    append([fused], 1)
    assert torch.equal(theirs, torch.ones_like(theirs))
    assert fused.get_seq_length() == 5


def test_reuse_after_reset_with_another_batch(caches):
    """A reset cache takes states of any batch size and dtype."""
    fused, _ = caches
    append([fused], 4)
    fused.reset()
    assert fused.get_seq_length() == 0
    fresh = [fused, DynamicCache(config=config())]
    append(fresh, 3, batch=5)
    assert_same(*fresh)


def pickled(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_are_independent_and_hold_the_used_part_only(duplicate):
    """A copy equals the original, both can go on by themselves, and the spare room is not copied."""
    cache, stock = FusedKVCache(config(), max_cache_len=50), DynamicCache(config=config())
    append([cache, stock], 10)
    other = duplicate(cache)
    assert other.max_cache_len == 50
    assert other.nbytes == cache.nbytes // 5
    append([cache], 3, seed=50)
    append([other, stock], 2, seed=60)
    assert_same(other, stock)
    assert cache.get_seq_length() == 13


def test_iterates_like_dynamic_cache(caches):
    """The legacy view: (keys, values, window) a layer."""
    append(caches, 4)
    for (keys, values, _), (stock_keys, stock_values, _) in zip(*caches, strict=True):
        assert torch.equal(keys, stock_keys)
        assert torch.equal(values, stock_values)


def hybrid_changes():
    types = ["sliding_attention", "full_attention", "full_attention"]
    return {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}


def test_hybrid_models_keep_their_sliding_layers():
    """Only full attention is replaced; windowed layers forget as transformers' own do."""
    fused, stock = FusedKVCache(config(**hybrid_changes())), DynamicCache(config=config(**hybrid_changes()))
    assert type(fused.layers[0]) is DynamicSlidingWindowLayer
    for step in range(20):
        append([fused, stock], 1, seed=step)
        assert_same(fused, stock)
    assert fused.nbytes > 0


def test_leaves_inference_mode():
    """A cache filled in inference mode goes on outside of it, as DynamicCache does."""
    cache, stock = FusedKVCache(config(), max_cache_len=20), DynamicCache(config=config())
    with torch.inference_mode():
        append([cache, stock], 4)
    append([cache, stock], 2, seed=1)
    assert_same(cache, stock)
    with torch.inference_mode():
        append([cache, stock], 2, seed=2)
    assert_same(cache, stock)


def test_gradients_flow_through_the_cache():
    """States that require grad are concatenated: gradients reach the tokens of both calls, and of earlier ones."""
    gradients = []
    for cache in (FusedKVCache(config()), DynamicCache(config=config())):
        first = make(2, HEADS, 3, HEAD_DIM, requires_grad=True)
        second = make(2, HEADS, 2, HEAD_DIM, seed=1, requires_grad=True)
        cache.update(first, first, 0)
        keys, values = cache.update(second, second, 0)
        loss = (keys.square() * values).sum()
        with torch.no_grad():
            cache.layers[0].crop(-1)
            cache.update(second[:, :, :1], second[:, :, :1], 0)  # must not write into what backward needs
        loss.backward()
        gradients.append((first.grad, second.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_is_like_dynamic_cache_to_generate():
    """The flags by which generate() chooses its paths: can be cropped, is not compiled."""
    cache = FusedKVCache(config())
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.nbytes == 0


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
    """Every edit, in both orders: the cache goes on with what was assigned, as DynamicCache does."""
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
    """The two go on with lengths and dtypes of their own; edited alike later, they are one again."""
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


def test_an_edit_that_does_not_fit_is_the_next_updates_error(caches):
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
    """Keys and values that were made to require a gradient, in place or by assignment, get it."""
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
    """`.data` of what was handed out, as DynamicCache's."""
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


def test_copies_only_where_somebody_holds_a_view():
    """Reading costs no copy, nor do crops and reorderings, once the readers are gone."""
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
    append([cache], 1)  # kept is of no buffer any more
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
    """Append candidates, look at all keys, take some back: what assisted and prompt lookup decoding do each step."""
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
    """Keys that were saved for the queries' gradient stay as they were while the cache goes on and is cropped."""
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


# ---- dtypes ---------------------------------------------------------------------------------------------------------

HALF, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize("spare", [None, 40])
@pytest.mark.parametrize(
    "dtypes",
    [
        [(HALF, HALF), (WIDE, WIDE), (HALF, HALF)],
        [(WIDE, WIDE), (HALF, HALF)],
        [(HALF, HALF), (WIDE, HALF), (HALF, WIDE)],
        [(HALF, HALF), (torch.float16, torch.float16), (HALF, HALF)],
        [(WIDE, HALF), (WIDE, HALF), (WIDE, HALF)],
        [(WIDE, WIDE), (torch.float64, WIDE)],
        [(WIDE, HALF), (HALF, HALF), (HALF, HALF)],
    ],
)
def test_dtypes_promote(dtypes, spare):
    """States of another dtype than the cache's, keys and values each: all tokens get the dtype of torch.cat."""
    caches = FusedKVCache(config(1), expected_len=spare), DynamicCache(config=config(1))
    for step, (key_dtype, value_dtype) in enumerate(dtypes):
        for tokens in (3, 1, 2):
            keys, values = (make(2, HEADS, tokens, HEAD_DIM, seed=10 * step + i) for i in range(2))
            results = [cache.update(keys.to(key_dtype), values.to(value_dtype), 0) for cache in caches]
            for pair in zip(*results, strict=True):
                same(*pair)
            assert_same(*caches)
    kept = caches[0].layers[0].keys
    assert caches[0].nbytes >= kept.nbytes
    if spare:
        layer = caches[0].layers[0]
        assert caches[0].nbytes == sum(t.nbytes // t.shape[2] * spare for t in (layer.keys, layer.values))


def test_a_promoted_cache_stays_in_place():
    """One move for the new dtype, none for the tokens after it."""
    cache = FusedKVCache(config(1), max_cache_len=40)
    half, wide = make(2, HEADS, 2, HEAD_DIM, dtype=HALF), make(2, HEADS, 2, HEAD_DIM)
    cache.update(half, half, 0)
    cache.update(wide, wide, 0)
    before = cache.layers[0].keys.data_ptr()
    for states in (half, wide, half):
        cache.update(states, states, 0)
        assert cache.layers[0].keys.data_ptr() == before


# ---- errors and interrupts ------------------------------------------------------------------------------------------


def contents(cache):
    return [tuple(map(copy.deepcopy, (layer.keys, layer.values))) for layer in cache.layers]


def assert_contents(cache, expected):
    for layer, (keys, values) in zip(cache.layers, expected, strict=True):
        same(layer.keys, keys)
        same(layer.values, values)


BAD_STATES = {
    "batch": (make(3, HEADS, 1, HEAD_DIM), make(3, HEADS, 1, HEAD_DIM)),
    "heads of the values": (make(2, HEADS, 1, HEAD_DIM), make(2, HEADS + 1, 1, HEAD_DIM)),
    "head_dim": (make(2, HEADS, 1, HEAD_DIM + 1), make(2, HEADS, 1, HEAD_DIM)),
    "tokens": (make(2, HEADS, 1, HEAD_DIM), make(2, HEADS, 2, HEAD_DIM)),
    "dimensions": (make(HEADS, 1, HEAD_DIM), make(HEADS, 1, HEAD_DIM)),
    "dtype and batch": (make(1, HEADS, 1, HEAD_DIM).double(), make(1, HEADS, 1, HEAD_DIM).double()),
}


@pytest.mark.parametrize("states", BAD_STATES.values(), ids=BAD_STATES)
@pytest.mark.parametrize("spare", [None, 40])
def test_states_that_do_not_fit_change_nothing(states, spare):
    """An error, whether there is room for them or not; the cache goes on as if it had not been called."""
    caches = FusedKVCache(config(), expected_len=spare), DynamicCache(config=config())
    append(caches, 4)
    append(caches, 4 if spare is None else 2, seed=50)
    for layer in range(LAYERS):
        with pytest.raises((RuntimeError, IndexError)):
            caches[0].update(*states, layer)
    assert_same(*caches)
    append(caches, 3, seed=60)
    assert_same(*caches)


@pytest.mark.parametrize("fails", [1, 2])
def test_out_of_memory_changes_nothing(monkeypatch, caches, fails):
    """The allocation of either buffer fails: in growing, in moving away from what is kept, in promoting."""

    def allocate(*args, **kwargs):
        nonlocal fails
        fails -= 1
        if fails == 0:
            raise torch.OutOfMemoryError("no memory")
        return new_empty(*args, **kwargs)

    new_empty = torch.Tensor.new_empty
    first = fails
    for dtype, kept in ((torch.float32, False), (torch.float64, False), (torch.float32, True)):
        append(caches, 3, seed=50)
        keeps = [list(cache) for cache in caches] if kept else []
        states = make(2, HEADS, 1 if kept else 9, HEAD_DIM).to(dtype)
        fails = first
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", allocate)
            with pytest.raises(torch.OutOfMemoryError):
                caches[0].update(states, states, 0)
        assert_same(*caches)
        for cache in caches:
            cache.update(states, states, 0)
            for layer in range(1, LAYERS):
                cache.update(states, states, layer)
        assert_same(*caches)
        del keeps


class Interrupt:
    """Raises KeyboardInterrupt before the `at`-th line that is run of the cache's own code."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != torch_fused.hf.cache.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


INTERRUPTED = {
    "append": lambda cache: append([cache], 1, seed=70),
    "append and grow": lambda cache: append([cache], 9, seed=70),
    "promote": lambda cache: [cache.update(*[make(2, HEADS, 1, HEAD_DIM).double()] * 2, i) for i in range(LAYERS)],
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reset": lambda cache: cache.reset(),
    "read": lambda cache: list(cache),
}


@pytest.mark.parametrize("held", ["buffers", "kept", "edited"])
@pytest.mark.parametrize("call", INTERRUPTED.values(), ids=INTERRUPTED)
def test_an_interrupt_anywhere(call, held):
    """After an interrupt at any line each layer is as before the call or as after it, keys and values alike."""

    def start():
        cache = FusedKVCache(config(), expected_len=8)
        append([cache], 6)
        if held == "edited":
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
        return cache, [tuple(pair[:2]) for pair in cache] if held == "kept" else None

    cache, kept = start()
    before = contents(cache)
    call(cache)
    after = contents(cache)
    for at in itertools.count(1):
        cache, kept = start()
        sys.settrace(Interrupt(at))
        try:
            call(cache)
        except KeyboardInterrupt:
            sys.settrace(None)
            for layer, *states in zip(cache.layers, before, after, strict=True):
                assert any(is_same(layer, *pair) for pair in states)
            if kept is not None:
                assert all(map(torch.equal, itertools.chain(*kept), itertools.chain(*before)))
            continue
        finally:
            sys.settrace(None)
        break
    assert at > LAYERS
    assert_contents(cache, after)


def is_same(layer, keys, values):
    if keys is None or not layer.is_initialized:
        return keys is None and layer.get_seq_length() == 0
    pairs = (layer.keys, keys), (layer.values, values)  # their dtype may be the new one already
    return layer.get_seq_length() == keys.shape[2] and all(torch.equal(a.double(), b.double()) for a, b in pairs)


@pytest.mark.parametrize("call", ["append", "crop", "advance"])
@pytest.mark.parametrize("reached", range(1, LAYERS))
def test_an_interrupted_call_is_told_and_mended(caches, call, reached):
    """Layers of unequal length: the next forward, update or step says so and changes nothing; crop(0) mends it."""
    fused, stock = caches
    append(caches, 6)
    append(caches, 1, seed=50)
    states = make(2, HEADS, 2, HEAD_DIM)
    if call == "append":
        fused.get_mask_sizes(2, 0)
        for layer in range(reached):
            fused.update(states, states, layer)
    else:

        def stop(tokens):
            raise KeyboardInterrupt

        setattr(fused.layers[reached], call, stop)
        with pytest.raises(KeyboardInterrupt):
            fused.crop(-2) if call == "crop" else (fused.room_for(2), fused.advance(2))
        delattr(fused.layers[reached], call)
    lengths = [layer.get_seq_length() for layer in fused.layers]
    assert len(set(lengths)) == 2
    message = f"the first layers hold {lengths[0]} tokens and the last {lengths[-1]}"
    for use in (
        lambda: fused.update(states, states, 0),
        lambda: fused.get_mask_sizes(1, 0),
        lambda: fused.is_uniform(torch.float32, torch.device("cpu"), 2),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert [layer.get_seq_length() for layer in fused.layers] == lengths
    again = copy.deepcopy(fused)
    with pytest.raises(ValueError, match=message):
        again.get_mask_sizes(1, 0)
    fused.crop(0)
    stock.crop(-2 if call == "crop" else 0)
    assert_same(*caches)
    append(caches, 1, seed=60)
    assert_same(*caches)
    again.crop(-3)  # from each layer; they still are unequal
    with pytest.raises(ValueError, match="an earlier call was interrupted"):
        again.get_mask_sizes(1, 0)
    again.reset()
    append([again], 2)


def test_an_interrupted_prompt_is_told():
    """The first layers hold the prompt, the others nothing: a model's next forward says so."""
    model = Qwen2ForCausalLM(config()).eval()
    ids = torch.arange(6)[None]
    stopped = model.model.layers[1].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    cache = FusedKVCache(model.config)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        stopped.remove()
        for _ in range(2):
            with pytest.raises(ValueError, match="an earlier prompt was interrupted: the first layers held"):
                model(ids, past_key_values=cache)
        cache.reset()
        logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_an_interrupted_generation_goes_on(patched, layer):
    """Interrupted between two layers in generate(): told, mended, and the tokens are those of a new cache."""
    model = Qwen2ForCausalLM(config()).eval()
    ids = torch.arange(6)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache, calls = FusedKVCache(model.config), itertools.count()

    def stop(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt

    def generate():
        return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)

    with apply_torch_fused(model, decode=False) if patched else contextlib.nullcontext():
        stopped = model.model.layers[layer].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            generate()
        stopped.remove()
        with pytest.raises(ValueError, match="an earlier call was interrupted"):
            model(ids[:, :1], past_key_values=cache)
        cache.crop(0)
        cache.crop(min(0, ids.shape[1] - 1 - cache.get_seq_length()))
        assert torch.equal(generate(), expected)


def test_layers_that_a_caller_made_unequal_are_not_an_interrupt(caches):
    """A budget of its own for each layer, one token apart, as compression leaves it."""
    append(caches, 6)
    append(caches, 1, seed=50)
    for cache in caches:
        for layer in cache.layers[1:]:
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    for step in range(3):
        append(caches, 1, seed=60 + step)
        assert_same(*caches)
        assert caches[0].get_mask_sizes(1, 0) == caches[1].get_mask_sizes(1, 0)
        for cache in caches:
            cache.crop(-1 if step == 1 else 0)
    assert_same(*caches)


@pytest.mark.parametrize("filled", [False, True])
def test_one_layer_may_be_used_alone(caches, filled):
    """A caller who fills the first layer, then the second, is not taken for an interrupt."""
    states = make(2, HEADS, 2, HEAD_DIM)
    if filled:
        append(caches, 4)
    for layer in (0, 0, 0, 1, 1):
        for cache in caches:
            cache.update(states, states, layer)
            cache.crop(0)
        assert_same(*caches)


def test_layers_that_a_model_does_not_have():
    """A model without its last layers goes on with a cache for all of them."""
    model = Qwen2ForCausalLM(config()).eval()
    del model.model.layers[1:]
    ids = torch.arange(6)[None]
    caches = FusedKVCache(model.config), DynamicCache(config=model.config)
    for _ in range(3):
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits)


def test_linear_attention_cannot_be_mended():
    """A hybrid model's state is past the token that crop would take back."""
    cache = FusedKVCache(config(3))
    cache.layers[1] = LinearAttentionLayer()
    states = make(2, HEADS, 2, HEAD_DIM)
    for index in (0, 2, 0):
        cache.get_mask_sizes(2, 0)
        cache.update(states, states, index)
    with pytest.raises(ValueError, match="linear attention cannot go back: reset"):
        cache.crop(0)


# ---- transformers and torch around it -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"kwargs": {"seq": 1}}, {"cache_kwargs": {"cos": 1}}, {"sin": 2}])
def test_what_transformers_hands_to_update_arrives(caches, arguments):
    """Layers take what they do not know, and a caller's own layer gets it."""
    got = []

    class Layer(DynamicLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            got.append((args, kwargs))
            return super().update(key_states, value_states)

    for cache in caches:
        cache.layers[1] = Layer()
        for layer in range(LAYERS):
            cache.update(make(2, HEADS, 1, HEAD_DIM), make(2, HEADS, 1, HEAD_DIM), layer, 5, **arguments)
    assert got == [((5,), arguments)] * 2
    assert_same(*caches)


def test_compiles_without_graph_breaks():
    """One graph; what was kept stays there too."""
    cache, stock = FusedKVCache(config(), max_cache_len=40), DynamicCache(config=config())

    def step(cache, states):
        for layer in range(LAYERS):
            keys, values = cache.update(states, states + 1, layer)
        return keys - values

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (4, 1, 1, 1):
            states = make(2, HEADS, tokens, HEAD_DIM)
            assert torch.equal(compiled(cache, states), step(stock, states))
            kept = [cache.layers[0].keys, cache.layers[2].values]
            before = [states.clone() for states in kept]
            cache.crop(-1), stock.crop(-1)
        compiled(cache, states), step(stock, states)
        assert all(map(torch.equal, kept, before))
        assert_same(cache, stock)
        cache.update(states, states, 0), stock.update(states, states, 0)
        assert_same(cache, stock)


TRANSFORMS = {
    "jvp": lambda run, states: torch.func.jvp(run, (states,), (states.cos(),))[1],
    "vmap": lambda run, states: torch.vmap(run, in_dims=3)(states[..., None].expand(-1, -1, -1, 3)),
    "grad": lambda run, states: torch.func.grad(lambda states: run(states).sum())(states),
    "vjp": lambda run, states: torch.func.vjp(run, states)[1](torch.ones(2))[0],
    "hessian": lambda run, states: torch.func.hessian(lambda states: run(states).sum())(states),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms(transform, filled, grad):
    """torch.func through the cache, behind tokens that were there before or not: DynamicCache's values."""
    results = []
    for cache in (FusedKVCache(config(1), max_cache_len=40), DynamicCache(config=config(1))):
        if filled:
            with torch.no_grad():
                cache.update(*[make(2, 1, 1, 2, seed=5)] * 2, 0)

        def run(states, cache=cache):
            states = states[..., None].expand(2, 1, 2, 2)
            cache.update(states, states * 2, 0)
            keys, values = cache.update(states.sin(), states * 3, 0)
            return (keys * values).sum((1, 2, 3))

        with torch.set_grad_enabled(grad):
            results.append(transform(run, make(2, 1, 2)))
    torch.testing.assert_close(*results)


def test_dual_numbers(caches):
    """Forward-mode differentiation without torch.func: the tangents of both calls are kept."""
    states, tangent = make(2, HEADS, 2, HEAD_DIM), make(2, HEADS, 2, HEAD_DIM, seed=1)
    append(caches, 3)
    tangents = []
    for cache in caches:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(states, tangent)
            cache.update(dual, dual * 2, 0)
            tangents.append([forward_ad.unpack_dual(result).tangent for result in cache.update(dual, states, 0)])
    torch.testing.assert_close(*tangents)


# ---- the same calls on both caches, at random -----------------------------------------------------------------------


class Walk:
    """Random calls on a FusedKVCache and a DynamicCache, with tensors that a caller keeps of each.

    After each call the two hold the same, in the same dtype, and so do the tensors kept of them: what is written to one
    is seen where the other shows it, and nowhere else.
    """

    def __init__(self, seed, edits=True, gradients=False, **arguments):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.config = config(self.random.choice([1, 3]))
        self.caches = [FusedKVCache(self.config, **arguments), DynamicCache(config=self.config)]
        self.kept, self.leaves = [], []
        self.batch, self.edits, self.gradients = 2, edits, gradients
        self.dtype = self.random.choice([torch.float32, torch.float16])
        self.calls = [*[self.update] * 20, *[self.keep] * 3, *[self.crop] * 3, self.forget, self.reorder]
        self.calls += [self.write, self.write_kept, self.reset, self.duplicate]
        if edits:
            self.calls += [self.select, self.repeat, self.offload, self.edit, self.edit_one, self.prepend, self.convert]

    def go(self, steps):
        for _ in range(steps):
            self.random.choice(self.calls)()
            if self.random.random() < 0.2:  # reading keys and values is a call too
                self.compare()
        self.compare()

    def compare(self):
        fused, stock = self.caches
        assert fused.get_seq_length() == stock.get_seq_length()
        for ours, theirs in zip(fused.layers, stock.layers, strict=True):
            same(ours.keys, theirs.keys)
            same(ours.values, theirs.values)
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        for index in range(len(fused.layers)):
            assert fused.get_mask_sizes(2, index) == stock.get_mask_sizes(2, index)
        for ours, theirs in self.kept:
            same(ours, theirs)

    def both(self, call):
        """Calls it with each cache; where DynamicCache raises, the other must, and neither changes."""
        stock = self.caches[1]
        before = [(layer.keys, layer.values, layer.is_initialized) for layer in stock.layers]
        try:
            theirs = call(stock)
        except (RuntimeError, IndexError):
            for layer, (keys, values, is_initialized) in zip(stock.layers, before, strict=True):
                layer.keys, layer.values, layer.is_initialized = keys, values, is_initialized
            with pytest.raises((RuntimeError, IndexError)):
                call(self.caches[0])
            return None
        return call(self.caches[0]), theirs

    def layers(self):
        index = self.random.randrange(len(self.caches[0].layers))
        return [cache.layers[index] for cache in self.caches]

    def states(self, dtype):
        states = torch.randn(self.batch, self.tokens, HEADS, HEAD_DIM, generator=self.generator).to(dtype)
        if self.gradients and self.random.random() < 0.3:
            self.leaves.append(states.requires_grad_())
        return states.transpose(1, 2)

    # What a caller may do.

    def update(self):
        self.tokens = self.random.choice([0, 1, 1, 1, 2, 7])
        mixed = self.edits and self.random.random() < 0.1
        for index in range(len(self.caches[0].layers)):
            dtypes = self.random.choices([torch.float32, torch.bfloat16], k=2) if mixed else [self.dtype] * 2
            keys, values = map(self.states, dtypes)
            results = self.both(lambda cache, k=keys, v=values, i=index: cache.update(k, v, i))
            if results is not None:
                for pair in zip(*results, strict=True):
                    same(*pair)
                    if self.random.random() < 0.1:
                        self.kept.append(pair)

    def keep(self):
        values = self.random.choice([0, 1])
        if self.random.random() < 0.5:
            pairs = zip(*(next(iter(cache)) for cache in self.caches), strict=True)
            self.kept += [pair for pair in pairs if pair[0] is not None]
        else:
            layers = self.layers()
            if layers[0].is_initialized:
                self.kept.append(tuple((layer.keys, layer.values)[values] for layer in layers))

    def forget(self):
        self.kept = self.kept[len(self.kept) // 2 :]

    def crop(self):
        tokens = -self.random.choice([0, 1, 1, 2, 5])
        if OLD and not all(layer.is_initialized for layer in self.caches[1].layers):
            return
        self.both(lambda cache: cache.crop(tokens))

    def indices(self, count):
        return torch.tensor([self.random.randrange(self.batch) for _ in range(count)])

    def reorder(self):
        indices = self.indices(self.batch)
        self.both(lambda cache: cache.reorder_cache(indices))

    def select(self):
        indices = self.indices(self.random.choice([1, 2]))
        self.both(lambda cache: cache.batch_select_indices(indices))
        self.batch = self.held_batch()

    def repeat(self):
        if self.batch < 6:
            self.both(lambda cache: cache.batch_repeat_interleave(2))
            self.batch = self.held_batch()

    def held_batch(self):
        keys = self.caches[1].layers[0].keys
        return keys.shape[0] if keys is not None and keys.dim() == 4 else self.batch

    def reset(self):
        if self.random.random() < 0.3:
            self.both(reset)
            self.batch = 2

    def edit(self):
        """Some first and some last tokens of all layers, one tensor after the other."""
        first, last = self.random.choice([(0, 2), (1, 2), (2, 0), (0, 0), (3, 1)])
        names = self.random.sample(["keys", "values"], 2)

        def some(states):
            return torch.cat([states[:, :, :first], states[:, :, states.shape[2] - last :]], 2)

        def only(states):
            return states[:, :, states.shape[2] - min(last, states.shape[2]) :]

        chosen = some if first else only
        for cache in self.caches:
            for layer in cache.layers:
                for name in names:
                    states = getattr(layer, name)
                    if states is not None and states.dim() == 4 and states.shape[2] >= last:
                        setattr(layer, name, chosen(states))

    def edit_one(self):
        """Only the keys or only the values of one layer; then back, or not."""
        layers = self.layers()
        name = self.random.choice(["keys", "values"])
        back = self.random.random() < 0.8
        if layers[1].keys is None or layers[1].keys.dim() != 4:
            return
        before = [getattr(layer, name) for layer in layers]
        for layer in layers:
            setattr(layer, name, getattr(layer, name)[:, :, :-1])
        self.compare()
        if self.random.random() < 0.5:
            self.update()
        elif back:
            for layer, states in zip(layers, before, strict=True):
                setattr(layer, name, states)

    def prepend(self):
        names = self.random.sample(["keys", "values"], 2)
        for layers in zip(*(cache.layers for cache in self.caches), strict=True):
            for name in names:
                states = getattr(layers[1], name)
                if states is not None and states.dim() == 4:
                    prefix = torch.randn(*states.shape[:2], 2, HEAD_DIM, generator=self.generator).to(states.dtype)
                    for layer in layers:
                        setattr(layer, name, torch.cat([prefix, getattr(layer, name)], 2))

    def convert(self):
        dtype, name = self.random.choice([torch.float32, torch.bfloat16]), self.random.choice(["keys", "values"])
        for layer in self.layers():
            if layer.is_initialized:
                setattr(layer, name, getattr(layer, name).to(dtype))

    def duplicate(self):
        if not self.leaves:  # torch copies no tensor with a history
            self.caches = list(map(self.random.choice([copy.deepcopy, pickled]), self.caches))

    def offload(self):
        for layer in self.layers():
            layer.offload()
            layer.prefetch()

    def write(self):
        for layer in self.layers():
            if layer.is_initialized and not layer.keys.requires_grad:
                layer.keys.mul_(2)
                layer.values[..., :1] = 3

    def write_kept(self):
        if self.kept:
            for states in self.random.choice(self.kept):
                if not states.requires_grad:
                    states.add_(1)


def same(ours, theirs):
    if theirs is None or theirs.shape == (0,):
        assert ours is None or ours.numel() == 0
        return
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad


WALKS = [{}, {"edits": False, "expected_len": 30}, {"gradients": True}]


@pytest.mark.parametrize("arguments", WALKS, ids=["all calls", "no edits", "gradients"])
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 1500), marks=pytest.mark.full)], ids=["few", "many"])
def test_random_calls(arguments, seeds):
    for seed in seeds:
        with torch.set_grad_enabled("gradients" in arguments):
            Walk(seed, **arguments).go(40)
