"""FusedKVCache contains the same as DynamicCache, with fewer copies."""

import copy
import io
import pickle

import pytest
import torch
from torch.autograd import forward_ad
from transformers import DynamicCache, Qwen2Config
from transformers.cache_utils import DynamicLayer

import torch_fused.hf.cache
from torch_fused.hf import FusedKVCache
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


# DynamicCache in older transformers keeps its tokens in a reset, writes zeros over them, and crops no empty cache.
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


def same(ours, theirs):
    if theirs is None or theirs.shape == (0,):
        assert ours is None or ours.numel() == 0
        return
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad


@pytest.fixture
def caches():
    return FusedKVCache(config()), DynamicCache(config=config())


def test_append_through_several_growths(caches):
    """A prompt, then single tokens past the 1.5x boundary several times: every result is the same as DynamicCache's."""
    for step, tokens in enumerate([5, *[1] * 30, 7, 0, 40, 1]):
        (keys, values), (stock_keys, stock_values) = append(caches, tokens, seed=100 * step)
        assert torch.equal(keys, stock_keys)
        assert torch.equal(values, stock_values)
        assert_same(*caches)


def test_appending_moves_nothing_while_there_is_room(caches):
    """The buffers do not move, so the cost of a token depends only on its own size."""
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
    """If the final length is known, nothing is ever moved, and nbytes corresponds exactly to that length."""
    cache = FusedKVCache(config(), **{argument: 100})
    append([cache], 3)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for step in range(97):
        append([cache], 1, seed=step)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert cache.nbytes == LAYERS * 2 * 100 * 2 * HEADS * HEAD_DIM * 4


def test_too_large_a_length_is_not_allocated_at_once(monkeypatch):
    """Above the limit for the whole cache it grows instead, but never beyond the known length."""
    token_bytes = LAYERS * 2 * 2 * HEADS * HEAD_DIM * 4
    monkeypatch.setattr(torch_fused.hf.cache, "ALLOCATE_AT_ONCE", 100 * token_bytes - 1)
    cache = FusedKVCache(config(), max_cache_len=100)
    append([cache], 80)
    assert cache.nbytes == 100 * token_bytes
    cache = FusedKVCache(config(), max_cache_len=100)
    append([cache], 40)
    assert cache.nbytes == 60 * token_bytes


def test_a_hint_is_not_a_limit():
    """More tokens than expected_len are accepted."""
    cache, stock = FusedKVCache(config(), expected_len=4), DynamicCache(config=config())
    append([cache, stock], 3)
    append([cache, stock], 9, seed=1)
    assert_same(cache, stock)


@pytest.mark.parametrize("hybrid", [False, True])
def test_full_is_an_error_that_changes_nothing(hybrid):
    """One token too many raises at the first layer, also a sliding one, and no layer has changed."""
    changes = hybrid_changes() if hybrid else {}
    cache = FusedKVCache(config(**changes), max_cache_len=6)
    append([cache], 5)
    before = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="max_cache_len is 6 tokens, 5 are in use, got 2 more"):
        append([cache], 2, seed=1)
    assert_same(cache, before)
    append([cache], 1, seed=1)
    assert cache.get_seq_length() == 6
    assert cache.get_max_length() == 6


def test_a_max_cache_len_of_zero_is_an_error():
    """max_cache_len=0 would be a cache without tokens."""
    with pytest.raises(ValueError, match="max_cache_len must be at least 1 or None, got 0"):
        FusedKVCache(config(), max_cache_len=0)


def test_crop_keeps_the_buffers(caches):
    """Cropped tokens are overwritten in place by the next ones."""
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
    with pytest.raises(ValueError, match="crop takes the negative number of tokens to remove, or 0, got 4"):
        fused.crop(4)


@pytest.mark.parametrize("use", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_batch_operations(caches, use):
    """The operations of beam search and similar algorithms, repeated and followed by more tokens."""
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


def test_a_users_tensor_is_never_written(caches):
    """Assigned keys are copied before the first write, also after a crop or a reordering."""
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
    """A reset cache accepts states of any batch size and dtype."""
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
    """A copy equals the original, both continue independently, and unused space is not copied."""
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
    """The legacy view: (keys, values, window) per layer."""
    append(caches, 4)
    for (keys, values, _), (stock_keys, stock_values, _) in zip(*caches, strict=True):
        assert torch.equal(keys, stock_keys)
        assert torch.equal(values, stock_values)


def hybrid_changes():
    types = ["sliding_attention", "full_attention", "full_attention"]
    return {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}


@pytest.mark.parametrize("spare", [0, 2, 64])
def test_sliding_layers_return_what_is_in_the_window(monkeypatch, spare):
    """The result of `update` and the mask sizes are the same as transformers', also after dropping tokens."""
    monkeypatch.setattr(torch_fused.hf.cache, "SPARE", spare)
    fused, stock = FusedKVCache(config(**hybrid_changes())), DynamicCache(config=config(**hybrid_changes()))
    assert fused.is_sliding == stock.is_sliding == [True, False, False]
    for step, tokens in enumerate([3, *[1] * 9, 4, 12, 1]):
        for layer in range(3):
            assert fused.get_mask_sizes(tokens, layer) == stock.get_mask_sizes(tokens, layer)
            keys = make(2, tokens, HEADS, HEAD_DIM, seed=step).transpose(1, 2)
            new = keys, keys + 1
            for ours, theirs in zip(*(cache.update(*new, layer) for cache in (fused, stock)), strict=True):
                assert torch.equal(ours, theirs)
            assert fused.get_seq_length(layer) == stock.get_seq_length(layer)
        fused = copy.deepcopy(fused) if step % 4 == 3 else fused


def sliding_cache(tokens, chunk=1, **options):
    """A cache of one sliding and two full layers with this many tokens, and all of their keys."""
    cache = FusedKVCache(config(**hybrid_changes()), **options)
    states = make(2, tokens, HEADS, HEAD_DIM).transpose(1, 2)
    for part in states.split(chunk, 2):
        for layer in range(3):
            cache.update(part, part + 1, layer)
    return cache, states


@pytest.mark.parametrize("options", [{}, {"expected_len": 3000}, {"max_cache_len": 3000}])
def test_sliding_layers_keep_little_more_than_the_window(options):
    """For any length of the sequence; after a long prompt, from the next token on."""
    for chunk in (1, 7, 2000):
        cache, states = sliding_cache(2001, chunk, **options)
        sliding, full = cache.layers[:2]
        assert cache.get_seq_length(0) == cache.get_seq_length(1) == 2001
        assert sliding.nbytes < full.nbytes / 15
        assert torch.equal(sliding.keys, states[:, :, -sliding.keys.shape[2] :])


def test_sliding_layers_are_cropped_while_they_have_the_window():
    cache, states = sliding_cache(500)
    cache.crop(-60)
    assert cache.get_seq_length(0) == 440
    keys, _ = cache.layers[0].update(states[:, :, 440:441], states[:, :, 440:441])
    assert torch.equal(keys, states[:, :, 433:441])
    with pytest.raises(RuntimeError, match="cannot crop 400 tokens: a layer with a window of 8"):
        cache.layers[0].crop(-400)
    assert cache.get_seq_length(0) == 441
    cache.reset()
    assert cache.get_seq_length(0) == 0
    recording = FusedKVCache(config(**hybrid_changes()))
    recording.activate_past_recording()
    for part in states.split(1, 2):
        recording.layers[0].update(part, part)
    recording.layers[0].crop(-490)
    assert torch.equal(recording.layers[0].keys, states[:, :, :10])


def test_a_crop_that_fails_in_one_layer_changes_none():
    """Also if the layers before it could be cropped."""
    types = ["full_attention", "full_attention", "sliding_attention"]
    cache = FusedKVCache(config(**{**hybrid_changes(), "layer_types": types}))
    states = make(2, 501, HEADS, HEAD_DIM).transpose(1, 2)
    for part in states[:, :, :500].split(1, 2):
        for layer in range(3):
            cache.update(part, part, layer)
    with pytest.raises(RuntimeError, match="cannot crop 400 tokens"):
        cache.crop(-400)
    assert [cache.get_seq_length(layer) for layer in range(3)] == [500] * 3
    for layer in range(3):
        keys, _ = cache.update(states[:, :, 500:], states[:, :, 500:], layer)
        assert torch.equal(keys, states[:, :, -keys.shape[2] :])


def test_leaves_inference_mode():
    """A cache filled in inference mode continues outside it, like DynamicCache."""
    cache, stock = FusedKVCache(config(), max_cache_len=20), DynamicCache(config=config())
    with torch.inference_mode():
        append([cache, stock], 4)
    append([cache, stock], 2, seed=1)
    assert_same(cache, stock)
    with torch.inference_mode():
        append([cache, stock], 2, seed=2)
    assert_same(cache, stock)


def test_gradients_flow_through_the_cache():
    """States that require grad are concatenated: gradients reach the tokens of both calls, and earlier ones."""
    gradients = []
    for cache in (FusedKVCache(config()), DynamicCache(config=config())):
        first = make(2, HEADS, 3, HEAD_DIM, requires_grad=True)
        second = make(2, HEADS, 2, HEAD_DIM, seed=1, requires_grad=True)
        cache.update(first, first, 0)
        keys, values = cache.update(second, second, 0)
        loss = (keys.square() * values).sum()
        with torch.no_grad():
            cache.layers[0].crop(-1)
            cache.update(second[:, :, :1], second[:, :, :1], 0)  # must not overwrite what backward needs
        loss.backward()
        gradients.append((first.grad, second.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_is_like_dynamic_cache_to_generate():
    """The flags with which generate() selects its path: croppable, not compileable."""
    cache = FusedKVCache(config())
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.get_max_length() == -1
    assert cache.nbytes == 0


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
    """States with another dtype than the cache, for keys and values each: all tokens get the dtype of torch.cat."""
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
    """One move for the new dtype, none for later tokens."""
    cache = FusedKVCache(config(1), max_cache_len=40)
    half, wide = make(2, HEADS, 2, HEAD_DIM, dtype=HALF), make(2, HEADS, 2, HEAD_DIM)
    cache.update(half, half, 0)
    cache.update(wide, wide, 0)
    before = cache.layers[0].keys.data_ptr()
    for states in (half, wide, half):
        cache.update(states, states, 0)
        assert cache.layers[0].keys.data_ptr() == before


# ---- transformers and torch around it -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{"kwargs": {"seq": 1}}, {"cache_kwargs": {"cos": 1}}, {"sin": 2}])
def test_further_arguments_reach_update(caches, arguments):
    """Layers accept unknown arguments, and a caller's own layer receives them."""
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
    """One graph; tensors that the caller kept do not change there either."""
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
    """torch.func through the cache, with and without earlier tokens: DynamicCache's values."""
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
