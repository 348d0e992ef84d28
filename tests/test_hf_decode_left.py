"""Models and calls that are left to transformers, with the reason in the report."""

import contextlib
import copy
import re

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from test_hf_decode import (
    calls,
    one_step,
    one_thread,  # noqa: F401 (a fixture)
)
from test_hf_generate import make_model, prompt
from torch import nn
from transformers import DynamicCache

from torch_fused.hf import FusedKVCache, apply_torch_fused, generate
from torch_fused.hf.cache import CACHE
from torch_fused.metal import emulate
from torch_fused.testing import relative_error


class Lora(nn.Module):
    """A linear layer with an unmerged adapter."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def add_lora(model):
    torch.manual_seed(0)
    layer = model.model.layers[1].self_attn
    layer.q_proj = Lora(layer.q_proj)


def replace_forward(model):
    module = model.model.layers[0].mlp
    original = module.forward
    module.forward = lambda x: original(x) * 0.5


def quantize(model):
    with contextlib.suppress(DeprecationWarning):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def use_subclass(model):
    class Sharded(nn.Parameter):
        pass

    layer = model.model.layers[0].mlp.up_proj
    layer.weight = Sharded(layer.weight.detach())


def use_module(model):
    model.model.layers[0].mlp.down_proj.__class__ = Doubled


def float64_norm(model):
    model.model.norm.double()


def reversed_layers(model):
    """Each keeps its place in the cache."""
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


LEFT_MODELS = {
    "hook": (lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *_: None), "model.layers.0.mlp has hooks"),
    "pre-hook": (lambda m: m.model.embed_tokens.register_forward_pre_hook(lambda *_: None), "embed_tokens has hooks"),
    "accelerate": (
        lambda m: add_hook_to_module(m.model.layers[1], ModelHook()),
        "forward of a layer has been replaced",
    ),
    "adapter": (add_lora, "q_proj is a test_hf_decode_left.Lora"),
    "subclass": (use_module, "down_proj is a test_hf_decode_left.Doubled"),
    "replaced forward": (replace_forward, "the forward of mlp has been replaced"),
    "quantised": (quantize, "q_proj is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "tensor subclass": (use_subclass, "is a test_hf_decode_left.use_subclass.<locals>.Sharded"),
    "other activation": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Tanh()), "activation is torch.nn.mod"),
    "compiled layer": (lambda m: m.model.layers[0].compile(backend="eager"), "a layer is compiled by torch.compile"),
    "bias": (lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(128))), "lm_head has a bias"),
    "order": (reversed_layers, "layer 0 keeps its tokens as layer 1"),
    "place": (lambda m: setattr(m.model.layers[1].self_attn, "layer_idx", 0), "layer 1 keeps its tokens as layer 0"),
    "epsilon": (lambda m: setattr(m.model.norm, "variance_epsilon", 0.1), "different epsilons of norms"),
}


@pytest.mark.parametrize(
    ("case", "when"),
    # Compiling a layer that the op replaces changes nothing.
    [
        (case, when)
        for case in LEFT_MODELS
        for when in ("before", "after")
        if (case, when) != ("compiled layer", "after")
    ],
)
def test_a_model_that_is_left(case, when):
    """Changed before it is patched or after some tokens: the changed model's own tokens, and the reason."""
    change, reason = LEFT_MODELS[case]
    model = make_model()
    options = {"do_sample": False, "max_new_tokens": 20}
    changed = copy.deepcopy(model)
    change(changed)
    expected = changed.generate(prompt(2, 9), **options)
    if when == "before":
        change(model)
        assert torch.equal(generate(model, prompt(2, 9), **options), expected)
    handle = apply_torch_fused(model)
    if when == "after":
        model.generate(prompt(2, 9), **options)
        assert calls(handle)[0] == 19
        change(model)
    before = calls(handle)[0]
    assert torch.equal(model.generate(prompt(2, 9), **options), expected)
    assert calls(handle)[0] == before
    assert f"decode: left to transformers: {reason}" in re.sub(r"left to transformers: .*(?=" + re.escape(reason) + ")",
        "left to transformers: ", handle.report())  # fmt: skip


def test_dropout_in_training_mode():
    model = make_model(attention_dropout=0.5).train()
    with apply_torch_fused(model) as handle, torch.no_grad():
        cache = FusedKVCache(model.config)
        for tokens in (9, 1):
            model(prompt(1, tokens), **{CACHE: cache})
        assert calls(handle)[1][-1] == "the model is in training mode and has dropout: call model.eval()"


def test_angles_that_depend_on_the_length():
    """A step is one op up to the length at which they change."""
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model(rope_parameters=parameters, max_position_embeddings=32)
    options = {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        taken, left = calls(handle)
        assert taken == 22
        assert "positions past 30, where this model's rotary tables or queries change" in left[-1]


def test_sliding_window():
    model = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    options = {"do_sample": False, "max_new_tokens": 30}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        output = model.generate(prompt(1, 9), return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, expected)
        assert output[CACHE].is_sliding == [True, True]
        assert output[CACHE].layers[0].keys.shape[2] == 38
        assert calls(handle)[0] == 29


def four_dimensional(visible):
    return torch.where(visible, 0.0, -torch.inf).expand(2, 1, 1, -1)


def with_holes():
    mask = torch.ones(2, 10)
    mask[1, 4:6] = 0
    return mask


def right_padded():
    mask = torch.ones(2, 10)
    mask[1, -1] = 0
    return mask


LEFT_CALLS = {
    "attention maps": ({"output_attentions": True}, "output_attentions is True"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states is True"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.ones(2, 1, 64)}, "inputs_embeds were passed"),
    "loss": ({"new": 2, "labels": prompt(2, 2)}, "labels were passed"),
    "no cache": ({CACHE: None, "use_cache": False}, "use_cache is False"),
    "tuple": ({"return_dict": False}, "return_dict is False"),
    "mask in four dimensions": (
        {"attention_mask": four_dimensional(torch.arange(10) != 5)},
        "not of shape (batch, tok",
    ),
    "mask with a hole": ({"attention_mask": with_holes()}, "not just left padding"),
    "right padding": ({"attention_mask": right_padded()}, "not just left padding"),
    "some logits": ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is a tensor"),
    "many tokens": ({"new": 9}, "more than 8 new tokens"),
    "another argument": ({"cu_seq_lens_q": torch.tensor([0, 1])}, "unsupported arguments: cu_seq"),
}


@pytest.mark.parametrize("case", LEFT_CALLS)
def test_a_call_that_is_left(case):
    """Stock's result, and the reason."""
    arguments, reason = LEFT_CALLS[case]
    model = make_model(attn_implementation="eager")
    with torch.no_grad():
        expected = one_step(model, held=DynamicCache(config=model.config), **arguments)
        with apply_torch_fused(model) as handle:
            output = one_step(model, **arguments)
            ours, reasons = calls(handle)
    assert ours == 0
    assert any(reason in line for line in reasons), reasons
    torch.testing.assert_close(output[0], expected[0])


@pytest.mark.parametrize("cache_class", [DynamicCache, None], ids=["dynamic", "wrong batch"])
def test_other_caches(cache_class):
    """Another kind of cache is left to transformers; for another batch size, transformers raises an error."""
    model = make_model()
    with apply_torch_fused(model) as handle:
        if cache_class is not None:
            expected = one_step(model)
            output = one_step(model, held=cache_class(config=model.config))
            torch.testing.assert_close(output.logits, expected.logits)
            assert "not a FusedKVCache" in calls(handle)[1][-1]
        else:
            with pytest.raises(RuntimeError):
                one_step(model, input_ids=prompt(3, 1))
            assert "different dtype, device or batch size" in calls(handle)[1][-1]


def last_tokens(layer, tokens):
    layer.keys = layer.keys[:, :, -tokens:]
    layer.values = layer.values[:, :, -tokens:]


EDITS = {
    "alike": (lambda cache: [last_tokens(layer, 5) for layer in cache.layers], ""),
    "read": (lambda cache: list(cache), ""),
    "cropped": (lambda cache: cache.crop(-3), ""),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), ""),
    "one layer longer": (lambda cache: [last_tokens(layer, 5) for layer in cache.layers[1:]], "layers differ"),
    "one tensor": (lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys.double()), "different dtype"),
    "dtype of a late layer": (
        lambda cache: cache.layers[-1].update(*[torch.zeros(2, 2, 1, 16).double()] * 2),
        "differ",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_cache_that_was_edited(edit):
    """The op continues after the edited tokens, or transformers runs the call; the logits are the same."""
    change, reason = EDITS[edit]
    model = make_model()
    with torch.no_grad(), contextlib.ExitStack() as stack:
        outcomes = []
        for cache in (DynamicCache(config=model.config), FusedKVCache(model.config)):
            handle = stack.enter_context(apply_torch_fused(model)) if outcomes else None
            model(prompt(2, 9), **{CACHE: cache})
            change(cache)
            try:
                outcomes.append([model(prompt(2, 1, seed=step), **{CACHE: cache}).logits for step in range(3)])
            except RuntimeError as error:  # for example float64 tokens with float32 weights
                outcomes.append(type(error))
        if isinstance(outcomes[0], list):
            torch.testing.assert_close(outcomes[1], outcomes[0])
        else:
            assert outcomes[1] == outcomes[0]
        assert calls(handle)[0] == (0 if reason else 3)
        assert reason in calls(handle)[1][-1]


def test_what_was_kept_stays():
    """The op does not write tensors that a caller took from the cache, and moves nothing once they are gone."""
    model = make_model()
    with torch.no_grad(), apply_torch_fused(model) as handle:
        cache = FusedKVCache(model.config, expected_len=64)
        model(prompt(2, 9), **{CACHE: cache})
        kept = [states for layer in cache for states in layer[:2]]
        before = [states.clone() for states in kept]
        cache.crop(-4)
        model(prompt(2, 3, seed=1), **{CACHE: cache})
        assert all(map(torch.equal, kept, before))
        places = [states.data_ptr() for layer in cache for states in layer[:2]]
        assert not {states.data_ptr() for states in kept}.intersection(places)
        del kept
        model(prompt(2, 1, seed=2), **{CACHE: cache})
        assert [states.data_ptr() for layer in cache for states in layer[:2]] == places
        assert calls(handle)[0] == 2


def test_a_step_after_an_interrupt():
    """A step after layers of unequal length is an error that says what to do, in the model and in generate()."""
    model = make_model()
    with torch.no_grad(), apply_torch_fused(model) as handle:
        cache = FusedKVCache(model.config)
        model(prompt(2, 9), **{CACHE: cache})
        expected = one_step(model).logits
        cache.get_mask_sizes(1, 0)
        cache.update(*[torch.zeros(2, *cache.layers[0].keys.shape[1:2], 1, cache.layers[0].keys.shape[3])] * 2, 0)
        for call in (
            lambda: model(prompt(2, 1, seed=3), **{CACHE: cache}),
            lambda: generate(model, prompt(2, 12), **{CACHE: cache}, max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match="an earlier call was interrupted"):
                call()
        cache.crop(0)
        assert torch.equal(model(prompt(2, 1, seed=3), **{CACHE: cache}).logits, expected)
        assert calls(handle)[0] == 2


@pytest.mark.parametrize("decode", [True, False])
def test_the_cache_by_either_name(decode):
    """Older code calls it past_key_values, code for newer transformers cache."""
    model = make_model()
    with torch.no_grad():
        expected = one_step(model, held=DynamicCache(config=model.config)).logits
        with apply_torch_fused(model, decode=decode):
            for name in ("past_key_values", CACHE):
                cache = FusedKVCache(model.config)
                model(prompt(2, 9), **{name: cache})
                logits = model(prompt(2, 1, seed=3), **{name: cache}).logits
                torch.testing.assert_close(logits, expected)
                model(prompt(2, 1, seed=4), None, None, cache)
                assert cache.get_seq_length() == 11


def test_gradients_and_emulation():
    """The op does not run in these contexts, and runs again after them."""
    model = make_model()
    with apply_torch_fused(model) as handle:
        logits = one_step(model).logits  # gradients are enabled outside the prompt
        assert logits.requires_grad
        assert "gradients are enabled" in calls(handle)[1][-1]
        with torch.no_grad():
            with emulate() as run:
                emulated = one_step(model).logits
            assert any("decode_product" in launch.kernel for launch in run.launches)
            assert calls(handle)[0] == 1
            fused = one_step(model).logits
        assert calls(handle)[0] == 2
        torch.testing.assert_close(fused, logits)
        torch.testing.assert_close(fused, emulated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """A step uses the weights' own dtype under autocast too: closer to the exact logits than stock."""
    model = make_model()
    exact = one_step(copy.deepcopy(model).double().requires_grad_(False), held=DynamicCache(config=model.config)).logits
    with torch.no_grad(), torch.autocast("cpu", dtype):
        stock = relative_error(one_step(model, held=DynamicCache(config=model.config)).logits, exact)
        with apply_torch_fused(model) as handle:
            logits = one_step(model).logits
            assert calls(handle)[0] == 1
    assert logits.dtype == torch.float32
    assert relative_error(logits, exact) <= stock


def test_frozen_weights_need_no_no_grad():
    """With nothing to differentiate, grad mode may stay on."""
    model = make_model().requires_grad_(False)
    with apply_torch_fused(model) as handle:
        assert not one_step(model).logits.requires_grad
        assert calls(handle)[0] == 1


def test_compiled_whole_model():
    """torch.compile traces transformers' own forward."""
    model = make_model()
    with torch.no_grad():
        expected = one_step(model).logits
        with apply_torch_fused(model):
            compiled = torch.compile(model, backend="eager")
            torch.testing.assert_close(one_step(compiled, held=FusedKVCache(model.config)).logits, expected)


def test_weights_may_change():
    """In place, by a new state dict, to another dtype: the op uses the current model."""
    model = make_model()
    with apply_torch_fused(model) as handle, torch.no_grad():
        one_step(model)
        for change in (
            lambda: model.model.layers[0].mlp.up_proj.weight.mul_(2),
            lambda: model.load_state_dict(make_model(seed=7).state_dict(), assign=True),
            lambda: model.bfloat16(),
            lambda: model.float(),
        ):
            change()
            before = calls(handle)[0]
            fused = one_step(model).logits
            assert calls(handle)[0] == before + 1
            stock = copy.deepcopy(model)
            for module in stock.modules():
                module.__dict__.pop("forward", None)
            assert relative_error(fused, one_step(stock).logits) < (1e-5 if model.dtype == torch.float32 else 3e-2)


def test_continues_with_and_without_the_op():
    """A generation's cache can be used with or without the op."""
    model = make_model()
    options = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(prompt(1, 9), max_new_tokens=60, **options).sequences
    output = generate(model, prompt(1, 9), max_new_tokens=20, **options)
    with apply_torch_fused(model, decode=False):
        output = model.generate(output.sequences, **{CACHE: output[CACHE]}, max_new_tokens=20, **options)
    output = generate(model, output.sequences, **{CACHE: output[CACHE]}, max_new_tokens=20, **options)
    assert torch.equal(output.sequences, expected)
    assert output[CACHE].get_seq_length() == 68
