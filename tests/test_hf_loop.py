"""The loop of generate(): a step that started too early leaves no trace. Used on GPUs; tested here on the CPU."""

import contextlib

import pytest
import torch
from test_hf_generate import FAMILIES, ONE_FAMILY, make_model, one_thread, prompt  # noqa: F401 (a fixture)
from transformers import GenerationMixin, GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import torch_fused.hf.decode
import torch_fused.hf.loop
from torch_fused.hf import FusedKVCache, apply_torch_fused, transformers_private
from torch_fused.hf.cache import CACHE
from torch_fused.hf.watch import Watch

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 1.5}


class Kept(BaseStreamer):
    """Keeps the tensors that it gets: they must not change afterwards."""

    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value)

    def end(self):
        self.ended += 1


class Asked(StoppingCriteria):
    """A user's criterion, which counts the tokens that it has seen."""

    def __init__(self, most):
        self.seen, self.most = [], most

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.most)


def outcome(model, rows, **options):
    """All results of a generation."""
    torch.manual_seed(3)
    streamer = Kept() if rows == 1 else None
    given = {"pad_token_id": 0, "max_new_tokens": 40, "streamer": streamer, **options}
    result = model.generate(prompt(rows, 7), return_dict_in_generate=True, **given)
    cache = next(value for value in result.values() if hasattr(value, "layers"))
    states = [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]
    streamed = ([tokens.tolist() for tokens in streamer.tokens], streamer.ended) if streamer else None
    return result.sequences.tolist(), streamed, states, torch.get_rng_state()


def ends_of(model, rows, **options):
    """A token that first occurs in the middle of a sequence, and one that never occurs."""
    free = torch.tensor(outcome(model, rows, eos_token_id=None, **options)[0])[:, 7:]
    return [int(free[0, 17]), int(free[-1, 3]), 126 if 126 not in free else 125]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_that_is_noticed_late(family, rows, options, monkeypatch):
    """Tokens, what was streamed, the cache and the generator are those of a loop that waits for each step."""
    model = make_model(family)
    with apply_torch_fused(model):
        for end in ends_of(model, rows, **options):
            expected = outcome(model, rows, eos_token_id=end, **options)
            with monkeypatch.context() as patched:
                patched.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
                actual = outcome(model, rows, eos_token_id=end, **options)
            assert actual[:2] == expected[:2]
            assert all(torch.equal(a, b) for a, b in zip(actual[2], expected[2], strict=True))
            assert torch.equal(actual[3], expected[3])


def test_one_extra_step_runs(monkeypatch):
    """The loop runs ahead: one step more than there are tokens, but none past the requested length."""
    model = make_model("qwen2")
    with apply_torch_fused(model) as handle:
        end = ends_of(model, 1, **GREEDY)[0]
        handle.revert()
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
    for options, more in (({"eos_token_id": end}, 0), ({"eos_token_id": None}, -1)):
        with apply_torch_fused(model) as handle:
            tokens = len(outcome(model, 1, **GREEDY, **options)[0][0]) - 7
            assert f"{tokens + more} calls as one op" in handle.report()


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_sequence_is_looked_at_meanwhile(rows, monkeypatch):
    """Its criteria run after the next step has started; those of several run first, on the device."""
    model, events = make_model(), []
    apply_torch_fused(model)
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
    step, look = torch_fused.hf.loop.decode_token_, EosTokenCriteria.__call__
    monkeypatch.setattr(torch_fused.hf.loop, "decode_token_", lambda *a, **k: (events.append("step"), step(*a, **k))[1])
    monkeypatch.setattr(EosTokenCriteria, "__call__", lambda *a, **k: (events.append("look"), look(*a, **k))[1])
    model.generate(prompt(rows, 7), max_new_tokens=4, do_sample=False, eos_token_id=127, pad_token_id=0)
    order = ["step", "look"] if rows == 1 else ["look", "step"]
    assert events == order * 3 + ["look"] * (rows > 1)  # after the last token there is no step, and its length ends it


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_shortest_length_ends_it(rows, ahead, monkeypatch):
    model, lengths = make_model(), StoppingCriteriaList([MaxLengthCriteria(30), MaxLengthCriteria(12)])
    options = {"max_new_tokens": 40, "pad_token_id": 0, "stopping_criteria": lengths, **GREEDY}
    expected = model.generate(prompt(rows, 7), **options)
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: ahead)
    apply_torch_fused(model)
    assert torch.equal(model.generate(prompt(rows, 7), **options), expected)
    assert expected.shape == (rows, 12)


@pytest.mark.parametrize(("positions", "asked"), [(20, 13), (1024, 0), (None, 0)])
def test_a_length_is_asked_only_if_it_may_warn(positions, asked, monkeypatch):
    """The host waits for no token if only a length ends the generation; past the model's positions it warns."""
    model, calls = make_model("qwen2"), []
    apply_torch_fused(model)
    own = MaxLengthCriteria.__call__
    monkeypatch.setattr(MaxLengthCriteria, "__call__", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    lengths = StoppingCriteriaList([MaxLengthCriteria(21, positions)])
    model.config.max_position_embeddings = 1024
    out = model.generate(prompt(1, 7), max_new_tokens=40, stopping_criteria=lengths, pad_token_id=0, **GREEDY)
    assert (out.shape[1], len(calls)) == (21, asked)


def test_a_users_criteria_run_in_time(monkeypatch):
    """They see every length once, and no step starts before they return."""
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
    model = make_model("llama")
    with apply_torch_fused(model) as handle:
        asked = Asked(15)
        model.generate(prompt(1, 7), max_new_tokens=40, stopping_criteria=StoppingCriteriaList([asked]), **GREEDY)
        assert asked.seen == list(range(8, 16))
        assert "7 calls as one op" in handle.report()


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_forward_that_was_too_early(options, monkeypatch):
    """If transformers' own loop calls the model before it knows the end, so does ours, without the decode step."""
    model, calls = make_model(), []
    with apply_torch_fused(model, decode=False):
        end = ends_of(model, 1, **options)[0]
        expected = outcome(model, 1, eos_token_id=end, **options)
        monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
        monkeypatch.setattr(transformers_private, "forward_may_be_early", lambda *_: True)
        hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
        actual = outcome(model, 1, eos_token_id=end, **options)
        hook.remove()
    assert actual[:2] == expected[:2]
    assert all(torch.equal(a, b) for a, b in zip(actual[2], expected[2], strict=True))
    assert torch.equal(actual[3], expected[3])
    assert len(calls) == len(expected[0][0]) - 7 + 1


# ---- 256 tokens of every family -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_256_tokens_are_stocks(family, rows):
    """float32, every length of the context from 1 to 260, left-padded, across growths of a cache without a hint."""
    model = make_model(family)
    ids = prompt(rows, 4)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    options = {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 256, **GREEDY}
    expected = model.generate(ids, **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
        cache = FusedKVCache(model.config)
        assert torch.equal(model.generate(ids, **options, **{CACHE: cache}), expected)
        assert cache.get_seq_length() == 259
        assert "510 calls as one op" in handle.report()


MODES = {
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "lookup of more tokens than a step has": {"prompt_lookup_num_tokens": 12},
    "beams": {"num_beams": 3},
    "beams of a batch": {"num_beams": 2, "rows": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ONE_FAMILY)
def test_256_tokens_are_stocks_in_other_modes(family, mode):
    """Steps of several tokens that are cropped again, and sequences that are reordered, with a growing cache."""
    options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 256, **GREEDY, **MODES[mode]}
    model = make_model(family)
    rows = options.pop("rows", 1)
    ids = prompt(rows, 6).repeat(1, 3)
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    inputs = {"attention_mask": mask, **options}
    expected = model.generate(ids, **inputs)
    assert expected.shape[1] == 18 + 256
    with apply_torch_fused(model) as handle:
        for given in ({}, {CACHE: FusedKVCache(model.config)}):
            assert torch.equal(model.generate(ids, **inputs, **given), expected)
        assert "calls as one op" in handle.report()


# ---- which loop it is -----------------------------------------------------------------------------------------------


def ops_of(run):
    with torch.profiler.profile() as profile:
        run()
    return {event.key for event in profile.key_averages()}


def small_gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


OURS = {
    "decode=False": ({"decode": False}, {}),
    "another family": ({}, {}),
    "logits": ({}, {"return_dict_in_generate": True, "output_logits": True}),
    "hidden states": ({}, {"return_dict_in_generate": True, "output_hidden_states": True}),
    "a user's cache": ({"cache": False}, {}),
    "a processor": ({}, {"repetition_penalty": 1.2}),
    "without a cache": ({}, {"use_cache": False}),
}


@pytest.mark.filterwarnings("ignore:apply_torch_fused")
@pytest.mark.parametrize("case", OURS)
def test_the_fused_sampler_draws(case):
    """With any kind of step: torch's multinomial does not run, and greedy tokens and all other results are stock's."""
    flags, options = OURS[case]
    model = small_gpt2() if case == "another family" else make_model()
    options = {"pad_token_id": 0, "max_new_tokens": 12, **options}
    expected = model.generate(prompt(2, 7), **options, **GREEDY)
    with apply_torch_fused(model, **flags):
        actual = model.generate(prompt(2, 7), **options, **GREEDY)
        names = ops_of(lambda: model.generate(prompt(2, 7), **options, **SAMPLED))
    assert "aten::multinomial" not in names
    if isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert list(actual) == list(expected)
        assert torch.equal(actual.sequences, expected.sequences)
        for name in expected.keys() & {"logits", "hidden_states"}:
            torch.testing.assert_close(actual[name], expected[name])


sample_of_transformers = GenerationMixin._sample


@pytest.mark.parametrize("where", ["the class", "the mixin"])
def test_a_replaced_loop_runs(where, monkeypatch):
    """A replacement of transformers' loop is called, not ours."""
    model, seen = make_model(), []
    expected = model.generate(prompt(2, 7), max_new_tokens=12, **GREEDY)

    def replaced(self, *args, **kwargs):
        seen.append(1)
        return sample_of_transformers(self, *args, **kwargs)

    monkeypatch.setattr(type(model) if where == "the class" else GenerationMixin, "_sample", replaced)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(prompt(2, 7), max_new_tokens=12, **GREEDY), expected)
        assert "11 calls as one op" in handle.report()
    assert seen == [1]


def test_errors_of_generate_are_its_own():
    """Too many, duplicate or unknown arguments; a streamer with beams: the same errors as stock."""
    model = make_model()
    cases = [
        ((prompt(1, 7), *[None] * 20), {}),
        ((prompt(1, 7),), {"inputs": prompt(1, 7)}),
        ((prompt(1, 7),), {"nobody_knows": 1}),
        ((prompt(1, 7),), {"num_beams": 2, "streamer": Kept()}),
        ((prompt(1, 7),), {"stop_strings": ["a"]}),
        ((prompt(1, 7),), {"penalty_alpha": 0.6}),
        ((prompt(1, 7),), {"temperature": -1.0, "do_sample": True}),
    ]
    for args, kwargs in cases:
        errors = []
        for patched in (False, True):
            with apply_torch_fused(model) if patched else contextlib.nullcontext():
                with pytest.raises((TypeError, ValueError)) as error:
                    model.generate(*args, max_new_tokens=4, **kwargs)
                errors.append((error.type, str(error.value) if error.type is ValueError else ""))
        assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("options", "seconds", "looks"),
    [({}, 60, 2), ({}, 0, 40), ({"streamer": Kept()}, 60, 40), ({"stopping_criteria": Asked(100)}, 60, 40)],
    ids=["undisturbed", "after a while", "a streamer", "a criterion"],
)
def test_how_often_a_model_is_checked(monkeypatch, options, seconds, looks):
    """For every token if foreign code may have run in between, or after some time: before the prompt, then for each
    of 39 steps. Otherwise before the prompt and at the first step."""
    counted, holds = [], Watch.holds
    monkeypatch.setattr(Watch, "holds", lambda self: counted.append(1) or holds(self))
    monkeypatch.setattr(torch_fused.hf.decode, "LOOK_AGAIN", seconds)
    model = make_model()
    apply_torch_fused(model).report()
    counted.clear()
    if "stopping_criteria" in options:
        options = {"stopping_criteria": StoppingCriteriaList([options["stopping_criteria"]])}
    model.generate(prompt(1, 7), max_new_tokens=40, do_sample=False, eos_token_id=None, **options)
    assert len(counted) == looks


def test_a_change_in_the_middle_is_seen():
    """A streamer that changes a module: the next token uses the change."""

    class Changing(Kept):
        def put(self, value):
            super().put(value)
            if len(self.tokens) == 20:
                model.model.layers[0].mlp.act_fn = torch.nn.Tanh()

    tokens = []
    for patch in (False, True):
        model = make_model()
        if patch:
            apply_torch_fused(model)
        tokens.append(model.generate(prompt(1, 7), max_new_tokens=40, do_sample=False, streamer=Changing()))
    assert torch.equal(*tokens)
