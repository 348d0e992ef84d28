"""apply_torch_fused changes only one model instance, and revert leaves no trace."""

import copy
import functools
import inspect
import io
import pickle
import subprocess
import sys
import textwrap
from types import MethodType

import pytest
import torch
import transformers
from packaging.version import Version
from test_hf_generate import FAMILIES, make_model, prompt
from transformers import Trainer, TrainingArguments
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

import torch_fused.hf.patch
from torch_fused.hf import apply_torch_fused, generate
from torch_fused.opcount import ops_per_token
from torch_fused.testing import relative_error


def dicts(model):
    return [dict(module.__dict__) for module in model.modules()]


def kernels(function, *args):
    """The number of runs of each torch_fused op in one call."""
    with torch.profiler.profile() as profile:
        function(*args)
    return {
        event.key.removeprefix("torch_fused::"): event.count for event in profile.key_averages() if "::" in event.key
    }


# ---- what is patched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen2", 5), ("qwen3", 9)])
def test_every_norm_runs_fused(family, norms):
    """Two layers: the first addition is fused with its norm, other norms run alone; torch computes none."""
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
    """In bfloat16, with the layers and heads of the real models: ops per token that reach the device, without views."""
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
    """No class or global is patched: a stock model created before or after runs no fused op."""
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
    """The state dict has the same keys; a deep copy is patched and does not refer to the original."""
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
    """Like accelerate and others: keep the forward, and put a wrapper in its place."""
    original = module.forward

    @functools.wraps(original)
    def logging_forward(*args, **kwargs):
        return original(*args, **kwargs)

    del logging_forward.__wrapped__
    logging_forward.__qualname__, logging_forward.__module__ = "logging_forward", "somebody"
    module.forward = logging_forward


def test_revert_fails_if_a_forward_was_wrapped_later():
    """The error names the module and the wrapper, and nothing is reverted; without the wrapper everything is."""
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
    """The same flags return the same handle, as in a notebook; others patch again, and either handle reverts."""
    model = make_model()
    before = dicts(model)
    handle = apply_torch_fused(model)
    assert apply_torch_fused(model) is handle
    other = apply_torch_fused(model, mlp=False)
    assert other is not handle
    assert "Qwen2MLP" not in other.report()
    handle.revert()  # which has no patches any more
    assert apply_torch_fused(model, mlp=False) is other
    with pytest.raises(RuntimeError, match=r"already patched, at .* as part of another"):
        apply_torch_fused(model.model)
    other.revert()
    assert dicts(model) == before
    inner = apply_torch_fused(model.model)
    outer = apply_torch_fused(model)  # reverts the inner one first
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
    """Saved whole, pickled or copied, before and after running: patched, independent, with its own handle."""
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
    """Directly, without an earlier call; in a process that has not patched anything yet."""
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
    """As inspected by generate, Trainer and PEFT, also through a wrapper."""
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
    the handle reverts after accelerate has wrapped and unwrapped the model."""
    stock, patched = make_model(), make_model()
    tolerance = 3e-2 if options.get("bf16") else 1e-5  # accelerate leaves autocast around the forward
    for _ in range(2):
        train(stock, tmp_path, **options)
        with apply_torch_fused(patched) as handle:
            train(patched, tmp_path, **options)
            if Version(transformers.__version__) < Version("5.24"):  # a model in training then fills no cache
                patched.gradient_checkpointing_disable()
            with torch.no_grad():
                assert relative_error(patched(prompt(1, 9)).logits, stock(prompt(1, 9)).logits) < tolerance
                patched.generate(prompt(1, 5), max_new_tokens=8, do_sample=False)
                generate(patched, prompt(1, 5), max_new_tokens=8, do_sample=False)
            assert "14 calls as one op" in handle.report()
        assert "_torch_fused_decoder" not in patched.__dict__
        with torch.no_grad():
            assert not {"rms_norm", "add_rms_norm"} & kernels(patched, prompt(1, 4)).keys()
    expected, actual = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (stock, patched))
    assert relative_error(actual, expected) < 1e-4


def test_accelerate_removes_its_wrapper(tmp_path):
    """It then rebinds our function."""
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
    """An exception at any point: the model is as before, and can be patched; a revert can be repeated."""
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
    del model.model.norm.forward  # the progress of an interrupted revert
    handle.revert()
    assert dicts(model) == before
