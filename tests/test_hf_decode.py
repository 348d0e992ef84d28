"""A model's steps as one op: stock's tokens if the op supports them, and if not, with the reason in the report."""

import copy
import re

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_hf_generate import FAMILIES, make_model, prompt
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import nn
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast

from torch_fused.hf import FusedKVCache, apply_torch_fused, generate, loop
from torch_fused.hf.cache import CACHE
from torch_fused.testing import relative_error


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, waking threads costs more than it gains."""
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
    """The number of calls that ran as one op, and the reasons why others did not."""
    lines = handle.report().splitlines()
    ours = [int(found[1]) for line in lines if (found := re.match(r" +(\d+) calls as one op", line))]
    return sum(ours), [line.split(": ", 1)[1] for line in lines if "calls left" in line]


def one_step(model, new=1, held=None, **kwargs):
    """Logits of `new` tokens after nine tokens in the cache, for two sequences."""
    cache = FusedKVCache(model.config) if held is None else held
    with torch.no_grad():
        model(prompt(2, 9), **{CACHE: cache})
    arguments = {"input_ids": prompt(2, new, seed=3), CACHE: cache, **kwargs}
    return model(**arguments)


# ---- stock's tokens and logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [1, 7, 128, 2048])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_stocks(family, tokens, batch):
    """256 tokens in float32, after prompts of every length, left-padded: the patched model and hf.generate."""
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
    """Ten tokens one by one and three at once, with the exact weights: 1e-4 in float32, else stock's own error."""
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
    """Tied embeddings, numbers of heads, rotary types, biases, eager attention: one op per token, stock's tokens."""
    model = make_model("qwen3" if "head_dim" in changes else "llama", **changes)
    inputs, options = padded(2, 30), {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate(**inputs, **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(**inputs, **options), expected)
        assert calls(handle)[0] == 59


def test_long_context():
    """After 5000 tokens of context, filled in parts."""
    model = make_model(max_position_embeddings=8192)
    options = {"do_sample": False, "max_new_tokens": 20, "prefill_chunk_size": 1000}
    expected = model.generate(prompt(1, 5000), **options)
    assert torch.equal(generate(model, prompt(1, 5000), **options), expected)


def test_no_copy_of_the_weights():
    """A step's allocations have the size of activations, for any size of the weights."""
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


# ---- what does not turn the step off --------------------------------------------------------------------------------


def test_hooks_that_transformers_leaves():
    """A call for hidden states or attentions leaves idle hooks on the layers; a user's hooks are not idle."""
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
        assert "model.layers.1 has hooks" in handle.report()
        assert len(seen) == 10
        hook.remove()
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert calls(handle)[0] == 36


def test_embeddings_that_require_gradients():
    """enable_input_require_grads leaves a hook, which matters only if gradients are enabled."""
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
    """From any source: the loop is ours, one step ahead on a GPU, and the tokens are stock's."""
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
def test_a_handwritten_loop(use_cache):
    """The caller passes no cache at first, then the returned one: one op per token, stock's logits."""

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
            # A prompt takes no more memory than in a DynamicCache.
            assert model(prompt(2, 9))[CACHE].nbytes == 2 * 2 * 2 * 2 * 9 * 16 * 4
            assert model(prompt(2, 9), use_cache=False).get(CACHE) is None
        with apply_torch_fused(model, cache=False) as handle:
            loop(model)
            assert calls(handle)[0] == 0
            assert "no cache was passed" in calls(handle)[1]
    with apply_torch_fused(model):
        assert type(model(prompt(1, 3))[CACHE]) is DynamicCache  # gradients are enabled
        model.model.norm.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            assert type(model(prompt(1, 3))[CACHE]) is DynamicCache  # the step could not use another


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kinds_of_integers(dtype):
    """Token ids, masks and positions may be int32, as in stock."""
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
def test_arguments_that_transformers_checks(arguments):
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
    """Distinguished from a prompt."""
    model = make_model()
    expected = model.generate(prompt(9, 5), max_new_tokens=6, do_sample=False)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(9, 5), max_new_tokens=6, do_sample=False), expected)
        assert calls(handle) == (0, ["the cache is empty (a prompt)", "more than 8 sequences"])


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "under accelerate"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "frozen base"])
def test_rollouts_of_a_trainer(wrapped, adapter):
    """Like TRL's trainers between training steps: generate under no_grad, in training mode, with parameters that
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
    """A function around the model's forward is called for every token, and the step runs inside it."""
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
