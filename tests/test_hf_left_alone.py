"""What apply_torch_fused leaves to transformers and to foreign code around modules."""

import operator
import warnings

import pytest
import torch
import transformers
from test_hf_generate import make_model, prompt
from test_hf_patch import kernels, wrap
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, StableLmConfig, StableLmForCausalLM
from transformers.activations import SiLUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.utils import ModelOutput

from torch_fused.hf import apply_torch_fused, generate


class HalvedRMSNorm(Qwen2RMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / 2


def test_a_subclass_is_left_alone():
    """A norm or layer that is not exactly the expected class keeps its own forward, and the result does not change."""
    model = make_model()
    model.model.layers[0].post_attention_layernorm.__class__ = HalvedRMSNorm
    model.model.norm.__class__ = HalvedRMSNorm
    with torch.no_grad():
        expected = model(prompt(1, 4)).logits
        apply_torch_fused(model)
        torch.testing.assert_close(model(prompt(1, 4)).logits, expected)
    assert "forward" not in model.model.norm.__dict__


MODULES = ("", "model", "model.norm", "model.rotary_emb", "model.embed_tokens", "lm_head", "model.layers.0")
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "mlp.down_proj")


@pytest.mark.parametrize("name", [*MODULES, *(f"model.layers.0.{part}" for part in PARTS)])
def test_a_subclass_that_comes_later(name):
    """A patched module that gets another class has that class's forward in the next call, as in transformers."""
    models = make_model(), make_model()
    models[1].load_state_dict(models[0].state_dict())
    apply_torch_fused(models[1])
    found = []
    for model in models:
        tokens = model.generate(prompt(2, 5), max_new_tokens=3, do_sample=False)
        module, calls = model.get_submodule(name), []
        own = type(module)

        class Counted(own):
            def forward(self, *args, own=own, calls=calls, **kwargs):
                calls.append(1)
                return own.forward(self, *args, **kwargs)

        module.__class__ = Counted
        again = model.generate(prompt(2, 5), max_new_tokens=3, do_sample=False)
        loss = model(input_ids=prompt(2, 5), labels=prompt(2, 5)).loss
        assert torch.equal(again, tokens)
        found.append((tokens.tolist(), len(calls), loss))
    assert found[1][:2] == found[0][:2]
    torch.testing.assert_close(found[1][2], found[0][2])


def test_wrapped_and_compiled_modules_are_left_and_reported():
    """The report counts what was patched and says why a module was not."""
    model = make_model()
    layer = model.model.layers[0]
    wrap(layer.post_attention_layernorm)
    layer.input_layernorm.compile(backend="eager")
    handle = apply_torch_fused(model, decode=False)
    assert handle.report().splitlines() == [
        "torch_fused on Qwen2ForCausalLM",
        "     3 x Qwen2RMSNorm.forward",
        "     2 x Qwen2DecoderLayer.forward",
        "     2 x Qwen2Attention.forward",
        "     1 x Qwen2RotaryEmbedding.forward",
        "     2 x Qwen2MLP.forward",
        "     1 x Qwen2ForCausalLM._prepare_cache_for_generation",
        "     1 x Qwen2ForCausalLM.forward",
        "     1 x Linear.forward",
        "     1 x Qwen2ForCausalLM.generate",
        "  not patched: model.layers.0.input_layernorm: it is compiled by torch.compile",
        "  not patched: model.layers.0.post_attention_layernorm: "
        "its forward is already replaced by somebody.logging_forward",
        "  loss: computed without the logits in memory",
    ]
    with torch.no_grad():
        assert kernels(layer.post_attention_layernorm.forward, torch.ones(1, 64))["aten::rsqrt"] == 1


def altered(function):
    """A replacement for a function, with a different result."""

    def change(result):
        if isinstance(result, tuple):
            return (change(result[0]), *result[1:])
        if isinstance(result, ModelOutput):
            result[next(iter(result))] = change(result[next(iter(result))])
            return result
        return (
            None if result is None else result.roll(1, -1) if result.dtype == torch.bool else result.roll(1, -1) * 0.9
        )

    def mine(*args, **kwargs):
        return change(function(*args, **kwargs))

    return mine


REPLACED = {
    **{f"Qwen2{name}": (modeling_qwen2, f"Qwen2{name}.forward") for name in (
        "RMSNorm", "RotaryEmbedding", "Attention", "MLP", "DecoderLayer", "Model", "ForCausalLM"
    )},
    **{name: (modeling_qwen2, name) for name in (
        "apply_rotary_pos_emb", "rotate_half", "eager_attention_forward", "repeat_kv", "create_causal_mask"
    )},
    "Linear": (nn, "Linear.forward"),
    "Embedding": (nn, "Embedding.forward"),
    "activation": (transformers.activations, "SiLUActivation.forward"),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_function_is_called(name, when, monkeypatch):
    """On a class, or in transformers' module, before the patch, right after it or after some tokens: the model with
    both gives what the model with the replacement alone gives, and so it is when that is taken away again."""
    module, path = REPLACED[name]
    target = f"{module.__name__}.{path}"
    model = make_model(attn_implementation="eager")
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = prompt(2, 9)
    original = operator.attrgetter(path)(module)
    stock = model.generate(ids, **options)
    with monkeypatch.context() as patch:
        patch.setattr(target, altered(original))
        expected = model.generate(ids, **options)
        logits = model(ids).logits
        assert torch.equal(generate(model, ids, **options), expected)
    assert not torch.equal(stock, expected)
    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(target, altered(original))
        handle = apply_torch_fused(model)
        if when == "later":
            assert torch.equal(model.generate(ids, **options), stock)
        patch.setattr(target, altered(original))
        assert torch.equal(model.generate(ids, **options), expected)
        torch.testing.assert_close(model(ids).logits, logits)
        report = handle.report()
        assert "decode: left to transformers" in report or "not patched: Qwen2ForCausalLM: its class's" in report
        assert "test_hf_left_alone.altered.<locals>.mine" in report
    assert torch.equal(model.generate(ids, **options), stock)
    handle.revert()


@pytest.mark.parametrize("by", ["registered", "for one module"])
@pytest.mark.parametrize("interface", ["attention", "mask"])
def test_a_replaced_attention_is_called(interface, by, monkeypatch):
    """Registered under the name in the configuration, before and after the patch, for the model or for all."""
    all_of_them = ALL_ATTENTION_FUNCTIONS if interface == "attention" else ALL_MASK_ATTENTION_FUNCTIONS
    mapping = all_of_them._global_mapping if by == "registered" else all_of_them._local_mapping
    model = make_model(attn_implementation="sdpa")
    options = {"max_new_tokens": 12, "do_sample": False}
    ids = prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    stock = model.generate(ids, attention_mask=mask, **options)
    mine = altered(all_of_them["sdpa"])
    monkeypatch.setitem(mapping, "sdpa", mine)
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(generate(model, ids, **options), model.generate(ids, **options))
    monkeypatch.undo()
    assert not torch.equal(stock, expected)
    for first in (True, False):
        if first:
            monkeypatch.setitem(mapping, "sdpa", mine)
        handle = apply_torch_fused(model)
        monkeypatch.setitem(mapping, "sdpa", mine)
        assert torch.equal(model.generate(ids, attention_mask=mask, **options), expected)
        assert "sdpa attention is test_hf_left_alone.altered.<locals>.mine" in handle.report()
        handle.revert()
        monkeypatch.undo()


def test_a_users_attention_is_called():
    """Registered under a new name: the patched attention calls it."""
    called = []

    def mine(module, query, *args, **kwargs):
        called.append(tuple(query.shape))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["mine"] = mine
    ALL_MASK_ATTENTION_FUNCTIONS["mine"] = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    try:
        model = make_model(attn_implementation="mine")
        expected = model.generate(prompt(1, 5), max_new_tokens=8, do_sample=False)
        called.clear()
        with apply_torch_fused(model) as handle:
            assert torch.equal(model.generate(prompt(1, 5), max_new_tokens=8, do_sample=False), expected)
            assert "its attention is 'mine'" in handle.report()
        assert called == 2 * [(1, 4, 5, 16)] + 14 * [(1, 4, 1, 16)]
    finally:
        del ALL_ATTENTION_FUNCTIONS["mine"], ALL_MASK_ATTENTION_FUNCTIONS["mine"]


def test_a_kernel_in_place_of_a_function(monkeypatch):
    """If the package ``kernels`` is installed, transformers' function is inside a module: the same as the
    function until a kernel is loaded into it."""

    class Func(nn.Module):
        def __init__(self, func):
            super().__init__()
            type(self).forward = lambda self, *args, **kwargs: func(*args, **kwargs)

    monkeypatch.setattr(Func, "__module__", "kernels.layer.layer")
    kernel = Func(modeling_qwen2.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", kernel)
    model = make_model()
    with torch.no_grad(), apply_torch_fused(model) as handle:
        expected = model(prompt(1, 4)).logits
        assert kernels(model, prompt(1, 4))["apply_rotary_pos_emb"] == 2
        assert "decode: steps of up to 8 tokens" in handle.report()
        kernel.forward = lambda q, k, cos, sin: (q, k)
        assert not torch.equal(model(prompt(1, 4)).logits, expected)
        assert "apply_rotary_pos_emb" not in kernels(model, prompt(1, 4))
        assert "apply_rotary_pos_emb has been replaced" in handle.report()


def change_frequencies_in_place(rotary):
    rotary.inv_freq.mul_(0.5)


def change_frequencies_through_data(rotary):
    rotary.inv_freq.data[0] = 0.25


def replace_frequencies(rotary):
    rotary.inv_freq = nn.Buffer(rotary.inv_freq * 0.5, persistent=False)


def change_scaling(rotary):
    rotary.attention_scaling = 1.5


def change_type(rotary):
    rotary.rope_type = "dynamic"
    rotary.config.rope_parameters = {**rotary.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    rotary.config.max_position_embeddings = rotary.original_max_seq_len = rotary.max_seq_len_cached = 8


@pytest.mark.parametrize(
    "change",
    [
        change_frequencies_in_place,
        change_frequencies_through_data,
        replace_frequencies,
        change_scaling,
        change_type,
    ],
)
def test_rotary_tables_follow_the_module(change):
    """Changed after some tokens: the patched model and hf.generate give the changed model's tokens."""
    stock, patched = make_model(seed=2), make_model(seed=2)
    options = {"max_new_tokens": 30, "do_sample": False}
    before = stock.generate(prompt(1, 9), **options)
    with apply_torch_fused(patched):
        assert torch.equal(patched.generate(prompt(1, 9), **options), before)
        for model in (stock, patched):
            change(model.model.rotary_emb)
        expected = stock.generate(prompt(1, 9), **options)
        assert not torch.equal(expected, before)
        assert torch.equal(patched.generate(prompt(1, 9), **options), expected)
        expected = stock.generate(prompt(1, 9), **options)  # a dynamic type remembers the longest sequence
        assert torch.equal(generate(patched, prompt(1, 9), **options), expected)


@pytest.mark.parametrize("own", [SiLUActivation, nn.SiLU])
def test_a_users_activation_is_called(own, monkeypatch):
    """A class registered for silu before the model is created, or one activation's own forward."""

    class Mine(own):
        def forward(self, x):
            return super().forward(x) * 0.5

    monkeypatch.setitem(transformers.activations.ACT2FN, "silu", Mine)
    changed = make_model()
    monkeypatch.undo()
    single = make_model()
    for layer in single.model.layers:
        layer.mlp.act_fn = own()
        layer.mlp.act_fn.forward = lambda x: nn.functional.silu(x) * 0.5
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = changed.generate(prompt(1, 9), **options)
    assert torch.equal(single.generate(prompt(1, 9), **options), expected)
    for model in (changed, single):
        with apply_torch_fused(model):
            assert torch.equal(model.generate(prompt(1, 9), **options), expected)


def test_a_norm_wrapped_or_hooked_later_is_called():
    """The fused addition and norm is not used with hooks and wrappers that are added after the patch."""
    model = make_model()
    apply_torch_fused(model)
    seen = []
    first, second = (layer.post_attention_layernorm for layer in model.model.layers)
    first.register_forward_hook(lambda module, args, output: seen.append("hook"))
    second.forward = lambda hidden_states: seen.append("wrapper") or hidden_states
    with torch.no_grad():
        model(prompt(1, 4))
    assert seen == ["hook", "wrapper"]


def test_a_changed_layer_result_is_normed_again():
    """A hook that changes a layer's result, in place or not, affects the next layer and the last norm."""

    def in_place(module, args, output):
        output += 1.0

    def anew(module, args, output):
        return output + 1.0

    for hook in (in_place, anew):
        stock, patched = make_model(), make_model()
        apply_torch_fused(patched)
        for model in (stock, patched):
            for layer in model.model.layers:
                layer.register_forward_hook(hook)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(patched(prompt(1, 4)).logits, stock(prompt(1, 4)).logits)


def test_hooks_that_write_through_data():
    """A write without a new version number, before and after each norm: the values are stock's."""

    def hook(module, args, output):
        (output[0] if isinstance(output, tuple) else output).data.mul_(1.5)

    def pre_hook(module, args):
        args[0].data.add_(0.5)

    for path in ("", ".self_attn", ".mlp", ".post_attention_layernorm"):
        for register, function in (("register_forward_hook", hook), ("register_forward_pre_hook", pre_hook)):
            if path == ".self_attn" and function is pre_hook:
                continue  # it has no positional arguments
            stock, patched = make_model(), make_model()
            apply_torch_fused(patched, decode=False)
            for model in (stock, patched):
                for index in range(2):
                    getattr(model.get_submodule(f"model.layers.{index}{path}"), register)(function)
            with torch.no_grad():
                torch.testing.assert_close(patched(prompt(1, 4)).logits, stock(prompt(1, 4)).logits)


def test_hooks_on_all_modules_see_every_norm():
    """A global hook is called the same number of times as without the patch."""
    counts = []
    for patch in (False, True):
        model = make_model()
        if patch:
            apply_torch_fused(model)
        seen = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, seen=seen: seen.append(type(module))
        )
        try:
            with torch.no_grad():
                model(prompt(1, 4))
        finally:
            hook.remove()
        counts.append(sum(cls is Qwen2RMSNorm for cls in seen))
    assert counts == [5, 5]


def test_hidden_states_are_stocks():
    """output_hidden_states returns every layer's result as before."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    with torch.no_grad():
        states = [model(prompt(1, 4), output_hidden_states=True).hidden_states for model in (stock, patched)]
    for expected, actual in zip(*states, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("activation", "op"), [("gelu", "gelu_mul"), ("gelu_pytorch_tanh", "gelu_mul"), ("gelu_new", None), ("relu", None)]
)
def test_another_activation(activation, op):
    """Gelu has an op too; others are left to transformers."""
    stock, patched = (make_model(hidden_act=activation) for _ in range(2))
    handle = apply_torch_fused(patched)
    assert ("not silu or gelu" in handle.report()) == (op is None)
    with torch.no_grad():
        called = kernels(patched, prompt(1, 4))
        assert {name for name in ("silu_mul", "gelu_mul") if name in called} == ({op} if op else set())
        torch.testing.assert_close(patched(prompt(1, 4)).logits, stock(prompt(1, 4)).logits)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_positions(rope_type):
    """Every kind of position scaling, past the original length, in one piece and token by token."""
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **factors}
    parameters["original_max_position_embeddings"] = 8
    stock, patched = (
        make_model("llama", rope_parameters=dict(parameters), max_position_embeddings=32) for _ in range(2)
    )
    apply_torch_fused(patched)
    with torch.no_grad():
        torch.testing.assert_close(patched(prompt(1, 40)).logits, stock(prompt(1, 40)).logits)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(patched.generate(prompt(1, 4), **options), stock.generate(prompt(1, 4), **options))


def test_a_model_with_nothing_to_patch_is_an_error():
    """The error message contains the report."""
    with pytest.raises(RuntimeError, match="nothing could be patched"):
        apply_torch_fused(nn.Linear(2, 2))


def test_other_architectures_get_the_cache():
    """A model of an unsupported family still generates its own tokens with a FusedKVCache."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    ids = prompt(1, 5) % 64
    expected = model.generate(ids, **options)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel is not one of the models .* its cache and sampler"):
        handle = apply_torch_fused(model)
    assert "  not patched: GPT2LMHeadModel: GPT2LMHeadModel is not one of the models listed in docs" in handle.report()
    assert "add a row to torch_fused/hf/families.py" in handle.report()
    assert "1 x GPT2LMHeadModel._prepare_cache_for_generation" in handle.report()
    assert torch.equal(model.generate(ids, **options), expected)


def test_an_unsupported_family_warns_once():
    """A StableLM, alone and as a part; not where nothing but the cache and the sampler was asked for, nor for a model
    that is known in a wrapper that is not."""
    config = StableLmConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = StableLmForCausalLM(config).eval()
    for whole in (model, nn.Sequential(model)):
        with pytest.warns(UserWarning, match="StableLmForCausalLM is not one of") as warned:
            handle = apply_torch_fused(whole)
        assert len(warned) == 1
        assert handle.report().count("StableLmForCausalLM is not one of") == 1
        assert apply_torch_fused(whole) is handle
        handle.revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_torch_fused(model, norms=False, rotary=False, mlp=False, decode=False).revert()
        apply_torch_fused(nn.Sequential(make_model())).revert()
        apply_torch_fused(make_model()).revert()


class Subclassed(transformers.Qwen2ForCausalLM):
    pass


def test_a_subclass_of_a_known_model_is_reported():
    """Its modules are patched; it has no decode step, and the report says so."""
    model = make_model()
    model.__class__ = Subclassed
    with pytest.warns(UserWarning, match="Subclassed is not one of .*: its decode step is left to transformers"):
        report = apply_torch_fused(model).report()
    assert "5 x Qwen2RMSNorm.forward" in report
    assert "not patched: Subclassed: its class is test_hf_left_alone.Subclassed, not Qwen2ForCausalLM itself" in report


def forward_hook(linear, count):
    return linear.register_forward_hook(lambda *_: count())


def forward_pre_hook(linear, count):
    return linear.register_forward_pre_hook(lambda *_: count())


def backward_hook(linear, count):
    return linear.register_full_backward_hook(lambda *_: count())


def backward_pre_hook(linear, count):
    return linear.register_full_backward_pre_hook(lambda *_: count())


def own_forward(linear, count):
    own = linear.forward
    linear.forward = lambda x: (count(), own(x))[1]


def compiled_call(linear, count):
    own = linear._call_impl
    linear._compiled_call_impl = lambda x: (count(), own(x))[1]  # what compile() sets


@pytest.mark.parametrize(
    "change", [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, own_forward, compiled_call]
)
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_a_changed_linear_layer_is_called(name, change):
    """Other linear layers of a patched model are multiplied without a call of their module."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    calls = []
    change(patched.model.layers[1].get_submodule(name), lambda: calls.append(1))
    ids = prompt(2, 9)
    losses = [model(ids, labels=ids).loss for model in (stock, patched)]
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert len(calls) == 1


def test_hooks_on_all_modules_see_every_linear_layer():
    patched = make_model()
    apply_torch_fused(patched)
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        patched(prompt(2, 9))
    assert {id(module) for module in patched.modules() if type(module) is nn.Linear} <= set(map(id, seen))


def test_a_weight_that_is_not_a_parameter():
    """FSDP1, for example, makes it an attribute."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    linear = patched.model.layers[0].mlp.down_proj
    weight = linear.weight.detach()
    del linear.weight
    linear.weight = weight
    torch.testing.assert_close(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits, rtol=1e-4, atol=1e-5)


def test_a_feed_forward_layer_of_any_shape():
    """Without tokens, and of one token without other dimensions."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    for shape in ((64,), (0, 64), (2, 0, 64), (2, 1, 3, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(patched.model.layers[0].mlp(x), stock.model.layers[0].mlp(x))
