"""The loop of hf.generate gives the same results as transformers' own loops."""

import pytest
import torch
from test_hf_decode import (
    one_thread,  # noqa: F401 (a fixture)
    padded,
)
from test_hf_generate import Streamer, make_model, prompt
from transformers import StoppingCriteria, StoppingCriteriaList

from torch_fused.hf import apply_torch_fused, generate


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
def test_the_loop_gives_the_results_of_transformers(loop):
    """The same result as `model.generate` of the patched model with the same seed; for greedy tokens also stock's
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
    """A greedy or sampled token takes the op and the loop's bookkeeping; no logits reach Python."""
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
    """A hook that is registered while tokens are streamed is called from then on, and the tokens stay right."""
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
