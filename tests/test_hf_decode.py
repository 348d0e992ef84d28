"""A model's steps as one op: stock's tokens where it applies, and where it does not, with the reason in the report."""

import contextlib
import copy
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from test_hf_generate import FAMILIES, Streamer, make_model, prompt
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer

from torch_fused.hf import FusedKVCache, apply_torch_fused, generate, loop
from torch_fused.hf.cache import CACHE
from torch_fused.metal import emulate
from torch_fused.testing import relative_error


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def padded(batch, tokens, seed=0):
    """A batch of prompts, all but the first padded on the left, and their mask."""
    ids = prompt(batch, tokens, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : min(tokens - 1, row * tokens // batch)] = 0
    return {"input_ids": ids.where(mask == 1, 0), "attention_mask": mask}


def calls(handle):
    """How many calls ran as one op, and the reasons why others did not."""
    lines = handle.report().splitlines()
    ours = [int(found[1]) for line in lines if (found := re.match(r" +(\d+) calls as one op", line))]
    return sum(ours), [line.split(": ", 1)[1] for line in lines if "calls left" in line]


# ---- stock's tokens and logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [1, 7, 128, 2048])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_stocks(family, tokens, batch):
    """256 tokens in float32, behind prompts of every length, padded on the left: the patched model and hf.generate."""
    model = make_model(family, seed=3)
    inputs = padded(batch, tokens)
    options = {"do_sample": False, "max_new_tokens": 256}
    expected = model.generate(**inputs, **options)
    assert torch.equal(generate(model, inputs, **options), expected)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(**inputs, **options), expected)
        assert calls(handle)[0] == 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_against_float64(family, dtype):
    """Ten tokens one by one and three at once, by the weights as they are: 1e-4 in float32, else stock's own error."""
    model = make_model(family, dtype=dtype, layers=4)
    exact_model = copy.deepcopy(model).double()
    inputs, more = padded(4, 20), prompt(4, 13, seed=9)

    def logits(model, cache):
        mask = inputs["attention_mask"]
        results = [model(**inputs, **{CACHE: cache}, use_cache=True).logits[:, -1:]]
        for new in (*more[:, :10].split(1, 1), more[:, 10:]):
            mask = nn.functional.pad(mask, (0, new.shape[1]), value=1)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
            output = model(new, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True)
            results.append(output.logits)
        return torch.cat(results[1:], 1)

    with torch.no_grad():
        exact = logits(exact_model, DynamicCache(config=model.config))
        stock = relative_error(logits(model, DynamicCache(config=model.config)), exact)
        with apply_torch_fused(model) as handle:
            fused = relative_error(logits(model, FusedKVCache(model.config)), exact)
            assert calls(handle)[0] == 11
    assert fused <= (1e-4 if dtype == torch.float32 else stock)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 48},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True},
        {"attn_implementation": "eager"},
    ],
    ids=str,
)
def test_configurations(changes):
    """Tied embeddings, numbers of heads, rotary types, biases, eager attention: one op a token, stock's tokens."""
    model = make_model("qwen3" if "head_dim" in changes else "llama", **changes)
    inputs, options = padded(2, 30), {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate(**inputs, **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(**inputs, **options), expected)
        assert calls(handle)[0] == 59


def test_long_context():
    """Behind 5000 tokens of context, filled in parts."""
    model = make_model(max_position_embeddings=8192)
    options = {"do_sample": False, "max_new_tokens": 20, "prefill_chunk_size": 1000}
    expected = model.generate(prompt(1, 5000), **options)
    assert torch.equal(generate(model, prompt(1, 5000), **options), expected)


def test_no_copy_of_the_weights():
    """What a step allocates is the size of activations, whatever the size of the weights."""
    model = make_model(hidden_size=256, intermediate_size=1024, vocab_size=4096, tie_word_embeddings=True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    apply_torch_fused(model)
    with torch.no_grad():
        cache = FusedKVCache(model.config, expected_len=64)
        model(prompt(1, 20), **{CACHE: cache})
        model(prompt(1, 1), **{CACHE: cache})
        with torch.profiler.profile(profile_memory=True) as profile:
            model(prompt(1, 1), **{CACHE: cache})
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert 4096 * 4 <= allocated < weights / 20


# ---- what is left to transformers -----------------------------------------------------------------------------------


class Lora(nn.Module):
    """What an adapter that is not merged makes of a linear layer."""

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


LEFT_MODELS = {
    "hook": (lambda m: m.model.layers[0].mlp.register_forward_hook(lambda *_: None), "hooks on model.layers.0.mlp"),
    "pre-hook": (lambda m: m.model.embed_tokens.register_forward_pre_hook(lambda *_: None), "hooks on model.embed_tok"),
    "accelerate": (
        lambda m: add_hook_to_module(m.model.layers[1], ModelHook()),
        "forward of a layer has been replaced",
    ),
    "adapter": (add_lora, "q_proj is a test_hf_decode.Lora"),
    "subclass": (use_module, "down_proj is a test_hf_decode.Doubled"),
    "replaced forward": (replace_forward, "the forward of mlp has been replaced"),
    "quantised": (quantize, "q_proj is a torch.ao.nn.quantized.dynamic.modules.linear.Linear"),
    "tensor subclass": (use_subclass, "is a test_hf_decode.use_subclass.<locals>.Sharded"),
    "other activation": (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()), "activation is torch.nn.mod"),
    "compiled layer": (lambda m: m.model.layers[0].compile(backend="eager"), "a layer is compiled by torch.compile"),
    "bias": (lambda m: setattr(m.lm_head, "bias", nn.Parameter(torch.ones(128))), "lm_head has a bias"),
    "epsilon": (lambda m: setattr(m.model.norm, "variance_epsilon", 0.1), "several epsilons of norms"),
}


@pytest.mark.parametrize(
    ("case", "when"),
    # To compile a layer that the op stands for changes nothing.
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
        assert calls(handle)[1][-1] == "the model is in training mode and has attention dropout"


def test_angles_that_depend_on_the_length():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model(rope_parameters=parameters, max_position_embeddings=32)
    options = {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert "rotary embedding is 'dynamic'" in handle.report()


def test_sliding_window():
    model = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    options = {"do_sample": False, "max_new_tokens": 30}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        output = model.generate(prompt(1, 9), return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, expected)
        assert type(output[CACHE].layers[0]) is DynamicSlidingWindowLayer
        assert "layers that are not plain attention" in calls(handle)[1][-1]


def one_step(model, new=1, held=None, **kwargs):
    """Logits of `new` tokens behind nine that two sequences hold already."""
    cache = FusedKVCache(model.config) if held is None else held
    with torch.no_grad():
        model(prompt(2, 9), **{CACHE: cache})
    arguments = {"input_ids": prompt(2, new, seed=3), CACHE: cache, **kwargs}
    return model(**arguments)


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
    "attention maps": ({"output_attentions": True}, "output_attentions is on"),
    "hidden states": ({"output_hidden_states": True}, "output_hidden_states is on"),
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.ones(2, 1, 64)}, "inputs_embeds instead of input_ids"),
    "loss": ({"new": 2, "labels": prompt(2, 2)}, "a loss is wanted"),
    "no cache": ({CACHE: None, "use_cache": False}, "use_cache is off"),
    "tuple": ({"return_dict": False}, "a tuple is wanted"),
    "mask in four dimensions": (
        {"attention_mask": four_dimensional(torch.arange(10) != 5)},
        "not of shape (batch, tok",
    ),
    "mask with a hole": ({"attention_mask": with_holes()}, "not left padding alone"),
    "right padding": ({"attention_mask": right_padded()}, "not left padding alone"),
    "some logits": ({"logits_to_keep": torch.tensor([0])}, "logits_to_keep is a tensor"),
    "many tokens": ({"new": 9}, "more than 8 new tokens"),
    "another argument": ({"cu_seq_lens_q": torch.tensor([0, 1])}, "an argument that only transformers knows: cu_seq"),
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
    """A cache of another kind is left; one of another batch size is transformers' to refuse."""
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
            assert "another batch size" in calls(handle)[1][-1]


def last_tokens(layer, tokens):
    layer.keys = layer.keys[:, :, -tokens:]
    layer.values = layer.values[:, :, -tokens:]


EDITS = {
    "alike": (lambda cache: [last_tokens(layer, 5) for layer in cache.layers], ""),
    "read": (lambda cache: list(cache), ""),
    "cropped": (lambda cache: cache.crop(-3), ""),
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), ""),
    "one layer longer": (lambda cache: [last_tokens(layer, 5) for layer in cache.layers[1:]], "layers differ"),
    "one tensor": (lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys.double()), "another dtype"),
    "dtype of a late layer": (
        lambda cache: cache.layers[-1].update(*[torch.zeros(2, 2, 1, 16).double()] * 2),
        "differ",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_cache_that_was_edited(edit):
    """The op runs behind what the caller left there, or the call is transformers'; the logits are the same."""
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
            except RuntimeError as error:  # float64 behind float32 weights, say
                outcomes.append(type(error))
        if isinstance(outcomes[0], list):
            torch.testing.assert_close(outcomes[1], outcomes[0])
        else:
            assert outcomes[1] == outcomes[0]
        assert calls(handle)[0] == (0 if reason else 3)
        assert reason in calls(handle)[1][-1]


def test_what_was_kept_stays():
    """The op writes into no tensor that a caller took out of the cache, and moves nothing once they are gone."""
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
    """A step behind layers of unequal length is an error that says how to go on, in the model and in generate()."""
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
    """Old code calls it past_key_values, code for a newer transformers cache."""
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
    """What surrounds a call; the op runs again when it is over."""
    model = make_model()
    with apply_torch_fused(model) as handle:
        logits = one_step(model).logits  # gradients are on outside of the prompt
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
    """A step computes with the weights' own dtype under autocast too: nearer to the exact logits than stock is."""
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
    """With nothing to differentiate, gradients may stay enabled."""
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
    """In place, by a new state dict, to another dtype: the op sees the model as it is."""
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


def test_goes_on_with_either():
    """The cache of a generation is continued with and without the op."""
    model = make_model()
    options = {"do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(prompt(1, 9), max_new_tokens=60, **options).sequences
    output = generate(model, prompt(1, 9), max_new_tokens=20, **options)
    with apply_torch_fused(model, decode=False):
        output = model.generate(output.sequences, **{CACHE: output[CACHE]}, max_new_tokens=20, **options)
    output = generate(model, output.sequences, **{CACHE: output[CACHE]}, max_new_tokens=20, **options)
    assert torch.equal(output.sequences, expected)
    assert output[CACHE].get_seq_length() == 68


# ---- what does not turn the step off --------------------------------------------------------------------------------


def test_hooks_that_transformers_leaves():
    """One call for hidden states or attentions leaves hooks on the layers: they are idle, and a user's are not."""
    model = make_model(attn_implementation="eager")
    options = {"do_sample": False, "max_new_tokens": 10}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        model.generate(prompt(1, 9), **options)
        with torch.no_grad():
            states = model(prompt(1, 9), output_hidden_states=True, output_attentions=True).hidden_states
        assert len(states) == 3
        assert all(layer._forward_hooks for layer in model.model.layers)
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert torch.equal(generate(model, prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 27
        asked = {**options, "return_dict_in_generate": True, "output_hidden_states": True}
        assert len(model.generate(prompt(1, 9), **asked).hidden_states) == 10
        assert calls(handle)[0] == 27
        seen = []
        hook = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert "hooks on model.layers.1" in handle.report()
        assert len(seen) == 10
        hook.remove()
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 36


def test_embeddings_that_require_gradients():
    """enable_input_require_grads leaves a hook, which matters where gradients are enabled."""
    model = make_model().requires_grad_(False)
    model.enable_input_require_grads()
    with apply_torch_fused(model) as handle:
        with torch.no_grad():
            one_step(model)
        assert calls(handle)[0] == 1
        assert one_step(model).logits.requires_grad
        assert "gradients are enabled" in calls(handle)[1][-1]


@pytest.mark.parametrize("way", ["argument", "config", "the model's config"])
def test_stop_strings(way):
    """Wherever they come from: the loop is ours, a step behind on a GPU, and the tokens are stock's."""
    model = make_model()
    tokens = model.generate(prompt(1, 9), max_new_tokens=30, do_sample=False)[0].tolist()
    stop = ["".join(chr(0x21 + token) for token in tokens[20:22])]
    characters = Tokenizer(BPE({chr(0x21 + token): token for token in range(128)}, []))
    characters.decoder = Fuse()
    options = {"do_sample": False, "tokenizer": PreTrainedTokenizerFast(tokenizer_object=characters)}
    if way == "config":
        options["generation_config"] = GenerationConfig(max_new_tokens=30, stop_strings=stop)
    else:
        options["max_new_tokens"] = 30
    if way == "argument":
        options["stop_strings"] = stop
    elif way == "the model's config":
        model.generation_config.stop_strings = stop
    expected = model.generate(prompt(1, 9), **options)
    assert expected.shape[1] < 39
    with apply_torch_fused(model) as handle:
        with torch.profiler.profile() as profile:
            assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert "aten::argmax" not in {event.key for event in profile.key_averages()}
        assert torch.equal(generate(model, prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 2 * (expected.shape[1] - 10)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop, "runs_ahead", lambda device: True)
            assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 3 * (expected.shape[1] - 10) + 1


@pytest.mark.parametrize("use_cache", [True, None])
def test_a_loop_by_hand(use_cache):
    """The caller gives no cache at first, and hands back what the model returns: one op a token, stock's logits."""

    def loop(model):
        ids, cache, logits = prompt(2, 9), None, []
        for _ in range(12):
            output = model(ids, **{CACHE: cache}, use_cache=use_cache)
            cache = output[CACHE]
            logits.append(output.logits[:, -1])
            ids = logits[-1].argmax(-1, keepdim=True)
        return torch.stack(logits), cache

    model = make_model()
    with torch.no_grad():
        expected, _ = loop(model)
        with apply_torch_fused(model) as handle:
            logits, cache = loop(model)
            assert type(cache) is FusedKVCache
            assert calls(handle) == (11, ["the cache is empty (a prompt)"])
            torch.testing.assert_close(logits, expected)
            # A prompt alone takes no more memory than in a DynamicCache.
            assert model(prompt(2, 9))[CACHE].nbytes == 2 * 2 * 2 * 2 * 9 * 16 * 4
            assert model(prompt(2, 9), use_cache=False).get(CACHE) is None
        with apply_torch_fused(model, cache=False) as handle:
            loop(model)
            assert calls(handle)[0] == 0
            assert "no cache was given" in calls(handle)[1]
    with apply_torch_fused(model):
        assert type(model(prompt(1, 3))[CACHE]) is DynamicCache  # gradients are enabled
        model.model.norm.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert type(model(prompt(1, 3))[CACHE]) is DynamicCache  # the step could not use another


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kinds_of_integers(dtype):
    """Token ids, masks and positions as int32: as stock takes them."""
    model = make_model()
    mask = torch.ones(2, 10, dtype=dtype)
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -1:].to(dtype)
    arguments = {"input_ids": prompt(2, 1, seed=3).to(dtype), "attention_mask": mask, "position_ids": positions}
    options = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected = one_step(model, held=DynamicCache(config=model.config), **arguments).logits
        tokens = model.generate(prompt(2, 9), **options)
        with apply_torch_fused(model) as handle:
            torch.testing.assert_close(one_step(model, **arguments).logits, expected)
            assert torch.equal(model.generate(prompt(2, 9).to(dtype), **options).long(), tokens)
            assert torch.equal(generate(model, prompt(2, 9).to(dtype), **options).long(), tokens)
            assert calls(handle)[0] == 15


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": prompt(2, 1).float()},
        {"input_ids": prompt(2)},
        {"position_ids": torch.full((2, 1), -1)},
        {"position_ids": torch.full((2, 1), 9.0)},
        {"position_ids": torch.full((1, 1), 9)},
        {"position_ids": torch.full((3, 2, 1), 9)},
    ],
    ids=lambda arguments: f"{next(iter(arguments))} {tuple(next(iter(arguments.values())).shape)}",
)
def test_arguments_that_are_transformers_to_judge(arguments):
    """The same logits, or the same exception."""
    model = make_model()
    results = []
    for patch in (False, True):
        if patch:
            apply_torch_fused(model)
        cache = FusedKVCache(model.config) if patch else DynamicCache(config=model.config)
        try:
            results.append(one_step(model, held=cache, **arguments).logits.detach())
        except Exception as error:
            results.append(type(error))
    if isinstance(results[0], type):
        assert results[1] is results[0]
    else:
        torch.testing.assert_close(results[1], results[0])


def test_more_than_eight_sequences():
    """Told apart from a prompt."""
    model = make_model()
    expected = model.generate(prompt(9, 5), max_new_tokens=6, do_sample=False)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(9, 5), max_new_tokens=6, do_sample=False), expected)
        assert calls(handle) == (0, ["the cache is empty (a prompt)", "more than 8 sequences"])


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "under accelerate"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "frozen base"])
def test_rollouts_of_a_trainer(wrapped, adapter):
    """What TRL's trainers do between steps of training: generate under no_grad, in training mode, with parameters that
    require gradients, checkpointing turned off and on again, in accelerate's wrapper for mixed precision."""
    model = make_model().train()
    stock = copy.deepcopy(model)
    inputs = padded(4, 9)
    options = {"do_sample": False, "max_new_tokens": 12, "use_cache": True}
    with apply_torch_fused(model) as handle:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision="bf16" if wrapped else "no")
        trained = accelerator.prepare(model)
        if adapter:
            model.requires_grad_(False)
            model.lm_head.requires_grad_(True)
        model.enable_input_require_grads()
        for _ in range(2):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
            trained(**inputs, labels=inputs["input_ids"]).loss.backward()
            model.zero_grad()
            unwrapped = accelerator.unwrap_model(trained)
            unwrapped.gradient_checkpointing_disable()
            before = calls(handle)[0]
            with torch.no_grad():
                tokens = unwrapped.generate(**inputs, **options)
                assert calls(handle)[0] == before + 11
                assert tokens.shape == (4, 21)
                if not wrapped:
                    assert torch.equal(tokens, stock.generate(**inputs, **options))


def test_a_wrapper_of_the_models_forward():
    """Somebody's function around the model's forward is called for every token, and the step runs inside of it."""
    stock, patched = make_model(), make_model()
    options = {"do_sample": False, "max_new_tokens": 12}
    with apply_torch_fused(patched) as handle:
        for model in (stock, patched):
            original = model.forward

            def flipped(*args, original=original, **kwargs):
                output = original(*args, **kwargs)
                output.logits = -output.logits
                return output

            model.forward = flipped
        expected = stock.generate(prompt(1, 9), **options)
        assert torch.equal(patched.generate(prompt(1, 9), **options), expected)
        assert torch.equal(generate(patched, prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 22
        patched.forward = original

    def flip(module, args, output):
        output.logits.neg_()

    for model in (stock, patched):
        model.__dict__.pop("forward", None)
        model.register_forward_hook(flip)
        assert torch.equal(generate(model, prompt(1, 9), **options), expected)


# ---- the loop of hf.generate ----------------------------------------------------------------------------------------


class AfterTokens(StoppingCriteria):
    """Ends each sequence at its own length."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


LOOPS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95},
    "min-p": {"do_sample": True, "min_p": 0.05, "top_k": 0},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3},
    "least tokens": {"do_sample": False, "min_new_tokens": 10, "eos_token_id": list(range(64))},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked": {"do_sample": False, "prefill_chunk_size": 3},
    "scores": {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "dict": {"do_sample": True, "return_dict_in_generate": True},
    "attentions": {"do_sample": False, "return_dict_in_generate": True, "output_attentions": True},
    "criteria": {"do_sample": False, "stopping_criteria": StoppingCriteriaList([AfterTokens([30, 20])])},
    "ends": {"do_sample": False, "eos_token_id": [3, 5, 9, 40, 41, 42, 43, 44, 45]},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
    "no tokens": {"do_sample": False, "max_new_tokens": 1},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_loop_does_what_transformers_does(loop):
    """The same result as `model.generate` of the patched model, whose draws the seed fixes; for the greedy ones stock's
    too."""
    model = make_model(attn_implementation="eager")
    inputs = padded(2 if loop != "lookup" else 1, 12)
    options = {"max_new_tokens": 40, **LOOPS[loop]}
    stock = model.generate(**inputs, **options)
    with apply_torch_fused(model):
        torch.manual_seed(1)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(1)
        output = generate(model, inputs, **options)
    if isinstance(expected, torch.Tensor):
        expected, output, stock = ({"sequences": value} for value in (expected, output, stock))
    assert list(output) == list(expected)
    assert torch.equal(output["sequences"], expected["sequences"])
    if not options["do_sample"]:
        assert torch.equal(output["sequences"], stock["sequences"])
    for name in ("scores", "logits"):
        if name in expected:
            torch.testing.assert_close(torch.stack(output[name]), torch.stack(expected[name]))


def test_only_token_ids_leave_the_op():
    """A greedy or sampled token costs the op and the bookkeeping of the loop; no logits reach Python."""
    model = make_model()
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 10}):
        with torch.profiler.profile() as profile:
            generate(model, prompt(1, 9), max_new_tokens=11, **options)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["torch_fused::decode_token_"] == 10
        assert counts["aten::linear"] == 7 * 2 + 1  # of the prompt


def test_assistant():
    model, assistant = make_model(), make_model(seed=5)
    options = {"do_sample": False, "max_new_tokens": 40, "assistant_model": assistant}
    expected = model.generate(prompt(1, 6), **options)
    assert torch.equal(generate(model, prompt(1, 6), **options), expected)


def test_a_hook_in_the_middle():
    """Somebody registers a hook while tokens are streamed: from then on it is called, and the tokens stay right."""
    model = make_model()
    expected = model.generate(**padded(2, 9), max_new_tokens=40, do_sample=False)
    seen = []

    class Hooking(Streamer):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 18 + 2 * 20:
                model.model.norm.register_forward_hook(lambda *_: seen.append(1))
            if len(self.tokens) == 18 + 2 * 30:
                model.model.norm._forward_hooks.clear()

    assert torch.equal(generate(model, padded(2, 9), max_new_tokens=40, do_sample=False, streamer=Hooking()), expected)
    assert len(seen) == 10
