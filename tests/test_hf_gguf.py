"""load_gguf: the weights of llama.cpp's files, kept packed, in transformers' models."""

import warnings

import pytest
import torch
from checkpoints import write_gguf
from gguf import GGMLQuantizationType as Type
from test_hf_generate import FAMILIES, make_model, one_thread, prompt  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from torch_fused import demo
from torch_fused.functional import dequantize
from torch_fused.hf import apply_torch_fused, gguf_blocks, load_gguf
from torch_fused.hf.packing import packed_modules
from torch_fused.nn import QuantizedEmbedding, QuantizedLinear
from torch_fused.testing import relative_error

EXACT = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q5_0: 8, Type.Q5_1: 8, Type.Q8_0: 8}
CONVERTED = {Type.Q4_K: (4, 5e-4), Type.Q5_K: (8, 5e-4), Type.Q6_K: (8, 1e-2)}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LAYERS = [f"blk.{i}.{name}.weight" for i in range(2) for name in MATRICES]


def gguf_model(family="llama", **changes):
    return make_model(family, **{"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, **changes})


def load(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_gguf(path, **options)


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def matrices(model):
    """All weights of the model, unpacked to float32."""
    found = {key: value for key, value in model.state_dict().items() if not key.endswith((".scales", ".biases"))}
    for name, m in packed_modules(model).items():
        form = {"bits": m.bits, "group_size": m.group_size}
        found[f"{name}.weight"] = dequantize(m.weight, m.scales, m.biases, **form, dtype=torch.float32)
    return found


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(family, kind, tmp_path):
    """Each weight has the same float32 bits as from the gguf package, and takes 4 or 8 bits."""
    tied = kind in (Type.Q4_1, Type.Q8_0)
    stock = gguf_model(family, tie_word_embeddings=tied)
    held = write_gguf(tmp_path / "m.gguf", stock, dict.fromkeys(["token_embd.weight", "output.weight", *LAYERS], kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load_gguf(tmp_path / "m.gguf")
    found = matrices(model)
    assert found.keys() == held.keys() and all(torch.equal(found[key], held[key]) for key in held)
    report = model.hf_quantizer.report
    assert set(report.packed.values()) == {(EXACT[kind], 32)} and not report.errors and not report.dense
    assert len(report.packed) == len(LAYERS) + (1 if tied else 2)
    stock.load_state_dict(held | ({"lm_head.weight": held["model.embed_tokens.weight"]} if tied else {}))
    close(model(prompt(1, 6)).logits, stock(prompt(1, 6)).logits)


@pytest.mark.parametrize("kind", CONVERTED, ids=lambda kind: kind.name)
def test_converted(kind, tmp_path, monkeypatch):
    """Inexact conversions report their error, which is the actual one; also if converted in several blocks."""
    monkeypatch.setattr(gguf_blocks, "_BLOCK", 20_000)
    bits, most = CONVERTED[kind]
    held = write_gguf(tmp_path / "m.gguf", gguf_model(), dict.fromkeys(["token_embd.weight", *LAYERS], kind))
    with pytest.warns(UserWarning, match=f"{1 + len(LAYERS)} matrices were not converted exactly"):
        model, _ = load_gguf(tmp_path / "m.gguf")
    report = model.hf_quantizer.report
    found = matrices(model)
    for name, error in report.errors.items():
        exact = held[f"{name}.weight"]
        assert error == pytest.approx(float((found[f"{name}.weight"] - exact).norm() / exact.norm()), rel=1e-3)
        assert error < most and report.packed[name] == (bits, 32)
    assert len(report.errors) == 1 + len(LAYERS) and "converted with an error of at most" in str(report)


def test_mixed_types(tmp_path):
    """Tensors of different types; half types stay dense; a saved model loads unchanged."""
    types = {
        "token_embd.weight": Type.Q8_0,
        "output.weight": Type.F16,
        **dict.fromkeys(LAYERS, Type.Q4_1),
        "blk.1.ffn_down.weight": Type.BF16,
    }
    held = write_gguf(tmp_path / "m.gguf", gguf_model("qwen2"), types)
    model, _ = load_gguf(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and type(model.model.embed_tokens) is QuantizedEmbedding
    assert type(model.lm_head) is torch.nn.Linear and type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert model.hf_quantizer.report.dense.keys() == {"lm_head", "model.layers.1.mlp.down_proj"}
    found = matrices(model)
    assert all(torch.equal(found[key], held[key].to(found[key].dtype)) for key in held)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(m.scales.dtype == torch.float16 for m in packed_modules(again).values())
    assert torch.equal(again(prompt(1, 5)).logits, model(prompt(1, 5)).logits)
    assert torch.equal(model.generate(prompt(1, 5), max_new_tokens=3)[:, :5], prompt(1, 5))


def test_scales_too_large_for_float16(tmp_path):
    """The bias of a Q8_0 group is -128 times its scale; then all scales are float32, and exact."""
    stock = gguf_model(tie_word_embeddings=True)
    with torch.no_grad():
        stock.model.embed_tokens.weight[3] *= 1e6
    held = write_gguf(tmp_path / "m.gguf", stock, {"token_embd.weight": Type.Q8_0, LAYERS[0]: Type.Q4_0})
    model, _ = load_gguf(tmp_path / "m.gguf")
    assert model.model.embed_tokens.scales.dtype == torch.float32
    found = matrices(model)
    assert all(torch.equal(found[key], held[key]) for key in held)


def test_rotary_divisors(tmp_path):
    """Llama 3's frequency divisors, a tensor in the file, become transformers' parameters."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stock = gguf_model(rope_parameters=rope, max_position_embeddings=131072)
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    divisors = plain / stock.model.rotary_emb.inv_freq
    write_gguf(tmp_path / "m.gguf", stock, rope_freqs=divisors)
    model, _ = load_gguf(tmp_path / "m.gguf")
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    assert torch.equal(model(prompt(1, 6)).logits, stock(prompt(1, 6)).logits)
    write_gguf(tmp_path / "m.gguf", stock, rope_freqs=divisors * torch.linspace(1, 2, 32))
    with pytest.raises(RuntimeError, match=r"the divisors in rope_freqs\.weight are not those of Llama 3"):
        load_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("types", "changes", "message"),
    [
        ({LAYERS[1]: Type.Q2_K}, {}, r"blk.0.attn_k.weight must have one of the types F32, .*Q6_K, got Q2_K"),
        ({}, {"block_count": 3}, r"the file has no tensor blk.2.attn_q.weight, for model.layers.2.self_attn.q_proj"),
        ({}, {"block_count": 1}, r"blk.1.attn_k.weight is not a tensor of LlamaForCausalLM"),
        ({}, {"feed_forward_length": 128}, r"blk.0.ffn_gate.weight must have the shape \[128, 256\], got \[512, 256\]"),
        ({}, {"architecture": "gemma2"}, r"the architecture must be one of llama, qwen2, qwen3, got 'gemma2'"),
        ({}, {"rope.scaling.type": "yarn"}, r"scaled \(yarn\) or partial rotary"),
        ({}, {"rope.dimension_count": 32}, r"scaled \(none\) or partial rotary"),
    ],
)
def test_refused(types, changes, message, tmp_path):
    """Anything that is unsupported, does not fit or is missing raises an error that names it."""
    write_gguf(tmp_path / "m.gguf", gguf_model(), types, **changes)
    with pytest.raises(RuntimeError, match=message):
        load_gguf(tmp_path / "m.gguf")


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(RuntimeError, match=r"none\.gguf: no such file"):
        load_gguf(tmp_path / "none.gguf")
    path = tmp_path / "m.gguf"
    write_gguf(path, gguf_model())
    whole = path.read_bytes()
    for length in (0, 10, 300, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(RuntimeError, match=r"m\.gguf: not a complete GGUF file"):
            load_gguf(path)


def test_patched(tmp_path):
    """A patched model generates the same tokens; the report lists what is left to transformers."""
    kinds = {"token_embd.weight": Type.Q8_0, **dict.fromkeys(LAYERS, Type.Q4_0)}
    write_gguf(tmp_path / "m.gguf", gguf_model(tie_word_embeddings=True), kinds)
    model, _ = load_gguf(tmp_path / "m.gguf")
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    stock = model.generate(prompt(2, 5), **options)
    with apply_torch_fused(model, int8_products=False) as handle:
        assert torch.equal(model.generate(prompt(2, 5), **options), stock)
        assert "  decode: steps of up to 8 tokens run as one op" in handle.report()


def test_real_file():
    """SmolLM2's Q4_1 file: packed, it generates English."""
    model, tokenizer = load_gguf(demo._demo_file())
    report = model.hf_quantizer.report
    assert not report.errors and not report.dense
    assert [name for name, form in report.packed.items() if form.bits == 8] == ["model.embed_tokens"]
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.weight is model.model.embed_tokens.weight
    inputs = demo._encode(tokenizer, "Name three colours.")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert "Red" in tokenizer.decode(tokens[0])


@pytest.mark.full
def test_real_file_is_stocks():
    """All weights, the logits and the tokenizer are the same as of transformers' dequantised model."""
    path = demo._demo_file()
    model, tokenizer = load_gguf(path)
    options = {"gguf_file": path.name}
    stock = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    stock_tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    found = matrices(model)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    assert all(torch.equal(found[key], value) for key, value in stock.state_dict().items())
    inputs, expected = (demo._encode(t, "Tell me of the 3 Zürich trams.") for t in (tokenizer, stock_tokenizer))
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        logits, expected = model(**inputs).logits, stock(**inputs).logits
    assert relative_error(logits, expected) < 1e-4
