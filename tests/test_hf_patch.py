"""apply_torch_fused touches the instances of one model, and revert leaves no trace."""

import copy
import functools
import inspect
import io
import operator
import pickle
import subprocess
import sys
import textwrap
import warnings
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from test_hf_generate import FAMILIES, make_model, prompt
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Trainer, TrainingArguments
from transformers.activations import SiLUActivation
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.utils import ModelOutput

import torch_fused.hf.patch
from torch_fused.hf import apply_torch_fused, generate
from torch_fused.opcount import ops_per_token
from torch_fused.testing import relative_error


def dicts(model):
    return [dict(module.__dict__) for module in model.modules()]


def kernels(function, *args):
    """How often each torch_fused op runs in one call."""
    with torch.profiler.profile() as profile:
        function(*args)
    return {
        event.key.removeprefix("torch_fused::"): event.count for event in profile.key_averages() if "::" in event.key
    }


# ---- what is patched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen2", 5), ("qwen3", 9)])
def test_every_norm_runs_fused(family, norms):
    """Two layers: in each the first addition with the norm that follows it, other norms alone; torch computes none."""
    model = make_model(family)
    apply_torch_fused(model)
    with torch.no_grad():
        counts = kernels(model, prompt(1, 4))
    assert counts["add_rms_norm"] == 2
    assert counts["rms_norm"] == norms - 2
    assert counts["silu_mul"] == counts["apply_rotary_pos_emb"] == 2
    assert not {"aten::rsqrt", "aten::silu", "aten::neg"} & counts.keys()


@pytest.mark.parametrize(
    ("family", "shape", "most"),
    [
        ("qwen2", {"layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}, 364),
        ("qwen3", {"layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}, 488),
    ],
    ids=["Qwen2.5-0.5B", "Qwen3-0.6B"],
)
def test_ops_of_a_decoded_token(family, shape, most):
    """In bfloat16, with the layers and heads of the real models: what reaches the device each token, views aside."""
    model = make_model(family, dtype=torch.bfloat16, hidden_size=16 * shape["num_attention_heads"], **shape)

    def generate(tokens):
        model.generate(prompt(1, 8), max_new_tokens=tokens, do_sample=False)

    stock = ops_per_token(generate, 4)
    with apply_torch_fused(model, decode=False):
        fused = ops_per_token(generate, 4)
    if Version(transformers.__version__) < Version("5.23"):
        most += 6  # that generate() does more itself for each token
    assert fused <= most < stock / 2
    with apply_torch_fused(model):
        assert ops_per_token(generate, 4) <= 40


def test_flags():
    """Each flag leaves its part to transformers."""
    model = make_model()
    with torch.no_grad():
        with apply_torch_fused(model, residual=False):
            assert kernels(model, prompt(1, 4))["rms_norm"] == 5
        with apply_torch_fused(model, rotary=False):
            assert "apply_rotary_pos_emb" not in kernels(model, prompt(1, 4))
        with apply_torch_fused(model, mlp=False):
            assert "silu_mul" not in kernels(model, prompt(1, 4))
        with apply_torch_fused(model, sampler=False):
            assert "greedy" not in kernels(lambda: model.generate(prompt(1, 4), max_new_tokens=2))
        with apply_torch_fused(model, norms=False):
            assert "rms_norm" not in kernels(model, prompt(1, 4))
            assert "kv_append_" in kernels(lambda: model.generate(prompt(1, 4), max_new_tokens=2))
        with apply_torch_fused(model, cache=False):
            assert "kv_append_" not in kernels(lambda: model.generate(prompt(1, 4), max_new_tokens=2))


def test_another_model_in_the_process_is_unchanged():
    """No class and no global is patched: a stock model made before or after runs no fused op."""
    before, patched = make_model(), make_model()
    state = dicts(before)
    forwards = Qwen2RMSNorm.forward, Qwen2DecoderLayer.forward
    with torch.no_grad():
        expected = before(prompt(1, 4)).logits
        apply_torch_fused(patched)
        patched.generate(prompt(1, 4), max_new_tokens=2)
        for model in (before, make_model()):
            assert not {"rms_norm", "add_rms_norm", "kv_append_"} & kernels(model, prompt(1, 4)).keys()
            assert torch.equal(model(prompt(1, 4)).logits, expected)
    assert dicts(before) == state
    assert (Qwen2RMSNorm.forward, Qwen2DecoderLayer.forward) == forwards


def test_weights_are_saved_and_copied_as_before():
    """The state dict has the same keys; a deep copy is patched itself and does not reach back to the original."""
    model = make_model()
    keys = list(model.state_dict())
    apply_torch_fused(model)
    assert list(model.state_dict()) == keys
    other = copy.deepcopy(model)
    assert other.model.norm.forward.args == (other.model.norm,)
    torch.save(model.state_dict(), io.BytesIO())


# ---- revert ---------------------------------------------------------------------------------------------------------


def test_revert_is_exact():
    """Every module's __dict__ is as before; a second revert does nothing."""
    model = make_model()
    before = dicts(model)
    handle = apply_torch_fused(model)
    assert dicts(model) != before
    handle.revert()
    assert dicts(model) == before
    handle.revert()
    assert dicts(model) == before


def test_context_manager_reverts_after_an_error():
    """The model is stock again even when the block fails."""
    model = make_model()
    before = dicts(model)
    with pytest.raises(KeyError), apply_torch_fused(model):
        raise KeyError
    assert dicts(model) == before


def wrap(module):
    """What accelerate and others do: keep the forward, put a wrapper in its place."""
    original = module.forward

    @functools.wraps(original)
    def logging_forward(*args, **kwargs):
        return original(*args, **kwargs)

    del logging_forward.__wrapped__
    logging_forward.__qualname__, logging_forward.__module__ = "logging_forward", "somebody"
    module.forward = logging_forward


def test_revert_refuses_when_somebody_wrapped_a_forward_since():
    """The error names the module and the wrapper, and nothing is reverted; without the wrapper all is."""
    model = make_model()
    before = dicts(model)
    handle = apply_torch_fused(model)
    norm = model.model.layers[1].input_layernorm
    ours = norm.forward
    wrap(norm)
    patched = dicts(model)
    with pytest.raises(
        RuntimeError, match=r"model\.layers\.1\.input_layernorm: its forward .* somebody\.logging_forward"
    ):
        handle.revert()
    assert dicts(model) == patched
    norm.forward = ours
    handle.revert()
    assert dicts(model) == before


def test_applying_twice():
    """The same flags hand out the same handle, as in a notebook; others patch anew, and either handle reverts."""
    model = make_model()
    before = dicts(model)
    handle = apply_torch_fused(model)
    assert apply_torch_fused(model) is handle
    other = apply_torch_fused(model, mlp=False)
    assert other is not handle
    assert "Qwen2MLP" not in other.report()
    handle.revert()  # which has nothing in place any more
    assert apply_torch_fused(model, mlp=False) is other
    with pytest.raises(RuntimeError, match=r"already patched, at .* as a part of another"):
        apply_torch_fused(model.model)
    other.revert()
    assert dicts(model) == before
    inner = apply_torch_fused(model.model)
    outer = apply_torch_fused(model)  # takes the inner one back first
    assert not inner.patched
    outer.revert()
    assert dicts(model) == before


# ---- saved, copied, trained -----------------------------------------------------------------------------------------


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


COPIES = {"save": saved, "pickle": pickled, "deepcopy": copy.deepcopy}


def answer(model):
    return model.generate(prompt(1, 5), max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("flags", [{}, {"decode": False}], ids=str)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_patched_and_reverts(family, how, flags):
    """Saved whole and loaded, pickled or copied, before and after it ran: patched, on its own, with its own handle."""
    model = make_model(family)
    clean = [set(part) for part in dicts(model)]
    expected = answer(model)
    handle = apply_torch_fused(model, **flags)
    reports = [handle.report()]
    copies = [COPIES[how](model)]
    assert torch.equal(answer(model), expected)
    reports.append(handle.report())
    copies.append(COPIES[how](model))
    for other, report in zip(copies, reports, strict=True):
        assert other.model.norm.forward.args == (other.model.norm,)
        own = apply_torch_fused(other, **flags)
        assert own is not handle
        assert own.report() == report
        assert torch.equal(answer(other), expected)
        assert own.report() != report or flags
    handle.revert()
    third = COPIES[how](copies[0])
    assert torch.equal(answer(model), expected)
    for other in (copies[1], third, copies[0]):
        assert torch.equal(answer(other), expected)
        apply_torch_fused(other, **flags).revert()
        assert [set(part) for part in dicts(other)] == clean
        assert torch.equal(answer(other), expected)
        again = apply_torch_fused(COPIES[how](other))
        assert again.patched


def in_another_process(rank, model, expected):
    torch.set_num_threads(1)
    assert torch.equal(answer(model), expected)
    handle = apply_torch_fused(model)
    assert "5 x Qwen2RMSNorm.forward" in handle.report()
    assert "calls as one op" in handle.report()
    handle.revert()
    assert torch.equal(answer(model), expected)


def test_a_patched_model_goes_to_another_process():
    model = make_model()
    expected = answer(model)
    apply_torch_fused(model)
    torch.multiprocessing.spawn(in_another_process, (model, expected), nprocs=1)


def test_a_loaded_model_compiles(tmp_path):
    """At once, without a call before; a process that has not patched anything yet."""
    model = make_model()
    apply_torch_fused(model)
    torch.save(model, tmp_path / "model")
    program = """
        import sys, torch
        model = torch.load(sys.argv[1], weights_only=False)
        ids = torch.arange(1, 7)[None]
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
            torch.testing.assert_close(compiled, model(ids).logits)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), tmp_path / "model"], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_signatures_are_the_classes_own(family):
    """What generate, Trainer and PEFT look at, through a wrapper too."""
    stock, patched = make_model(family), make_model(family)
    apply_torch_fused(patched)
    expected = list(inspect.signature(stock.forward).parameters)
    assert list(inspect.signature(patched.forward).parameters) == expected
    wrapper = functools.wraps(patched.forward.__func__)(lambda *args, **kwargs: None)
    patched.forward = MethodType(wrapper, patched)
    assert list(inspect.signature(patched.forward).parameters) == expected


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        ids = prompt(8, seed=index)
        return {"input_ids": ids, "labels": ids}


def train(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=folder, max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **options
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts())
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True, "bf16": True}], ids=str)
def test_trainer(options, tmp_path):
    """Trained twice by transformers while patched: the weights of stock's training, rollouts take the decode step, and
    the handle reverts whatever accelerate has put around the model and taken off again."""
    stock, patched = make_model(), make_model()
    for _ in range(2):
        train(stock, tmp_path, **options)
        with apply_torch_fused(patched) as handle:
            train(patched, tmp_path, **options)
            if Version(transformers.__version__) < Version("5.24"):  # a model in training then fills no cache
                patched.gradient_checkpointing_disable()
            with torch.no_grad():
                assert relative_error(patched(prompt(1, 9)).logits, stock(prompt(1, 9)).logits) < 1e-2
                patched.generate(prompt(1, 5), max_new_tokens=8, do_sample=False)
                generate(patched, prompt(1, 5), max_new_tokens=8, do_sample=False)
            assert "14 calls as one op" in handle.report()
        assert "_torch_fused_decoder" not in patched.__dict__
        with torch.no_grad():
            assert not {"rms_norm", "add_rms_norm"} & kernels(patched, prompt(1, 4)).keys()
    expected, actual = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (stock, patched))
    assert relative_error(actual, expected) < 1e-4


def test_accelerate_takes_its_wrapper_off(tmp_path):
    """It then binds our function anew."""
    model = make_model()
    before = dicts(model)
    for wrapped_at_revert in (False, True):
        handle = apply_torch_fused(model)
        trainer = train(model, tmp_path, bf16=True)
        if not wrapped_at_revert:
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        handle.revert()
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        del model._is_accelerate_prepared
        assert torch.equal(answer(model), answer(make_model_like(model)))
    handle = apply_torch_fused(model)
    answer(model)
    assert "7 calls as one op" in handle.report()
    handle.revert()
    assert [part.keys() for part in dicts(model)] == [part.keys() for part in before]


def make_model_like(model):
    other = make_model()
    other.load_state_dict(model.state_dict())
    return other


def test_patching_that_is_interrupted_leaves_no_trace(monkeypatch):
    """Whatever raises in the middle: the model is as before, and can be patched; a revert can be called again."""
    model = make_model()
    before = dicts(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch_fused.hf.patch.PatchHandle, "bind_decoder", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply_torch_fused(model)
    assert dicts(model) == before
    handle = apply_torch_fused(model)
    del model.model.norm.forward  # as far as an interrupted revert may have come
    handle.revert()
    assert dicts(model) == before


# ---- what is left alone ---------------------------------------------------------------------------------------------


class HalvedRMSNorm(Qwen2RMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) / 2


def test_a_subclass_is_left_alone():
    """A norm or a layer that is not exactly the expected class keeps its own forward, and the result its value."""
    model = make_model()
    model.model.layers[0].post_attention_layernorm.__class__ = HalvedRMSNorm
    model.model.norm.__class__ = HalvedRMSNorm
    with torch.no_grad():
        expected = model(prompt(1, 4)).logits
        apply_torch_fused(model)
        torch.testing.assert_close(model(prompt(1, 4)).logits, expected)
    assert "forward" not in model.model.norm.__dict__


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
        "     1 x Qwen2ForCausalLM.generate",
        "  left: model.layers.0.input_layernorm: it is compiled by torch.compile",
        "  left: model.layers.0.post_attention_layernorm: its forward is already replaced by somebody.logging_forward",
    ]
    with torch.no_grad():
        assert kernels(layer.post_attention_layernorm.forward, torch.ones(1, 64))["aten::rsqrt"] == 1


def altered(function):
    """A function in somebody's place for another: its result is not the same."""

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
        assert "decode: left to transformers" in report or "left: Qwen2ForCausalLM: its class's forward" in report
        assert "test_hf_patch.altered.<locals>.mine" in report
    assert torch.equal(model.generate(ids, **options), stock)
    handle.revert()


@pytest.mark.parametrize("by", ["registered", "for one module"])
@pytest.mark.parametrize("interface", ["attention", "mask"])
def test_an_attention_registered_anew_is_called(interface, by, monkeypatch):
    """For the name that the model's configuration has, before and after the patch, in one's own interface or in all."""
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
        assert "sdpa attention is test_hf_patch.altered.<locals>.mine" in handle.report()
        handle.revert()
        monkeypatch.undo()


def test_an_attention_of_ones_own_name():
    """Registered and chosen: the patched attention calls it."""
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
    """Where the package ``kernels`` is installed, transformers' function is a module that holds it: the same as the
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
        assert "decode: steps of few tokens" in handle.report()
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
def test_an_activation_of_somebody_else(own, monkeypatch):
    """A class registered for silu before the model is made, or one activation's own forward: called."""

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
    """The joined addition and norm step aside for hooks and wrappers that come after the patch."""
    model = make_model()
    apply_torch_fused(model)
    seen = []
    first, second = (layer.post_attention_layernorm for layer in model.model.layers)
    first.register_forward_hook(lambda module, args, output: seen.append("hook"))
    second.forward = lambda hidden_states: seen.append("wrapper") or hidden_states
    with torch.no_grad():
        model(prompt(1, 4))
    assert seen == ["hook", "wrapper"]


def test_a_layer_result_that_is_changed_is_normed_anew():
    """A hook that steers a layer's result, in place or not, is seen by the next layer and by the last norm."""

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
    """A write that no version counts, before and after each norm: the values are stock's."""

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
    """A global hook is called as often as without the patch."""
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
    """output_hidden_states gives every layer's result as before."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    with torch.no_grad():
        states = [model(prompt(1, 4), output_hidden_states=True).hidden_states for model in (stock, patched)]
    for expected, actual in zip(*states, strict=True):
        torch.testing.assert_close(actual, expected)


def test_another_activation_is_left_alone():
    """Only silu is taken over."""
    stock, patched = (make_model(hidden_act="gelu") for _ in range(2))
    apply_torch_fused(patched)
    with torch.no_grad():
        assert "silu_mul" not in kernels(patched, prompt(1, 4))
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
    """No silent success: the message holds the report."""
    with pytest.raises(RuntimeError, match="nothing could be patched"):
        apply_torch_fused(nn.Linear(2, 2))


def test_other_architectures_get_the_cache():
    """A model of no known family still generates its own tokens with a FusedKVCache."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    ids = prompt(1, 5) % 64
    expected = model.generate(ids, **options)
    with pytest.warns(UserWarning, match="GPT2LMHeadModel is none of LlamaForCausalLM, .* its cache and its sampler"):
        handle = apply_torch_fused(model)
    assert "  left: GPT2LMHeadModel: GPT2LMHeadModel is none of LlamaForCausalLM, " in handle.report()
    assert "takes one row in torch_fused/hf/models.py" in handle.report()
    assert "1 x GPT2LMHeadModel._prepare_cache_for_generation" in handle.report()
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_family_that_is_not_known_says_so_once():
    """A Mistral, alone and as a part; not where nothing but the cache and the sampler was asked for, nor for a model
    that is known in a wrapper that is not."""
    config = MistralConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        vocab_size=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    for whole in (model, nn.Sequential(model)):
        with pytest.warns(UserWarning, match="MistralForCausalLM is none of") as warned:
            handle = apply_torch_fused(whole)
        assert len(warned) == 1
        assert handle.report().count("MistralForCausalLM is none of") == 1
        assert apply_torch_fused(whole) is handle
        handle.revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_torch_fused(model, norms=False, rotary=False, mlp=False, decode=False).revert()
        apply_torch_fused(nn.Sequential(make_model())).revert()
        apply_torch_fused(make_model()).revert()


class Subclassed(transformers.Qwen2ForCausalLM):
    pass


def test_a_subclass_of_a_known_model_is_told():
    """Its modules are patched; the step of the whole model is not, and the report says so."""
    model = make_model()
    model.__class__ = Subclassed
    with pytest.warns(UserWarning, match="Subclassed is none of .*: its decode step is left to transformers"):
        report = apply_torch_fused(model).report()
    assert "5 x Qwen2RMSNorm.forward" in report
    assert "left: Subclassed: its class is test_hf_patch.Subclassed, not Qwen2ForCausalLM itself" in report


# ---- training -------------------------------------------------------------------------------------------------------


def train_step(model, **options):
    ids = prompt(2, 12)
    loss = model(ids, labels=ids, **options).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def assert_steps_match(stock, patched):
    torch.testing.assert_close(patched[0], stock[0])
    for name, gradient in stock[1].items():
        torch.testing.assert_close(patched[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_is_stocks(family, use_cache):
    """Loss and every parameter's gradient, also with the cache that transformers makes by default."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock, use_cache=use_cache), train_step(patched, use_cache=use_cache))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "full"])
def test_gradients_under_every_attention(attention, heads):
    """With grouped heads and with as many key / value heads as heads, whose gradients come in other layouts."""
    stock, patched = (make_model(attn_implementation=attention, num_key_value_heads=heads).train() for _ in range(2))
    apply_torch_fused(patched)
    assert_steps_match(train_step(stock), train_step(patched))


def test_flex_attention():
    """Which has no backward on the CPU."""
    stock, patched = (make_model(attn_implementation="flex_attention") for _ in range(2))
    apply_torch_fused(patched)
    with torch.no_grad():
        torch.testing.assert_close(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_still_works(family, reentrant):
    """Each layer is recomputed in backward: the patched forward keeps that, and the gradients."""
    stock, patched = make_model(family).train(), make_model(family).train()
    apply_torch_fused(patched)
    patched.enable_input_require_grads()
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    patched.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    assert_steps_match(train_step(stock), train_step(patched))
    assert len(calls) == 2
    with torch.no_grad():  # which needs no checkpoints, and takes the cache
        assert kernels(patched, prompt(1, 4))["add_rms_norm"] == 2


def checkpoint_layers(model, reentrant):
    impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, checkpoint_impl=impl),
        check_fn=lambda module: isinstance(module, GradientCheckpointingLayer),
    )


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_from_outside(family, reentrant, patch_first):
    """Layers in torch's own wrapper, patched before or after: every gradient, and each layer is computed twice."""
    stock, patched = make_model(family).train(), make_model(family).train()
    steps = [lambda: apply_torch_fused(patched), lambda: checkpoint_layers(patched, reentrant)]
    for step in steps if patch_first else steps[::-1]:
        step()
    calls = []
    patched.get_submodule("model.norm").register_forward_hook(lambda *_: calls.append(0))
    next(m for m in patched.modules() if type(m).__name__.endswith("RMSNorm")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    expected, actual = train_step(stock, use_cache=False), train_step(patched, use_cache=False)
    assert sorted(calls) == [0, 1, 1]
    actual[1].update({name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in actual[1].items()})
    assert_steps_match(expected, actual)


def parallel_step(rank, family, how):
    """One rank's training step on its half of a batch: the gradients are the whole batch's."""
    ids = prompt(4, 12)
    stock, model = make_model(family).train(), make_model(family).train()
    stock(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: weight.grad for name, weight in stock.named_parameters()}
    mesh = init_device_mesh("cpu", (2,))
    if how == "ddp":
        apply_torch_fused(model)
        model = nn.parallel.DistributedDataParallel(model)
    if how == "patched, then sharded":
        apply_torch_fused(model)
    if "sharded" in how:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if how == "sharded, then patched":
        report = apply_torch_fused(model).report()
        assert "2 x FSDP" in report and "DecoderLayer.forward" in report
    if how == "sharded, then patched, checkpointed":
        apply_torch_fused(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    half = ids[2 * rank : 2 * rank + 2]
    model(half, labels=half, use_cache=False).loss.backward()
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        name = name.removeprefix("module.")
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{how} {n}: {m}")


def parallel_steps(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family in FAMILIES:
        for how in ("ddp", "patched, then sharded", "sharded, then patched", "sharded, then patched, checkpointed"):
            parallel_step(rank, family, how)
    dist.destroy_process_group()


def test_parallel_training(tmp_path):
    """Two processes: DDP, and FSDP2 before and after the patch, give the gradients of the whole batch."""
    torch.multiprocessing.spawn(parallel_steps, (tmp_path,), nprocs=2)


def test_autocast():
    """Under autocast the residual stream stays float32 while the attention is bfloat16."""
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(patched(prompt(2, 9)).logits, stock(prompt(2, 9)).logits) < 2e-3


def test_compile():
    """The patched model compiles in one graph and gives stock's logits."""
    torch._dynamo.reset()
    stock, patched = make_model(), make_model()
    apply_torch_fused(patched)
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(prompt(1, 6), use_cache=False).logits, stock(prompt(1, 6)).logits)
