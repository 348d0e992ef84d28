"""Unmerged PEFT LoRA adapters in the decode step: stock's tokens after any change."""

import warnings

import peft
import pytest
import torch
from test_hf_generate import make_model, one_thread, prompt  # noqa: F401

from torch_fused.hf import apply_torch_fused
from torch_fused.hf.decode import DECODER
from torch_fused.hf.lora import MERGE

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_lora(family: str = "qwen2", names=("first",), targets=EVERY, **options):
    """A model with adapters that have a large effect."""
    model = make_model(family)
    for i, name in enumerate(names):
        config = peft.LoraConfig(r=4 + i, lora_alpha=16, target_modules=list(targets), **options)
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    torch.manual_seed(0)
    for key, value in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.3)
    return model.eval()


def tokens(model, **options) -> list[list[int]]:
    return model.generate(input_ids=prompt(2, 7), max_new_tokens=12, do_sample=False, **options).tolist()


def decoder_of(model):
    return model.get_base_model().__dict__[DECODER]


def check(model) -> None:
    """The same tokens when patched, with every step after the prompt in the op."""
    expected = tokens(model)
    with apply_torch_fused(model) as handle:
        assert tokens(model) == expected
        assert decoder_of(model).calls[""] >= 11, handle.report()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), EVERY], ids=["some", "every"])
def test_tokens_are_stocks(family, targets):
    check(with_lora(family, targets=targets))


def test_the_adapter_matters():
    model = with_lora()
    with model.disable_adapter():
        without = tokens(model)
    assert tokens(model) != without


def test_adapters_are_switched():
    """Each adapter, none, and one with a changed scale, in one patch."""
    model = with_lora(names=("first", "second"))

    def change_scale():
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["first"] *= 3

    model.set_adapter("first")
    changes = (lambda: None, lambda: model.set_adapter("second"), lambda: model.set_adapter("first"), change_scale)
    stock = []
    for change in changes:
        change()
        stock.append(tokens(model))
    with model.disable_adapter():
        stock.append(tokens(model))
    assert len({str(each) for each in stock}) == 4

    model = with_lora(names=("first", "second"))
    model.set_adapter("first")
    with apply_torch_fused(model):
        for change, expected in zip(changes, stock, strict=False):
            change()
            assert tokens(model) == expected
        with model.disable_adapter():
            assert tokens(model) == stock[-1]
        assert tokens(model) == stock[-2]
        assert decoder_of(model).calls[""] == 6 * 11


def test_several_at_once():
    model = with_lora(names=("first", "second"))
    model.base_model.set_adapter(["first", "second"])
    check(model)


def test_an_adapter_that_is_added_later():
    model = with_lora()
    with apply_torch_fused(model):
        tokens(model)
        model.add_adapter("second", peft.LoraConfig(r=3, target_modules=EVERY))
        for key, value in model.named_parameters():
            if "lora_B.second" in key:
                torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(3))
        model.set_adapter("second")
        model.eval()
        fused = tokens(model)
    assert tokens(model) == fused


def test_merged_and_unmerged_again():
    model = with_lora()
    with apply_torch_fused(model):
        before = tokens(model)
        model.merge_adapter()
        assert tokens(model) == before
        model.unmerge_adapter()
        assert tokens(model) == before
    merged = with_lora().merge_and_unload()
    with apply_torch_fused(merged):
        assert merged.generate(input_ids=prompt(2, 7), max_new_tokens=12, do_sample=False).tolist() == before


def test_dropout_only_in_training():
    model = with_lora(lora_dropout=0.5)
    check(model)
    with apply_torch_fused(model):
        model.train()
        with warnings.catch_warnings(), torch.no_grad():
            tokens(model)
        assert any("has dropout: call model.eval()" in reason for reason in decoder_of(model).calls)


def test_base_in_bfloat16():
    """PEFT keeps adapters in float32."""
    model = make_model("qwen2").bfloat16()
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=EVERY)).eval()
    with apply_torch_fused(model):
        tokens(model)
        assert decoder_of(model).calls[""] >= 11


def test_a_changed_adapter():
    """With its own forward, or a weight of another type, the step is left to transformers."""
    for change in (
        lambda layer: setattr(layer, "forward", lambda x: x[..., :4] * 0),
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(layer.weight.data.to_sparse_csr(), False)),
    ):
        model = with_lora("llama", targets=["o_proj"])
        with apply_torch_fused(model) as handle:
            change(model.get_base_model().model.layers[1].self_attn.o_proj.lora_A["first"])
            assert "decode: left to transformers: " in handle.report()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "not plain LoRA"),
        ({"lora_bias": True}, "other than plain linear layers without biases"),
    ],
    ids=["dora", "biases"],
)
def test_other_adapters_are_left_with_advice(options, reason):
    model = with_lora(**options)
    expected = tokens(model)
    with apply_torch_fused(model) as handle:
        assert tokens(model) == expected
        assert reason in handle.report()
        assert MERGE in handle.report()
