"""`generate` draws tokens with the fused sampler, with the probabilities of transformers' processors."""

import pytest
import torch
from test_hf_generate import VOCABULARY, make_model, prompt
from test_hf_patch import kernels
from transformers.generation import (
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from torch_fused.hf import apply_torch_fused, generate
from torch_fused.hf.sampling import split_processors
from torch_fused.ops.sampling import next_token
from torch_fused.testing import make

TEMPERATURE, TOP_K, TOP_P, MIN_P = (
    TemperatureLogitsWarper(0.7),
    TopKLogitsWarper(20),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.05),
)
PENALTY, TYPICAL, NORMALIZE = RepetitionPenaltyLogitsProcessor(1.3), TypicalLogitsWarper(0.9), LogitNormalization()

# (processors, how many of the last ones the sampler replaces)
LISTS = {
    "none": ([], 0),
    "all": ([TEMPERATURE, TOP_K, TOP_P, MIN_P], 4),
    "some, after another": ([PENALTY, TOP_K, TOP_P], 2),
    "another one last": ([TEMPERATURE, TOP_K, NORMALIZE], 0),
    "another between": ([TEMPERATURE, TYPICAL, TOP_P], 1),
    "the user's own first": ([TOP_K, TEMPERATURE, TopKLogitsWarper(10)], 2),
    "twice": ([TOP_P, TopPLogitsWarper(0.5)], 1),
    "keeping two": ([TEMPERATURE, TopKLogitsWarper(1, min_tokens_to_keep=2)], 0),
    "another filter value": ([TEMPERATURE, TopPLogitsWarper(0.9, filter_value=-1e9)], 0),
}


@pytest.mark.parametrize("name", LISTS)
def test_processors_that_the_sampler_replaces(name):
    """The last processors in the sampler's order; the others run before."""
    processors, count = LISTS[name]
    before, filters = split_processors(LogitsProcessorList(processors))
    assert type(before) is LogitsProcessorList
    assert list(before) == processors[: len(processors) - count]
    assert len(filters) == count


def draw(processors, scores):
    """A token per row, drawn like in the loop."""
    before, filters = split_processors(processors)
    return next_token(before(prompt(1, 5).expand(len(scores), 5), scores), True, **filters)


@pytest.mark.parametrize("name", LISTS)
def test_draws_follow_the_processed_probabilities(name):
    """20,000 draws per row: chi-square against transformers' softmax."""
    processors, _ = LISTS[name]
    scores = make(1, VOCABULARY, scale=2.0)
    expected = LogitsProcessorList(processors)(prompt(1, 5), scores.clone()).softmax(-1)[0].double()
    draws = 20000
    torch.manual_seed(0)
    tokens = draw(processors, scores.repeat(draws, 1))
    counts = torch.bincount(tokens, minlength=VOCABULARY).double()
    assert (counts[expected == 0] == 0).all()
    likely = expected * draws >= 5
    chi_square = ((counts - expected * draws)[likely] ** 2 / (expected * draws)[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 5 * (2 * max(freedom, 1)) ** 0.5 + 5


@pytest.mark.parametrize("way", ["model.generate", "hf.generate"])
def test_generate_runs_the_fused_sampler(way):
    """Neither torch's multinomial nor a sort or argmax runs, with the model patched or through hf.generate."""
    model = make_model()
    if way == "model.generate":
        apply_torch_fused(model)
        call = model.generate
    else:

        def call(ids, **options):
            return generate(model, ids, **options)

    options = {"max_new_tokens": 4, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}
    counts = kernels(lambda: call(prompt(2, 6), do_sample=True, **options))
    assert counts["sample"] == 4
    assert not {"aten::multinomial", "aten::sort", "aten::topk"} & counts.keys()
    counts = kernels(lambda: call(prompt(2, 6), do_sample=False, max_new_tokens=4))
    assert counts["greedy"] == 4
    assert "aten::argmax" not in counts


def test_draws_are_reproducible():
    """`torch.manual_seed` determines the tokens, in a batch and one by one in later calls."""
    model = make_model()
    apply_torch_fused(model)

    def run(seed):
        torch.manual_seed(seed)
        return model.generate(prompt(2, 6), do_sample=True, max_new_tokens=20)

    first = run(0)
    assert torch.equal(run(0), first)
    assert not torch.equal(run(1), first)


def test_scores_and_logits_are_stocks():
    """If scores are requested, generate returns those of transformers' processors for the drawn tokens."""
    model = make_model()
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 6}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    torch.manual_seed(0)
    stock = model.generate(prompt(1, 6), **options, **wanted)
    with apply_torch_fused(model):
        torch.manual_seed(0)
        fused = model.generate(prompt(1, 6), **options, **wanted)
        logits = model.generate(prompt(1, 6), **options, return_dict_in_generate=True, output_logits=True).logits
    assert torch.equal(fused.sequences, stock.sequences)
    for name in ("scores", "logits"):
        for a, e in zip(getattr(fused, name), getattr(stock, name), strict=True):
            assert type(a) is torch.Tensor
            torch.testing.assert_close(a, e)
    assert all(type(step) is torch.Tensor for step in logits)


def test_other_modes_are_stocks():
    """Beams, sampled beams and assisted decoding use transformers' own scores."""
    model, assistant = make_model(), make_model(layers=1)
    cases = [{"num_beams": 3, "do_sample": False}, {"num_beams": 3, "do_sample": True, "top_k": 20}]
    cases += [{"assistant_model": assistant, "do_sample": sampled} for sampled in (False, True)]
    for options in cases:
        torch.manual_seed(0)
        expected = model.generate(prompt(1, 6), max_new_tokens=16, **options)
        with apply_torch_fused(model):
            torch.manual_seed(0)
            assert torch.equal(model.generate(prompt(1, 6), max_new_tokens=16, **options), expected)


# ---- NaN and infinity -----------------------------------------------------------------------------------------------


class Filling:
    """A processor that fills a column, for all sequences or only the last one, once there are enough tokens."""

    def __init__(self, value: float, length: int, rows: slice):
        self.value, self.length, self.rows = value, length, rows

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= self.length:
            scores = scores.clone()
            scores[self.rows, 7] = self.value
        return scores


def calls(model):
    """model.generate patched, with and without the decode step, and hf.generate."""

    def patched(decode):
        def call(ids, **options):
            with apply_torch_fused(model, decode=decode):
                return model.generate(ids, **options)

        return call

    return patched(True), patched(False), lambda ids, **options: generate(model, ids, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01}])
def test_scores_without_probabilities(value, filters):
    """One NaN or +inf in one sequence's scores: drawing raises as stock does and names the row, greedy is stock's."""
    model = make_model()
    for length, rows in ((0, slice(None)), (8, slice(1, 2))):
        options = {"max_new_tokens": 6, "logits_processor": [Filling(value, length, rows)]}
        expected = model.generate(prompt(2, 6), do_sample=False, **options)
        with pytest.raises(RuntimeError, match=r"inf.*nan"):
            model.generate(prompt(2, 6), do_sample=True, **filters, **options)
        for call in calls(model):
            with pytest.raises(RuntimeError, match=f"no NaN or .inf .* row {rows.start or 0} has"):
                call(prompt(2, 6), do_sample=True, **filters, **options)
            assert torch.equal(call(prompt(2, 6), do_sample=False, **options), expected)


@pytest.mark.parametrize("do_sample", [True, False])
def test_a_weight_that_becomes_nan(do_sample):
    """NaN logits in the middle of a generation, where each token is one op: an error, or stock's tokens."""

    class Spoiling:
        """A streamer that spoils a row of the head after three tokens."""

        def put(self, value):
            self.seen = getattr(self, "seen", -1) + 1
            if self.seen == 3:
                model.lm_head.weight.data[7] = torch.nan

        def end(self):
            pass

    def run(call):
        model.lm_head.weight.data.copy_(weight)
        return call(prompt(1, 6), do_sample=do_sample, max_new_tokens=8, streamer=Spoiling())

    model = make_model(tie_word_embeddings=False)
    weight = model.lm_head.weight.detach().clone()
    if do_sample:
        for call in (model.generate, *calls(model)):
            with pytest.raises(RuntimeError, match=r"(?i)nan"):
                run(call)
    else:
        expected = run(model.generate)
        assert (expected[0, -4:] == 7).all()
        for call in calls(model):
            assert torch.equal(run(call), expected)


def test_an_error_moves_no_generator():
    """The next draw after an error is the same as without the error."""
    scores = make(2, VOCABULARY)
    scores[1, 3] = torch.nan
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="row 1 has"):
        draw([TOP_K], scores)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_p_that_is_reached_exactly():
    """Hugging Face's own regression case: two of the four tokens are drawn."""
    scores = torch.tensor([[0.3, 0.1, 0.1, 0.5]]).log().repeat(400, 1)
    assert set(draw([TopPLogitsWarper(0.8)], scores).tolist()) == {0, 3}
