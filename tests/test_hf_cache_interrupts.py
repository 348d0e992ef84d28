"""Errors of a FusedKVCache, and its state after an interrupted call."""
# ruff: noqa: F811 (a fixture is imported)

import contextlib
import copy
import itertools
import sys

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
    same,
    sliding_cache,
)
from transformers import DynamicCache, Qwen2ForCausalLM
from transformers.cache_utils import LinearAttentionLayer

import torch_fused.hf.cache
from torch_fused.hf import FusedKVCache, apply_torch_fused
from torch_fused.testing import make


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
    """An error, with or without room for them; the cache continues as if it had not been called."""
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
    """The allocation of either buffer fails: when growing, when moving away from kept tensors, when promoting."""

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
    """Raises KeyboardInterrupt before the `at`-th executed line of the cache's code."""

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
    """After an interrupt at any line, each layer is as before or after the call, for keys and values alike."""

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
def test_an_interrupted_call_is_reported_and_repaired(caches, call, reached):
    """Layers of unequal length: the next forward, update or step raises and changes nothing; crop(0) repairs it."""
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
    message = f"the first layers have {lengths[0]} tokens, the last has {lengths[-1]}"
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


def test_an_interrupted_prompt_is_reported():
    """The first layers have the prompt, the others nothing: the model's next forward raises."""
    model = Qwen2ForCausalLM(config()).eval()
    ids = torch.arange(6)[None]
    stopped = model.model.layers[1].register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    cache = FusedKVCache(model.config)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        stopped.remove()
        for _ in range(2):
            with pytest.raises(ValueError, match="an earlier prompt was interrupted: the first layers have"):
                model(ids, past_key_values=cache)
        cache.reset()
        logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_an_interrupted_generation_can_continue(patched, layer):
    """Interrupted between two layers in generate(): reported, repaired, and the tokens are those of a new cache."""
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
    """Each layer has its own budget, one token apart, as after compression."""
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
    """A caller who fills the first layer, then the second, is not mistaken for an interrupt."""
    states = make(2, HEADS, 2, HEAD_DIM)
    if filled:
        append(caches, 4)
    for layer in (0, 0, 0, 1, 1):
        for cache in caches:
            cache.update(states, states, layer)
            cache.crop(0)
        assert_same(*caches)


def test_layers_that_a_model_does_not_have():
    """A model without its last layers can use a cache for all of them."""
    model = Qwen2ForCausalLM(config()).eval()
    del model.model.layers[1:]
    ids = torch.arange(6)[None]
    caches = FusedKVCache(model.config), DynamicCache(config=model.config)
    for _ in range(3):
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits for cache in caches]
        torch.testing.assert_close(*logits)


def test_linear_attention_cannot_be_repaired():
    """A hybrid model's state has already advanced past the token that crop would remove."""
    cache = FusedKVCache(config(3))
    cache.layers[1] = LinearAttentionLayer()
    states = make(2, HEADS, 2, HEAD_DIM)
    for index in (0, 2, 0):
        cache.get_mask_sizes(2, 0)
        cache.update(states, states, index)
    with pytest.raises(ValueError, match="linear attention cannot be cropped; reset"):
        cache.crop(0)


def test_an_interrupted_drop_loses_nothing(monkeypatch):
    """After an interrupt at any line, the tokens in the cache are those after the dropped ones."""
    monkeypatch.setattr(torch_fused.hf.cache, "SPARE", 1)
    for line in itertools.count():
        cache, states = sliding_cache(9)
        layer, count = cache.layers[0], itertools.count()

        def trace(frame, event, _, count=count, line=line):
            if frame.f_code.co_filename == torch_fused.hf.cache.__file__ and event == "line" and next(count) == line:
                raise KeyboardInterrupt
            return trace

        before = layer.get_seq_length()
        sys.settrace(trace)
        try:
            for token in states.split(1, 2):
                layer.update(token, token + 1)
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        given = torch.cat([states, states], 2)[:, :, : layer.get_seq_length()]
        assert layer.get_seq_length() >= before
        assert torch.equal(layer.keys, given[:, :, layer.dropped :])
        assert torch.equal(layer.values, given[:, :, layer.dropped :] + 1)
    assert line > 20 and layer.dropped > 0
