"""Random requests to a patched model return what they return in the stock one, and fail where they fail there."""

import copy
import random
from typing import Any

import pytest
import torch
from families import ROWS, make_model, prompt

from torch_fused.hf import apply_torch_fused

MODES: list[dict[str, Any]] = [
    {},
    {},
    {"num_beams": 2},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "length_penalty": 2.0, "early_stopping": True},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_model": None},
]
"""How tokens are chosen. Drawn tokens are left out: they differ, as torch_fused has a generator of its own."""
PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [7, 8]]},
    {"min_new_tokens": 4},
    {"suppress_tokens": [3, 4]},
    {"sequence_bias": [[[9], 2.0]]},
    {"guidance_scale": 1.5},
    {"renormalize_logits": True},
    {"eos_token_id": [2, 11]},
    {"eos_token_id": [*range(0, 128, 3)]},
    {"forced_eos_token_id": 2},
    {"use_cache": False},
    {"prefill_chunk_size": 3},
    {"cache_implementation": "static"},
    {"cache_implementation": "dynamic_full"},
]
OUTPUTS = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")


class Streamer:
    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.tolist())

    def end(self) -> None:
        self.tokens.append("end")


class Models:
    """A stock model, a patched one and one that assists either."""

    def __init__(self, package: str, attention: str) -> None:
        self.stock = make_model(package)
        self.stock.set_attn_implementation(attention)
        self.patched = copy.deepcopy(self.stock)
        apply_torch_fused(self.patched)
        self.assistant = make_model(package, seed=1)


def request(chance: random.Random) -> dict[str, Any]:
    options = {"max_new_tokens": chance.choice([1, 2, 5, 13, 30]), "do_sample": False, **chance.choice(MODES)}
    for some in chance.sample(PROCESSORS, chance.choice([0, 0, 1, 1, 2, 3])):
        options |= some
    if chance.random() < 0.4:
        options |= {"return_dict_in_generate": True} | {name: chance.random() < 0.5 for name in OUTPUTS}
    return options


def inputs(chance: random.Random, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    single = "prompt_lookup_num_tokens" in options or "assistant_model" in options
    batch, tokens = 1 if single else chance.choice([1, 1, 2, 3]), chance.choice([1, 2, 5, 9, 20])
    ids = prompt(batch, tokens, seed=chance.randrange(1000))
    mask = torch.ones_like(ids)
    for row in range(batch if chance.random() < 0.5 else 0):
        padding = chance.randrange(tokens)
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def outcome(model: Any, assistant: Any, asked: dict[str, torch.Tensor], options: dict[str, Any], streams: bool) -> Any:
    """What a request returns and streams; "raised" if it fails."""
    options = dict(options)
    if "assistant_model" in options:
        options["assistant_model"] = assistant
    streamer = Streamer() if streams else None
    try:
        returned = model.generate(**asked, **options, streamer=streamer)
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return "raised"
    return returned, streamer and streamer.tokens


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if hasattr(theirs, "get_seq_length"):
        assert ours.get_seq_length() == theirs.get_seq_length(), where
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, where
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, equal_nan=True, msg=lambda m: f"{where}: {m}")
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif hasattr(theirs, "items"):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            assert_same(ours[name], theirs[name], f"{where}.{name}")
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 300), marks=pytest.mark.full)], ids=["few", "many"])
@pytest.mark.parametrize("package", ROWS)
def test_random_requests(package, seeds):
    models: dict[str, Models] = {}
    failed = 0
    for seed in seeds:
        chance = random.Random(seed * len(ROWS) + list(ROWS).index(package))
        attention = "eager" if package == "gemma2" else chance.choice(["sdpa", "eager"])
        if attention not in models:
            models[attention] = Models(package, attention)
        options = request(chance)
        asked = inputs(chance, options)
        streams = "num_beams" not in options and chance.random() < 0.3
        two = models[attention]
        theirs, ours = (outcome(model, two.assistant, asked, options, streams) for model in (two.stock, two.patched))
        failed += theirs == "raised"
        assert_same(ours, theirs, f"{package} {attention} seed {seed}, {tuple(asked['input_ids'].shape)}, {options}")
    assert failed < len(seeds)
