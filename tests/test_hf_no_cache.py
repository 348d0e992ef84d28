"""A step with labels and without a cache does not wait for a look at its positions."""

import warnings

import pytest
import torch
from test_hf_generate import FAMILIES, make_model, prompt
from transformers import DynamicCache, masking_utils
from transformers.utils import logging

from torch_fused.hf import apply_torch_fused
from torch_fused.hf.no_cache import NoCache
from torch_fused.hf.transformers_private import CACHE

IDS = prompt(2, 12)


def pair(family="qwen2", **settings):
    """A stock and a patched model in training."""
    stock, patched = (make_model(family, **settings).train() for _ in range(2))
    apply_torch_fused(patched)
    return stock, patched


@pytest.fixture
def looks(monkeypatch):
    """The position ids that transformers has looked at."""
    seen, own = [], masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: (seen.append(ids), own(ids))[1])
    return seen


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_look_and_the_same_outputs(family, attention, looks):
    """The loss, the logits and the names of the outputs, also if the layers have different windows."""
    stock, patched = pair(family, attn_implementation=attention)
    expected = stock(IDS, labels=IDS, use_cache=False)
    assert looks
    looks.clear()
    found = patched(IDS, labels=IDS, use_cache=False)
    assert not looks and list(found) == list(expected) and found.get(CACHE) is None
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_configuration_counts(return_dict, looks):
    """It has no cache; a tuple of outputs is left to transformers."""
    stock, patched = pair("llama", use_cache=False)
    expected = stock(IDS, labels=IDS, return_dict=return_dict)
    looks.clear()
    found = patched(IDS, labels=IDS, return_dict=return_dict)
    assert type(found) is type(expected) and len(found) == len(expected) and bool(looks) != return_dict
    torch.testing.assert_close(found[0], expected[0])


def test_packed_sequences_are_found(looks):
    """With the position ids of two sequences in a row."""
    stock, patched = pair()
    options = {"labels": IDS, "use_cache": False, "position_ids": torch.arange(6).repeat(2)[None]}
    expected = stock(IDS, **options)
    looks.clear()
    torch.testing.assert_close(patched(IDS, **options).loss, expected.loss)
    assert looks
    assert (stock(IDS, labels=IDS, use_cache=False).loss - expected.loss).abs() > 1e-4


def test_padding_counts():
    stock, patched = pair()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    options = {"labels": IDS, "use_cache": False, "attention_mask": mask}
    torch.testing.assert_close(patched(IDS, **options).loss, stock(IDS, **options).loss)


def caches_of_layers(model, **options):
    """The class of the cache that each layer gets, and the outputs."""
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(type(kwargs[CACHE])), with_kwargs=True)
    return seen, model(IDS, labels=IDS, **options)


def test_a_cache_that_is_wanted_is_there():
    """The model's own, or the caller's."""
    layers, outputs = caches_of_layers(pair()[1], use_cache=True)
    assert NoCache not in layers and outputs[CACHE].get_seq_length() == IDS.shape[1]
    cache = DynamicCache()
    layers, _ = caches_of_layers(pair()[1], use_cache=False, **{CACHE: cache})
    assert set(layers) == {DynamicCache} and cache.get_seq_length() == IDS.shape[1]


def test_a_layer_that_is_recomputed_has_none():
    """Transformers warns of a cache with gradient checkpointing."""
    _, patched = pair()
    patched.gradient_checkpointing_enable()
    logging.get_logger("transformers").warning_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layers, outputs = caches_of_layers(patched, use_cache=False)
        outputs.loss.backward()
    assert set(layers) == {type(None)}
