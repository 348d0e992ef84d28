"""The loop of generate(): a step that began too early leaves no trace. A GPU works so; here the CPU does."""

import pytest
import torch
from test_hf_generate import FAMILIES, make_model, one_thread, prompt  # noqa: F401 (a fixture)
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import torch_fused.hf.loop
from torch_fused.hf import apply_torch_fused

GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 1.5}


class Kept(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended += 1


class Asked(StoppingCriteria):
    """A user's own, which counts the tokens that it has seen."""

    def __init__(self, most):
        self.seen, self.most = [], most

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.most)


def outcome(model, rows, **options):
    """Everything that a generation leaves behind."""
    torch.manual_seed(3)
    streamer = Kept() if rows == 1 else None
    given = {"pad_token_id": 0, "max_new_tokens": 40, "streamer": streamer, **options}
    result = model.generate(prompt(rows, 7), return_dict_in_generate=True, **given)
    cache = next(value for value in result.values() if hasattr(value, "layers"))
    states = [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]
    streamed = (streamer.tokens, streamer.ended) if streamer else None
    return result.sequences.tolist(), streamed, states, torch.get_rng_state()


def ends_of(model, rows, **options):
    """A token that some sequence has first in the middle, and one that none has at all."""
    free = torch.tensor(outcome(model, rows, eos_token_id=None, **options)[0])[:, 7:]
    return [int(free[0, 17]), int(free[-1, 3]), 126 if 126 not in free else 125]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_that_is_seen_late(family, rows, options, monkeypatch):
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


def test_a_step_too_many_is_taken(monkeypatch):
    """The loop does run ahead: one step more than there are tokens, but none past the length asked for."""
    model = make_model("qwen2")
    with apply_torch_fused(model) as handle:
        end = ends_of(model, 1, **GREEDY)[0]
        handle.revert()
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
    for options, more in (({"eos_token_id": end}, 0), ({"eos_token_id": None}, -1)):
        with apply_torch_fused(model) as handle:
            tokens = len(outcome(model, 1, **GREEDY, **options)[0][0]) - 7
            assert f"{tokens + more} calls as one op" in handle.report()


def test_a_users_own_criteria_are_asked_in_time(monkeypatch):
    """They see every length once, and no step begins before they have answered."""
    monkeypatch.setattr(torch_fused.hf.loop, "runs_ahead", lambda device: True)
    model = make_model("llama")
    with apply_torch_fused(model) as handle:
        asked = Asked(15)
        model.generate(prompt(1, 7), max_new_tokens=40, stopping_criteria=StoppingCriteriaList([asked]), **GREEDY)
        assert asked.seen == list(range(8, 16))
        assert "7 calls as one op" in handle.report()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_256_tokens_are_stocks(family, rows):
    """float32, every length of the context from 1 to 260, left-padded, across several growths of the cache."""
    model = make_model(family)
    ids = prompt(rows, 4)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, :row] = 0
    options = {"attention_mask": mask, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 256, **GREEDY}
    expected = model.generate(ids, **options)
    with apply_torch_fused(model) as handle:
        assert torch.equal(model.generate(ids, **options), expected)
        assert "255 calls as one op" in handle.report()
