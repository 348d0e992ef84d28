"""Random calls have the same effect on a FusedKVCache as on a DynamicCache."""

import copy
import random

import pytest
import torch
from test_hf_cache import HEAD_DIM, HEADS, OLD, config, pickled, reset, same
from transformers import DynamicCache

from torch_fused.hf import FusedKVCache


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
        if not self.leaves:  # torch cannot copy a tensor with a history
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


WALKS = [{}, {"edits": False, "expected_len": 30}, {"gradients": True}]


@pytest.mark.parametrize("arguments", WALKS, ids=["all calls", "no edits", "gradients"])
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 1500), marks=pytest.mark.full)], ids=["few", "many"])
def test_random_calls(arguments, seeds):
    for seed in seeds:
        with torch.set_grad_enabled("gradients" in arguments):
            Walk(seed, **arguments).go(40)
