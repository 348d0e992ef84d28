"""FusedKVCache holds what DynamicCache holds, in fewer copies."""

import copy
import io
import pickle
import random

import pytest
import torch
from transformers import DynamicCache, Qwen2Config
from transformers.cache_utils import DynamicSlidingWindowLayer

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
            self.both(lambda cache: cache.reset())
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
