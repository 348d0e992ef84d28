"""Every supported family: stock's tokens and gradients, with all its traits.

A new family is one row in `torch_fused/hf/families.py` and, if its row has traits, one entry in `families.SETTINGS`.
"""

import copy
import importlib
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from families import (
    ROWS,
    SETTINGS,
    VOCABULARY,
    WINDOW,
    WRAPPED,
    image_prompt,
    make_config,
    make_model,
    make_wrapped,
    prompt,
)
from families_table import BEGIN, END, table
from torch import nn
from transformers import DynamicCache

import torch_fused.hf.cache
from torch_fused.hf import FusedKVCache, apply_torch_fused, described, quantize_
from torch_fused.hf.cache import CACHE
from torch_fused.hf.described import compare, mismatch, names_of, of_class
from torch_fused.hf.families import KNOWN, PARTS, Family
from torch_fused.hf.origin import path_of
from torch_fused.metal import emulate
from torch_fused.testing import relative_error

ALL = list(ROWS)
GREEDY = {"do_sample": False, "max_new_tokens": 24}
"""Past the windows, which are shorter."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ALL)
def stock(request):
    """A model shared by the tests of this file, which do not change it."""
    return make_model(request.param)


@pytest.fixture(scope="module", params=[name for name, row in ROWS.items() if row.has_step])
def with_step(request):
    return make_model(request.param)


def steps(handle):
    """The number of calls that ran as one op."""
    return sum(int(line.split()[0]) for line in handle.report().splitlines() if line.endswith("calls as one op"))


def has_step(model):
    return KNOWN[path_of(model)][0].has_step


def left_padded(rows):
    ids, mask = prompt(rows, 9), torch.ones(rows, 9, dtype=torch.long)
    for row in range(rows):
        ids[row, :row], mask[row, :row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs_of(way):
    if way == "left padding":
        return {**left_padded(4), **GREEDY}
    beams = {"num_beams": 3, "max_new_tokens": 12} if way == "beams" else {}
    return {"input_ids": prompt(4 if way == "batch of 4" else 1, 9), **(GREEDY | beams)}


@pytest.mark.parametrize("way", ["batch of 1", "batch of 4", "left padding", "beams"])
def test_tokens_are_stocks(stock, way):
    """In float32; every step is one op if the family has a decode step."""
    expected = stock.generate(**inputs_of(way))
    with apply_torch_fused(stock) as handle:
        assert torch.equal(stock.generate(**inputs_of(way)), expected)
        if way != "beams":
            assert steps(handle) == (23 if has_step(stock) else 0)
    assert len(set(expected.flatten().tolist())) > 8


def has_window(name):
    return bool(SETTINGS.get(name, {}).get("sliding_window")) and ROWS[name].has_step


@pytest.mark.parametrize("name", [name for name in ROWS if has_window(name)])
@pytest.mark.parametrize("decode", [True, False], ids=["step", "layers"])
def test_tokens_outside_the_window_are_dropped(monkeypatch, name, decode):
    """Stock's tokens, also left-padded, from a cache with sliding layers that have dropped most tokens."""
    monkeypatch.setattr(torch_fused.hf.cache, "SPARE", 1)
    model = make_model(name)
    for inputs in ({"input_ids": prompt(1, 20)}, left_padded(3)):
        options = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
        expected = model.generate(**inputs, **options)
        with apply_torch_fused(model, decode=decode) as handle:
            cache = FusedKVCache(model.config)
            assert torch.equal(model.generate(**inputs, **options, **{CACHE: cache}).sequences, expected.sequences)
            assert steps(handle) == (39 if decode else 0)
        dropped = [layer.dropped for layer in cache.layers if layer.window]
        assert dropped and min(dropped) > 25


def test_logits_of_a_step(with_step):
    """For several tokens after a prompt, past the window; compared with stock without a cache."""
    ids = prompt(2, 2 * WINDOW + 7)
    more = {"position_ids": torch.arange(ids.shape[1]).expand(2, -1)}
    with torch.no_grad():
        expected = with_step(ids, use_cache=False).logits[:, -3:]
        with apply_torch_fused(with_step) as handle:
            cache = FusedKVCache(with_step.config)
            with_step(ids[:, :-3], use_cache=True, position_ids=more["position_ids"][:, :-3], **{CACHE: cache})
            out = with_step(ids[:, -3:], use_cache=True, position_ids=more["position_ids"][:, -3:], **{CACHE: cache})
            assert steps(handle) == 1
    assert relative_error(out.logits, expected) < 2e-6
    assert type(out).__name__.endswith("CausalLMOutputWithPast")


def test_second_turn(stock):
    """Continues from the cache of the first turn, and again after cropping some tokens."""

    def go_on(ids, cache):  # with a mask: token 0 would be taken for padding
        mask = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        return stock.generate(ids, **mask, **({} if cache is None else {CACHE: cache}))

    def talk(cache):
        return go_on(torch.cat([go_on(prompt(1, 9), cache), prompt(1, 5, seed=1)], 1), cache)

    expected = talk(DynamicCache(config=stock.config))
    with apply_torch_fused(stock):
        cache = FusedKVCache(stock.config)
        assert torch.equal(talk(cache), expected)
        if has_step(stock):
            cache.crop(-20)
            assert torch.equal(go_on(expected[:, :-12], cache), expected)


def test_gradients_of_a_training_step(stock):
    """Relative to each parameter's gradient, or to the largest one for very small gradients."""
    stock = copy.deepcopy(stock).train()
    ids = prompt(2, 2 * WINDOW)

    def gradients():
        stock.zero_grad()
        stock(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}

    expected = gradients()
    with apply_torch_fused(stock):
        actual = gradients()
    assert actual.keys() == expected.keys()
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        size = max(float(grad.norm()), 1e-3 * largest)
        assert float((actual[name] - grad).norm()) < 1e-4 * size, name


def test_bfloat16_rounds_as_stock(stock):
    """Without the step, norms and rotation round like the model; silu may differ in the last place."""
    model = copy.deepcopy(stock).to(torch.bfloat16)
    with torch.no_grad():
        expected = model(prompt(2, 17)).logits
        with apply_torch_fused(model, mlp=False):
            assert torch.equal(model(prompt(2, 17)).logits, expected)


def test_revert_is_exact(stock):
    before = [dict(module.__dict__) for module in stock.modules()]
    handle = apply_torch_fused(stock)
    assert [dict(module.__dict__) for module in stock.modules()] != before
    handle.revert()
    assert [dict(module.__dict__) for module in stock.modules()] == before


def test_report(stock):
    """Every module of a known class is counted, and unsupported parts are reported."""
    family = KNOWN[path_of(stock)][0]
    count = {part: 0 for part in family.parts}
    for module in stock.modules():
        if path_of(module) in KNOWN:
            count[KNOWN[path_of(module)][1]] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_torch_fused(stock) as handle:
            report = handle.report()

    def count_of(name):
        return sum(type(module).__name__ == name for module in stock.modules())

    for part in ("rms_norm", "rotary_embedding", "attention", "decoder_layer", "causal_lm"):
        assert f"{count[part]:4d} x {family.name(part)}.forward" in report
    assert (f"x {family.name('mlp')}.forward" in report) == (count["mlp"] > 0)
    for name, what in family.stays.items():
        outside = has_step(stock) and name != family.linear_class
        left = "not fused outside the decode step" if outside else "not patched"
        assert f"  {left}: {count_of(name)} x {name}: {what}" in report
    if family.experts:
        assert f"x {family.name('experts')}._apply_gate" in report
    assert ("steps of up to 8 tokens run as one op" in report) == has_step(stock)
    if not has_step(stock):
        assert "left to transformers: layer 0 has linear attention" in report


def test_emulated(with_step):
    """A step with the GPU kernels in the emulator."""
    ids, positions = prompt(1, 9), torch.arange(9)[None]
    with torch.no_grad(), apply_torch_fused(with_step):
        logits = []
        for scope in (warnings.catch_warnings(), emulate()):
            cache = FusedKVCache(with_step.config)
            with_step(ids[:, :8], position_ids=positions[:, :8], use_cache=True, **{CACHE: cache})
            with scope:
                out = with_step(ids[:, 8:], position_ids=positions[:, 8:], use_cache=True, **{CACHE: cache})
            logits.append(out.logits)
    assert relative_error(logits[1], logits[0]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("way", ["batch of 1", "batch of 4", "left padding", "beams"])
def test_256_tokens_are_stocks(stock, way):
    options = inputs_of(way) | {"max_new_tokens": 256}
    expected = stock.generate(**options)
    with apply_torch_fused(stock):
        assert torch.equal(stock.generate(**options), expected)


def heads_of(row):
    kinds = ["ForSequenceClassification", "ForTokenClassification", row.name("model").removeprefix(row.prefix)]
    have = vars(importlib.import_module(row.home))
    return [kind for kind in kinds if row.text == "model" and row.prefix + kind in have]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, row in ROWS.items() for kind in heads_of(row)])
def test_models_without_a_language_head(name, kind):
    """Their parts are patched, and their results do not change."""
    row = ROWS[name]
    model = make_model(name, kind, num_labels=3)
    with torch.no_grad():
        expected = model(prompt(2, 12))[0]
        with apply_torch_fused(model) as handle:
            torch.testing.assert_close(model(prompt(2, 12))[0], expected, rtol=1e-4, atol=1e-5)
            assert f"x {row.name('attention')}.forward" in handle.report()


@pytest.mark.parametrize("prefix", WRAPPED)
def test_text_of_a_model_that_sees(prefix):
    """It takes the step, left-padded too, and is copied and reverted as any other."""
    model = make_wrapped(prefix)
    for inputs in ({"input_ids": prompt(1, 9)}, left_padded(3)):
        expected = model.generate(**inputs, **GREEDY)
        with apply_torch_fused(model) as handle:
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
            assert steps(handle) == 23
            assert torch.equal(copy.deepcopy(model).generate(**inputs, **GREEDY), expected)
    assert len(set(expected.flatten().tolist())) > 8


@pytest.mark.parametrize("prefix", WRAPPED)
def test_text_after_an_image(prefix):
    """The prompt with the image runs in transformers, and the tokens after it use the step."""
    model, inputs = make_wrapped(prefix), image_prompt(prefix)
    expected = model.generate(**inputs, **GREEDY)
    with torch.no_grad():
        last, other = (model(**{**inputs, "pixel_values": inputs["pixel_values"] * by}).logits[:, -1] for by in (1, -1))
    assert relative_error(other, last) > 1e-3, "the image changes nothing"
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        assert steps(handle) == 23


def test_a_vision_model_with_text_of_an_unsupported_family():
    model = make_wrapped("Llava")
    model.model.language_model = nn.Identity()
    report = apply_torch_fused(model).report()
    assert "its text model, torch.nn.modules.linear.Identity, is not of a supported family" in report


# ---- particular traits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["module", "class"])
def test_experts_with_another_gate_are_left(monkeypatch, of):
    """Replaced before or after patching, on one module or on the class."""

    def clamped(experts, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return experts.act_fn(gate).clamp(max=0.1) * up

    model = make_model("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    with apply_torch_fused(model) as handle:
        assert "steps of up to 8 tokens run as one op" in handle.report()
        with monkeypatch.context() as patches:
            if of == "class":
                patches.setattr(type(experts), "_apply_gate", clamped)
            else:
                patches.setattr(experts, "_apply_gate", partial(clamped, experts))
            assert "left to transformers: " in handle.report() and "_apply_gate" in handle.report()
        handle.revert()
        monkeypatch.setattr(type(experts), "_apply_gate", clamped)
        expected = model.generate(prompt(1, 9), **GREEDY)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **GREEDY), expected)
        assert steps(handle) == 0


@pytest.mark.parametrize("name", ["qwen2", "llama", "phi3"])
def test_positions_past_a_training_length(name):
    """If tables change with the length, the op runs up to that length, and transformers beyond it."""
    factors = [1.0] * 8
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": [2.0] * 8}
    rope |= {"original_max_position_embeddings": 20, "factor": 2.0}
    more = {"original_max_position_embeddings": 20} if name == "phi3" else {}
    model = make_model(name, rope_parameters=rope, max_position_embeddings=40, **more)
    expected = model.generate(prompt(1, 9), **GREEDY)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **GREEDY), expected)
        assert 5 < steps(handle) < 15
        assert "positions past" in handle.report()


def test_queries_that_are_scaled_by_their_position():
    model = make_model("ministral3", max_position_embeddings=256)
    options = {"do_sample": False, "max_new_tokens": 70}
    expected = model.generate(prompt(1, 9), **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **options), expected)
        assert steps(handle) == 55
        assert "positions past 63" in handle.report()


def test_adapters_of_fused_projections():
    """Each of the op's matrices gets its rows of an adapter."""
    peft = pytest.importorskip("peft")
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    model = peft.get_peft_model(make_model("phi3"), peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets)).eval()
    stock = model.generate(input_ids=prompt(2, 9), **GREEDY)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    expected = model.generate(input_ids=prompt(2, 9), **GREEDY)
    assert not torch.equal(stock, expected)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(input_ids=prompt(2, 9), **GREEDY), expected)
        assert steps(handle) == 23


@pytest.mark.parametrize("name", ["phi3", "granite", "olmo2", "qwen3_vl"])
def test_packed(name):
    """Packed linear layers, including fused ones."""
    model = make_model(name)
    quantize_(model, bits=4, group_size=32)
    expected = model.generate(prompt(2, 9), **GREEDY)
    with apply_torch_fused(model, int8_products=False) as handle:
        assert torch.equal(model.generate(prompt(2, 9), **GREEDY), expected)
        assert steps(handle) == 23


def test_an_image_is_placed_in_three_dimensions():
    """Different positions of time, height and width run in transformers; the step after them is one op."""
    model = make_model("qwen2_vl")
    ids = prompt(1, 9)
    places = torch.arange(9).expand(3, 1, 9).clone()
    places[1:, :, 3:6] -= 2
    following = torch.full((3, 1, 1), 9)
    with torch.no_grad():
        whole = torch.cat([ids, ids[:, :1]], 1)
        expected = model(whole, position_ids=torch.cat([places, following], 2)).logits[:, -1:]
        with apply_torch_fused(model) as handle:
            cache = FusedKVCache(model.config)
            model(ids, position_ids=places, use_cache=True, **{CACHE: cache})
            logits = model(ids[:, :1], position_ids=following, use_cache=True, **{CACHE: cache}).logits
            assert steps(handle) == 1
            assert relative_error(logits, expected) < 1e-5
            following[1] -= 1
            model(ids[:, :1], position_ids=following, use_cache=True, **{CACHE: cache})
            assert "position_ids belong to an image" in handle.report()


def test_settings_that_change_are_seen():
    """A window and a soft cap of the logits, changed between two calls."""
    model = make_model("gemma2")
    with apply_torch_fused(model):
        model.generate(prompt(1, 9), **GREEDY)
        for name, value in (("final_logit_softcapping", 0.01), ("sliding_window", 3)):
            setattr(model.config, name, value)
            for module in model.modules():
                if getattr(module, "sliding_window", None):
                    module.sliding_window = model.config.sliding_window
            cache, like = FusedKVCache(model.config), copy.deepcopy(model)
            apply_torch_fused(like).revert()
            options = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
            expected, actual = like.generate(prompt(1, 9), **options), model.generate(prompt(1, 9), **options)
            assert torch.equal(actual.sequences, expected.sequences)
            with torch.no_grad():
                for half in (slice(0, 8), slice(8, 9)):
                    logits = model(prompt(1, 9)[:, half], use_cache=True, **{CACHE: cache}).logits
            assert relative_error(logits[:, -1], expected.logits[0]) < 1e-5


# ---- the description is compared with the class ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_rows_match_their_classes(name):
    row = ROWS[name]
    module = importlib.import_module(row.home)
    for part in row.parts:
        assert of_class(getattr(module, row.name(part)), row, part) == "", part


BARE = ["smollm3", "granite", "phi3", "olmo2", "gemma2", "hunyuan_v1_dense", "ernie4_5", "cohere2", "seed_oss", "glm4"]
PREFIXES = {"hunyuan_v1_dense": "HunYuanDenseV1", "ernie4_5": "Ernie4_5", "cohere2": "Cohere2", "seed_oss": "SeedOss"}


@pytest.mark.parametrize("package", BARE)
def test_an_incomplete_row_does_not_match(package):
    """Llama's row with the names of another family's classes."""
    prefix = ROWS[package].prefix if package in ROWS else PREFIXES.get(package, "Glm4")
    row = Family(package, prefix)
    module = importlib.import_module(row.home)
    assert any(_differs(getattr(module, row.name(part), None), row, part) for part in PARTS)


def _differs(cls, row, part):
    return cls is not None and described._differs(cls, row, part)  # the class's own row stays


def test_forwards_are_compared_by_their_names_and_order():
    def forward(self, x):
        return self.second(self.first(x)) if x.shape else getattr(self, "third")  # noqa: B009

    forward.__module__ = "torch_fused.hf.described"  # names_of reads only transformers' code and ours
    names = [*forward.__code__.co_names, "'third'"]
    plumbing = {"shape", "getattr"}
    assert compare([{"second", "first"}, {"'third'"}], plumbing, names) == ""
    assert "uses first" in compare([{"second"}, {"'third'"}], plumbing, names)
    assert "does not use fourth" in compare([{"second", "first", "fourth"}, {"'third'"}], plumbing, names)
    assert "another order" in compare([{"first"}, {"second"}, {"'third'"}], plumbing, names)
    assert names_of(forward) == ["code from outside transformers"]


CHANGES = {
    "a module": lambda layer: layer.add_module("gate", nn.Linear(64, 64)),
    "a parameter": lambda layer: layer.self_attn.register_parameter("sinks", nn.Parameter(torch.ones(4))),
    "a buffer": lambda layer: layer.mlp.register_buffer("mask", torch.ones(4)),
    "a bias of a norm": lambda layer: layer.input_layernorm.register_parameter("bias", nn.Parameter(torch.ones(64))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_with_unknown_parts_is_left(change):
    """Any part that is not in the row."""
    model = make_model("mistral")
    expected = model.generate(prompt(1, 9), **GREEDY)
    CHANGES[change](model.model.layers[1])
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **GREEDY), expected)
        lines = [line for line in handle.report().splitlines() if "not in the row of Mistral" in line]
        assert any("not patched: model.layers.1" in line for line in lines)
        assert any("decode: left to transformers" in line for line in lines)
        assert steps(handle) == 0


def test_a_class_with_a_new_setting_is_left(monkeypatch):
    """A later version of a class reads one more setting: its modules and the step are left to transformers."""
    from transformers.models.mistral import modeling_mistral as home

    source = Path(home.__file__).read_text(encoding="utf-8")
    added = source.replace("scaling=self.scaling,", "scaling=self.scaling * getattr(self.config, 'mixing', 1.0),", 1)
    assert added != source
    path = Path(home.__file__)
    later = {"__name__": home.__name__, "__package__": home.__package__, "__file__": str(path)}
    exec(compile(added, str(path), "exec"), later)
    monkeypatch.setattr(home.MistralAttention, "forward", later["MistralAttention"].forward)
    model = make_model("mistral")
    assert "mixing" in mismatch(model.model.layers[0].self_attn)
    expected = model.generate(prompt(1, 9), **GREEDY)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(1, 9), **GREEDY), expected)
        assert "'mixing', not in the row of Mistral" in handle.report()
        assert "MistralAttention.forward" not in handle.report()
        assert steps(handle) == 0


def test_every_setting_of_these_models_is_used():
    """Transformers accepts unknown settings, so a misspelt one would test nothing."""
    for name in ALL:
        config = make_config(name)
        text = config.get_text_config()
        assert text.vocab_size == VOCABULARY
        assert text.num_hidden_layers == 2, name


def test_table_of_families_is_current():
    """docs/generate.md has the output of `python tools/families_table.py`."""
    page = (Path(__file__).parents[1] / "docs" / "generate.md").read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == table().strip()
