"""Small checkpoints in other formats: llama.cpp files, MLX folders."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from torch_fused.functional import quantize

BYTES = [chr(i) if 33 <= i < 127 else chr(256 + i) for i in range(128)]  # GPT-2's alphabet of bytes

HALVES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q2_K: (80, 82)}
"""Where blocks that the gguf package cannot write have their float16."""


def encode(matrix: torch.Tensor, kind, seed: int = 0) -> np.ndarray:
    """The matrix in a GGUF type; random blocks for types that the gguf package can only read."""
    if kind not in HALVES:
        return gguf.quantize(matrix.float().numpy(), kind)
    rng = np.random.default_rng(seed)
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (*matrix.shape[:-1], matrix.shape[-1] // size, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(1e-4, 4e-4, (*blocks.shape[:-1], 1)).astype(np.float16)
        blocks[..., at : at + 2] = scale.view(np.uint8)
    return blocks.reshape(*matrix.shape[:-1], -1)


def write_gguf(path: Path, model, types=None, rope_freqs=None, **changes) -> dict[str, torch.Tensor]:
    """Writes the model with tensors in `types`, by gguf's name; others are F32. Returns their values in float32.

    `changes` replaces fields.
    """
    config, types = model.config, types or {}
    arch = config.model_type
    writer = gguf.GGUFWriter(path, changes.pop("architecture", arch))
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": model.model.layers[0].self_attn.head_dim,
        **changes,
    }
    for name, value in fields.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*BYTES[: config.vocab_size - 2], "Ġt", "he"])
    writer.add_token_merges(["Ġ t", "h e"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(0)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], config.num_hidden_layers)
    held = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, part = key.rpartition(".")
        name = f"{names.get_name(module)}.{part}"
        rows = torch.arange(len(value))
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):  # pairs, not halves
            rows = rows.view(-1, 2, model.model.layers[0].self_attn.head_dim // 2).transpose(1, 2).flatten()
        kind = types.get(name, Type.F32)
        data = encode(value[rows], kind, seed=len(held))
        writer.add_tensor(name, data, raw_dtype=kind)
        back = torch.from_numpy(gguf.dequantize(data, kind).copy())
        held[key] = torch.empty_like(back).index_copy_(0, rows, back)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def write_mlx(folder: Path, model, quantization: dict, dense=(), twice: bool = True) -> dict[str, torch.Tensor]:
    """Writes the model like mlx-lm, packed by MLX itself if it is installed. Returns the tensors.

    `quantization` is as in its config; `twice`: also as ``quantization_config``, like newer versions.
    """
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = quantization
    if twice:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for key, value in model.state_dict().items():
        name = key.rpartition(".")[0]
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if value.dim() != 2 or name in dense:
            tensors[key] = value
            continue
        form = {key: quantization.get(name, quantization)[key] for key in ("bits", "group_size")}
        tensors |= zip((key, f"{name}.scales", f"{name}.biases"), _pack(value, **form), strict=True)
    _save(folder / "model.safetensors", tensors)
    return tensors


def _pack(value, bits, group_size):
    try:
        import mlx.core as mx
    except ImportError:
        return quantize(value, bits=bits, group_size=group_size)
    matrix = mx.array(value.float().numpy()).astype(_mlx_dtype(value.dtype))
    packed, *affine = mx.quantize(matrix, group_size=group_size, bits=bits)
    words = torch.from_numpy(np.array(packed).view(np.int32)).view(torch.uint32)
    return words, *(torch.from_numpy(np.array(t.astype(mx.float32))).to(value.dtype) for t in affine)


def _save(path, tensors):
    try:
        import mlx.core as mx
    except ImportError:
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata={"format": "mlx"})
        return
    arrays = {
        key: mx.array(value.view(torch.int32).numpy().view(np.uint32))
        if value.dtype == torch.uint32
        else mx.array(value.float().numpy()).astype(_mlx_dtype(value.dtype))
        for key, value in tensors.items()
    }
    mx.save_safetensors(str(path), arrays, metadata={"format": "mlx"})


def _mlx_dtype(dtype):
    import mlx.core as mx

    return {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[dtype]
