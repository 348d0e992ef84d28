"""Packed weights in transformers models: loading, packing in place, saving, training adapters, patching."""

import copy
import gc
import json
import os
import subprocess
import sys
import textwrap
import weakref

import peft
import pytest
import torch
from checkpoints import write_mlx
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hf_generate import FAMILIES, make_model, one_thread, prompt  # noqa: F401
from tokens import small_tokenizer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.metal_quantization import MetalLinear, _affine_quantize_tensor

from torch_fused.functional import dequantize, quantize
from torch_fused.hf import TorchFusedConfig, apply_torch_fused, generate, load_mlx, prepare_lora, quantize_
from torch_fused.hf.packing import TiedLinear, packed_modules
from torch_fused.nn import QuantizedEmbedding, QuantizedLinear

GREEDY = {"do_sample": False, "max_new_tokens": 16, "min_new_tokens": 16}


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert tensor.dtype == other.dtype, name
        words = tensor.dtype == torch.uint32
        assert torch.equal(tensor.view(torch.int32), other.view(torch.int32)) if words else torch.equal(tensor, other)


def close(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


# ---- packed while loading, packed at hand, saved --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tied, dtype, tmp_path):
    """`from_pretrained` packs like `quantize_`; a saved model loads again bit for bit."""
    dense = make_model(family, tie_word_embeddings=tied)
    dense.save_pretrained(tmp_path / "dense")
    config = TorchFusedConfig(bits=8 if tied else 4, group_size=32)
    model = load(tmp_path / "dense", quantization_config=config, dtype=dtype)
    report = model.hf_quantizer.report
    assert set(report.packed.values()) == {(config.bits, 32)} and not report.dense
    assert len(report.packed) == (15 if tied else 16)
    at_hand = dense.to(dtype)
    assert quantize_(at_hand, bits=config.bits, group_size=32) == report
    same_state(at_hand, model)
    for i, saved in enumerate((model, at_hand)):
        saved.save_pretrained(tmp_path / str(i))
        again = load(tmp_path / str(i), dtype=dtype)
        same_state(again, model)
        assert again.hf_quantizer.report == report
        assert torch.equal(again(prompt(2, 5)).logits, model(prompt(2, 5)).logits)
    assert type(model.lm_head) is (TiedLinear if tied else QuantizedLinear)
    assert {type(m) for m in packed_modules(model).values()} == {QuantizedLinear, QuantizedEmbedding}


def test_other_files(folder, tmp_path):
    """Pickled checkpoints, which contain a tied head twice; several files; a part of the model."""
    config = TorchFusedConfig(group_size=32)
    model = load(folder, quantization_config=config)
    (folder / "model.safetensors").unlink()
    torch.save(make_model(tie_word_embeddings=True).state_dict(), folder / "pytorch_model.bin")
    pickled = load(folder, quantization_config=config)
    assert isinstance(pickled.lm_head, TiedLinear)
    same_state(pickled, model)
    untied = make_model()
    quantize_(untied, group_size=32)
    untied.save_pretrained(tmp_path / "parts", max_shard_size="30KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    same_state(load(tmp_path / "parts", device_map="cpu"), untied)
    base = AutoModel.from_pretrained(tmp_path / "parts")
    same_state(base, untied.model)
    assert len(base.hf_quantizer.report.packed) == 15


def test_values(folder):
    """The codes, scales and biases are those of `quantize`; the model computes with their values."""
    stock = load(folder)
    model = load(folder, quantization_config=TorchFusedConfig(bits=4, group_size=32))
    for name, packed in packed_modules(model).items():
        weight = stock.get_submodule(name).weight
        tensors = packed.weight, packed.scales, packed.biases
        for actual, expected in zip(tensors, quantize(weight, bits=4, group_size=32), strict=True):
            assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
        with torch.no_grad():
            weight.copy_(dequantize(*tensors, bits=4, group_size=32))
    close(model(prompt(2, 5)).logits, stock(prompt(2, 5)).logits)


def test_one_tied_matrix(folder):
    """The head uses the embedding's matrix: one in memory, in the state dict and in a copy."""
    model = load(folder, quantization_config=TorchFusedConfig(group_size=32))
    model.tie_weights()  # as trainers do
    for each in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        for part in ("weight", "scales", "biases"):
            assert getattr(each.lm_head, part) is getattr(each.model.embed_tokens, part)
        assert not [name for name in each.state_dict() if name.startswith("lm_head")]
        assert each.get_output_embeddings() is each.lm_head


def test_head_that_differs_is_not_tied(folder):
    """The config may tie the head although the checkpoint has another matrix for it."""
    tensors = load_file(folder / "model.safetensors")
    twice = dict(tensors, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    for change in (0.0, 1.0):
        twice["lm_head.weight"][0, 0] += change
        save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
        model = load(folder, quantization_config=TorchFusedConfig(group_size=32))
        assert isinstance(model.lm_head, TiedLinear) == (change == 0)
        assert torch.equal(model.lm_head.scales, model.model.embed_tokens.scales) == (change == 0)


def test_what_stays_dense(folder, tmp_path):
    """Columns that groups do not divide, excluded modules, norms; reported, and the same after saving."""
    model = load(folder, quantization_config=TorchFusedConfig(
        group_size=64, modules_to_not_convert=["o_proj"], per_module={
            "model.layers.0.mlp.up_proj": False,
            "model.layers.1.mlp.up_proj": {"bits": 8},
            "model.layers.1.self_attn.q_proj": {"group_size": 32},
        }))  # fmt: skip
    report = model.hf_quantizer.report
    columns = "96 columns are not a multiple of the group size, 64"
    assert report.dense == {
        "model.layers.0.self_attn.o_proj": "left dense by modules_to_not_convert",
        "model.layers.1.self_attn.o_proj": "left dense by modules_to_not_convert",
        "model.layers.0.mlp.down_proj": columns,
        "model.layers.1.mlp.down_proj": columns,
        "model.layers.0.mlp.up_proj": "left dense by per_module",
    }
    assert report.packed["model.layers.1.mlp.up_proj"] == (8, 64)
    assert report.packed["model.layers.1.self_attn.q_proj"] == (4, 32)
    assert f"dense: model.layers.0.mlp.down_proj: {columns}" in str(report)
    assert "1 with 8 bits in groups of 64" in str(report) and "of bfloat16" in str(report)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    same_state(again, model)
    assert again.hf_quantizer.report.packed == report.packed
    assert again.hf_quantizer.report.dense.keys() == report.dense.keys()


def test_scales_dtype(folder, tmp_path):
    """Scales may have their own dtype; the embedding's output then has the model's."""
    config = TorchFusedConfig(group_size=32, scales_dtype=torch.float16)
    model = load(folder, quantization_config=config, dtype=torch.bfloat16)
    other = load(folder, dtype=torch.bfloat16)
    quantize_(other, group_size=32, scales_dtype="float16")
    same_state(model, other)
    model.save_pretrained(tmp_path / "saved")
    for each in (model, other, load(tmp_path / "saved")):
        assert {m.scales.dtype for m in packed_modules(each).values()} == {torch.float16}
        assert each.model.embed_tokens(prompt(1, 3)).dtype == torch.bfloat16
        assert torch.equal(each(prompt(1, 3)).logits, model(prompt(1, 3)).logits)


def test_dequantize(folder):
    """transformers' dequantize gives the stock model with the packed values, with its head tied again."""
    model = load(folder, quantization_config=TorchFusedConfig(group_size=32))
    logits = model(prompt(1, 5)).logits
    plain = model.dequantize()
    assert not packed_modules(plain) and plain.lm_head.weight is plain.model.embed_tokens.weight
    close(plain(prompt(1, 5)).logits, logits)
    assert plain.state_dict().keys() == load(folder).state_dict().keys()
    plain.save_pretrained(folder)
    close(load(folder)(prompt(1, 5)).logits, logits)


def test_other_models(tmp_path):
    """Linear layers of any model are packed; other classes, and ties that cannot be packed, stay dense."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16)).eval()
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2))
    for model, packed in ((gpt2, {"transformer.wte", "transformer.wpe"}), (t5.eval(), None)):
        report = quantize_(model)
        assert packed is None or report.packed.keys() == packed
        if packed is None:
            assert "it shares its matrix with" in report.dense["shared"]
            assert report.dense["encoder.block.0.layer.1.DenseReluDense.wo"] == "transformers keeps it in float32"
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        same_state(again, model)
        assert again.hf_quantizer.report.packed == report.packed
    plain = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 64))
    assert quantize_(plain).packed == {"0": (4, 64)} and type(plain[0]) is QuantizedLinear


def test_new_head(folder):
    """A head that is not in the checkpoint stays dense, to be trained."""
    config = TorchFusedConfig(group_size=32)
    model = AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=config, num_labels=3)
    assert model.hf_quantizer.report.dense == {"score": "its weight is not in the checkpoint"}
    assert len(model.hf_quantizer.report.packed) == 15 and type(model.score) is torch.nn.Linear


def test_peak_memory(tmp_path):
    """Loading takes little more than the packed size plus the largest matrix, far less than the whole model."""
    make_model(
        hidden_size=512, intermediate_size=2048, num_attention_heads=8, head_dim=64, vocab_size=16000, layers=8
    ).save_pretrained(tmp_path)
    program = """
        import sys, threading, torch
        import torch_fused.ops.quantized
        from transformers import AutoModelForCausalLM
        from torch_fused.hf import TorchFusedConfig

        torch.set_num_threads(1)
        torch_fused.ops.quantized._BLOCK = 1 << 18  # what is needed for a block of rows, whatever the model's size

        def held():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

        def load(**options):
            before, peak, done = held(), 0, threading.Event()

            def watch():
                nonlocal peak
                while not done.wait(0.001):
                    peak = max(peak, held())

            watcher = threading.Thread(target=watch)
            watcher.start()
            model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
            done.set()
            watcher.join()
            return model, peak - before

        load(quantization_config=TorchFusedConfig())  # what is imported and kept at the first time
        model, peak = load(quantization_config=TorchFusedConfig())
        report = model.hf_quantizer.report
        print(peak, report.nbytes / 2**20, report.weights * 4 / 2**20)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", HF_HUB_OFFLINE="1")  # freed memory is given back
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, packed, dense = map(float, done.stdout.split())
    largest = 16000 * 512 * 4 / 2**20
    assert peak < packed + largest + 30 < dense / 2, (peak, packed, dense)


def test_progress(folder, capfd):
    """transformers' own bar."""
    load(folder, quantization_config=TorchFusedConfig(group_size=32))
    assert "Loading weights" in capfd.readouterr().err


# ---- others' packed weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_checkpoint(family, tied, twice, tmp_path):
    """A folder like mlx-lm's: tensors are unchanged, the model generates, and a saved one loads like any other."""
    stock = make_model(family, tie_word_embeddings=tied, dtype=torch.bfloat16)
    other = {"group_size": 32, "bits": 8}
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.self_attn.v_proj": other}
    dense = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    tensors = write_mlx(tmp_path, stock, quantization, dense, twice)
    small_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_mlx(tmp_path)
    assert model.dtype == torch.bfloat16 and tokenizer.is_fast
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].view(torch.int16), tensor.view(torch.int16))
    report = model.hf_quantizer.report
    assert report.packed["model.layers.0.self_attn.v_proj"] == (8, 32)
    assert report.dense == dict.fromkeys(dense, "it is dense in the checkpoint")
    assert model.generate(prompt(1, 5), **GREEDY).shape == (1, 21)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    same_state(again, model)
    assert torch.equal(again(prompt(1, 5)).logits, model(prompt(1, 5)).logits)


def test_mlx_in_another_dtype(tmp_path):
    """The scales keep the file's dtype; the model has the requested one."""
    quantization = {"group_size": 32, "bits": 4}
    write_mlx(tmp_path, make_model(tie_word_embeddings=True, dtype=torch.bfloat16), quantization)
    small_tokenizer().save_pretrained(tmp_path)
    model, _ = load_mlx(tmp_path, dtype=torch.float32)
    assert model.dtype == torch.float32 and model.model.embed_tokens.scales.dtype == torch.bfloat16
    assert model(prompt(1, 3)).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "TorchFusedConfig: bits must be 4 or 8, got 3"),
        ({"group_size": 16}, "TorchFusedConfig: group_size must be 32, 64 or 128, got 16"),
        ({"lm_head": {"bits": 6}}, "TorchFusedConfig: lm_head: bits must be 4 or 8, got 6"),
        ({"mode": "mxfp4"}, "load_mlx: quantization: the mode must be affine, got 'mxfp4'"),
        ({"lm_head": {"mode": "nvfp4"}}, "load_mlx: lm_head: the mode must be affine, got 'nvfp4'"),
        (
            {"lm_head": {"bits": 8}},
            r"lm_head.weight must be uint32 .*\[128, 16\], because lm_head has 8 bits.*\[128, 8\]",
        ),
    ],
)
def test_mlx_refused(changes, message, tmp_path):
    """Unsupported formats raise an error that names them."""
    quantization = {"group_size": 32, "bits": 4}
    write_mlx(tmp_path, make_model(), quantization)
    small_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization"] = config["quantization_config"] = quantization | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=message):
        load_mlx(tmp_path)


def test_no_mlx_checkpoint(folder):
    with pytest.raises(RuntimeError, match="the config has no MLX quantization"):
        load_mlx(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_metal_linear(bits):
    """Transformers' packed linear layers for Apple GPUs are converted unchanged."""
    model = make_model("qwen2")
    weights = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            rows, columns = linear.weight.shape
            metal = MetalLinear(columns, rows, bias=linear.bias is not None, bits=bits, group_size=32)
            tensors = _affine_quantize_tensor(linear.weight.detach(), 32, bits)
            for part, value in zip(("weight", "scales", "qbiases"), tensors, strict=True):
                setattr(metal, part, torch.nn.Parameter(value, requires_grad=False))
            metal.bias = linear.bias
            model.set_submodule(name, metal)
            weights[name] = tensors
    report = quantize_(model, bits=4, group_size=64)
    assert report.packed["lm_head"] == (4, 64)
    for name, tensors in weights.items():
        packed = model.get_submodule(name)
        assert type(packed) is QuantizedLinear and report.packed[name] == (bits, 32)
        for mine, metal in zip((packed.weight, packed.scales, packed.biases), tensors, strict=True):
            assert torch.equal(mine.view(torch.int32), metal.view(torch.int32))
    assert torch.isfinite(model(prompt(1, 3)).logits).all()


# ---- bad arguments and bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "TorchFusedConfig: bits must be 4 or 8, got 2"),
        ({"group_size": 100}, "TorchFusedConfig: group_size must be 32, 64 or 128, got 100"),
        ({"per_module": {"a.b": {"bits": 5}}}, "TorchFusedConfig: a.b: bits must be 4 or 8, got 5"),
        ({"scales_dtype": "int8"}, "TorchFusedConfig: scales_dtype must be one of float32, .*, got int8"),
    ],
)
def test_bad_options(options, message):
    for function in (TorchFusedConfig, lambda **options: quantize_(make_model(), **options)):
        with pytest.raises(RuntimeError, match=message):
            function(**options)


def test_bad_models():
    with pytest.raises(TypeError, match="quantize_: model must be"):
        quantize_("gpt2")
    with pytest.raises(TypeError, match=r"prepare_lora: config must be a peft\.LoraConfig, got dict"):
        prepare_lora({})
    model = make_model()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(RuntimeError, match="quantize_: model is already quantised with bitsandbytes"):
        quantize_(model)


def changed(change):
    def rewrite(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return rewrite


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


Q_PROJ = "model.layers.0.self_attn.q_proj"

BAD_FILES = {
    "cut off": (cut, r"the file is truncated: model.layers.1.self_attn.v_proj.weight ends at byte"),
    "no header": (lambda path: path.write_bytes(b"\x10" + bytes(40)), "the file has no safetensors header"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:60]), "the file is truncated in its header"),
    "rows": (
        changed(lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"][:5].clone()})),
        r"q_proj.weight must be uint32 of shape \[64, 8\], because .* has 4 bits and groups of 32; .* \[5, 8\]",
    ),
    "groups": (
        changed(lambda t: t.update({f"{Q_PROJ}.scales": t[f"{Q_PROJ}.scales"][:, :1].clone()})),
        r"q_proj.scales must be float32 or float16 or bfloat16 of shape \[64, 2\].* float32 of shape \[64, 1\]",
    ),
    "dtype": (
        changed(lambda t: t.update({f"{Q_PROJ}.weight": t[f"{Q_PROJ}.weight"].view(torch.int32)})),
        r"q_proj.weight must be uint32",
    ),
    "no biases": (changed(lambda t: t.pop(f"{Q_PROJ}.biases")), "no tensor .*q_proj.biases, but .*q_proj is packed"),
    "no scales": (changed(lambda t: t.pop(f"{Q_PROJ}.scales")), "q_proj.weight is packed, but .* no tensor .*scales"),
    "a packed norm": (
        changed(lambda t: t.update({"model.norm.scales": torch.ones(2, 2)})),
        r"model\.norm\.scales: model\.norm is a Qwen2RMSNorm, which cannot be packed",
    ),
    "another model": (
        changed(lambda t: [t.update({f"other.{name}": t.pop(name)}) for name in list(t)]),
        "the checkpoint has no packed tensors for a Qwen2ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path):
    """An error before anything is loaded; the message names the tensor."""
    model = make_model()
    quantize_(model, group_size=32)
    model.save_pretrained(tmp_path)
    spoil, message = BAD_FILES[name]
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=message):
        load(tmp_path, dtype=torch.float32)


def test_bad_dense_files(folder):
    """The same for files that are packed while loading."""
    path = folder / "model.safetensors"
    config = TorchFusedConfig(group_size=32)
    whole = path.read_bytes()
    changed(lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(3, 64)}))(path)
    with pytest.raises(RuntimeError, match=r"q_proj.weight must have the shape \[64, 64\], got \[3, 64\]"):
        load(folder, quantization_config=config)
    path.write_bytes(whole[:-1])
    with pytest.raises(RuntimeError, match=r"the file is truncated: .* ends at byte"):
        load(folder, quantization_config=config, dtype=torch.float32)
    path.write_bytes(whole)
    write_mlx(folder, make_model(), {"group_size": 32, "bits": 4}, twice=False)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight is already packed; use torch_fused\.hf\.load_mlx"):
        load(folder, quantization_config=config)


def test_saved_names_are_mlxs(tmp_path):
    model = make_model("llama", tie_word_embeddings=True)
    quantize_(model, group_size=32)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {f"{Q_PROJ}.weight", f"{Q_PROJ}.scales", f"{Q_PROJ}.biases"} < names
    assert not {name for name in names if name.startswith("lm_head")}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"bits": 4, "group_size": 32, "quant_method": "torch_fused"}


# ---- patched and trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["packed, then patched", "patched, then packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched(family, dtype, late):
    """A patched model generates the packed model's own tokens, and reports its path."""
    model = make_model(family, tie_word_embeddings=True).to(dtype)
    packed = copy.deepcopy(model)
    quantize_(packed, group_size=32)
    stock = packed.generate(prompt(2, 5), **GREEDY)
    patched = model if late else packed
    # int8 products would give other tokens.
    with apply_torch_fused(patched, decode=dtype == torch.float32, int8_products=False) as handle:
        if late:
            patched.generate(prompt(2, 5), **GREEDY)
            quantize_(patched, group_size=32)
        assert torch.equal(patched.generate(prompt(2, 5), **GREEDY), stock)
        own = generate(patched, prompt(2, 5), decode=dtype == torch.float32, **GREEDY)
        assert torch.equal(own, stock)
        if dtype == torch.float32:
            assert "  decode: steps of up to 8 tokens run as one op" in handle.report()


def train(model, steps=10):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = prompt(2, 12)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, patched, tmp_path):
    """PEFT's adapters learn on every packed linear layer and the tied head; the packed tensors do not change."""
    model = make_model(family, tie_word_embeddings=True)
    quantize_(model, group_size=32)
    before = copy.deepcopy(model)
    if patched:
        apply_torch_fused(model)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = prepare_lora(peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0))
    trained = peft.get_peft_model(model, config)
    adapters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * 2 * len(names)
    losses = train(trained)
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    logits = trained.eval()(prompt(1, 5)).logits
    with pytest.raises(RuntimeError, match="merge: an adapter cannot be merged"):
        trained.merge_and_unload()
    trained.save_pretrained(tmp_path)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 200_000  # the adapters alone
    config = prepare_lora(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path, config=config).eval()
    close(again(prompt(1, 5)).logits, logits)
    with pytest.raises(RuntimeError, match="quantize_: model has adapters"):
        quantize_(trained)
    same_state(trained.unload(), before)


def test_nothing_keeps_the_dense_weights():
    """Packing in place frees each matrix."""
    model = make_model(tie_word_embeddings=True)
    matrices = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    quantize_(model, group_size=32)
    gc.collect()
    assert not [matrix for matrix in matrices if matrix() is not None]
