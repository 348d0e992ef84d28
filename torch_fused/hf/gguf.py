"""Loads models from llama.cpp's GGUF files, with their weights packed."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.logging import tqdm

from .quantization import TorchFusedConfig

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Names in the config -> names in the file."""


def load_gguf(path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Loads a GGUF file with its weights packed: ``(model, tokenizer)``.

    Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are converted exactly: in float32, each weight has the same bits as from the
    ``gguf`` package. For Q4_K and Q5_K the scales are rounded to float16; Q6_K is quantised again, to 8 bits. Their
    errors are in ``model.hf_quantizer.report.errors``, and a warning gives the largest. 5- and 6-bit codes are stored
    in 8 bits. F32, F16 and BF16 matrices stay dense.

    Requires the package gguf, which the extra ``demo`` installs.

    Args:
        path: a file with the architecture llama, qwen2 or qwen3.
        dtype: dtype of the model's other tensors and its results; None is float32.

    Returns:
        The model, ready to generate, and its tokenizer.

    Raises:
        ImportError: the package gguf is not installed.
        RuntimeError: the file is truncated or has another architecture; or a tensor is missing, is not in the model, or
            has a type or shape that is not supported. The message names the tensor.

    Warns:
        UserWarning: some tensors were not converted exactly.

    Example:
        >>> model, tokenizer = load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    """
    path = Path(path)
    reader = _read(path)
    config = _config(path, reader)
    dtype = dtype or torch.float32
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    places = _places(path, empty, {tensor.name: tensor for tensor in reader.tensors})
    for scales_dtype in (torch.float16, torch.float32):
        state, formats, errors = _convert(empty, places, scales_dtype, dtype)
        if all(bool(t.isfinite().all()) for name, t in state.items() if name.endswith((".scales", ".biases"))):
            break  # otherwise they are too large for float16
    others = {name: form for name, form in formats.items() if form != {"bits": 4}}
    quantization = TorchFusedConfig(4, 32, per_module=others, scales_dtype=scales_dtype)
    config.quantization_config = quantization.to_dict()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    model.hf_quantizer.report.errors = errors
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        warnings.warn(
            f"load_gguf: {len(errors)} matrices were not converted exactly; the largest relative error is "
            f"{errors[worst]:.2g}, of {worst}",
            stacklevel=2,
        )
    return model, tokenizer


def _read(path: Path) -> Any:
    import numpy

    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("load_gguf: the package gguf is not installed: pip install gguf") from error

    class Reader(GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> Any:
            # Many small slices, which are slow with a memmap.
            self.data: Any = self.data.view(numpy.ndarray)
            return super()._get(*args, **kwargs)

    if not path.is_file():
        raise RuntimeError(f"load_gguf: {path}: no such file")
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise RuntimeError(f"load_gguf: {path}: not a complete GGUF file: {error}") from error


def _config(path: Path, reader: Any) -> Any:
    def get(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = get("general.architecture")
    if kind not in ARCHITECTURES:
        raise RuntimeError(
            f"load_gguf: {path}: the architecture must be one of {', '.join(ARCHITECTURES)}, got {kind!r}"
        )
    sizes = {name: get(f"{kind}.{key}") for name, key in SIZES.items()}
    absent = [f"{kind}.{SIZES[name]}" for name, size in sizes.items() if size is None]
    if absent or "token_embd.weight" not in tensors:
        raise RuntimeError(f"load_gguf: {path}: the file has no {absent[0] if absent else 'tensor token_embd.weight'}")
    heads = sizes["num_attention_heads"]
    head_dim = get(f"{kind}.attention.key_length", sizes["hidden_size"] // heads)
    scaling = get(f"{kind}.rope.scaling.type", "none")
    if scaling != "none" or get(f"{kind}.rope.dimension_count", head_dim) != head_dim:
        raise RuntimeError(f"load_gguf: {path}: scaled ({scaling}) or partial rotary embeddings are not supported")
    config = AutoConfig.for_model(
        kind,
        **sizes,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        num_key_value_heads=get(f"{kind}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": get(f"{kind}.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        **{f"{name}_token_id": get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")},
        pad_token_id=get("tokenizer.ggml.padding_token_id"),
    )
    if "rope_freqs.weight" in tensors:
        config.rope_parameters = _llama3_rope(path, config, torch.from_numpy(tensors["rope_freqs.weight"].data.copy()))
    return config


def _llama3_rope(path: Path, config: Any, divisors: Tensor) -> dict[str, Any]:
    """Transformers' parameters for the divisors of rotary frequencies in Llama 3's files."""
    plain = config.rope_parameters
    rope = {
        **plain,
        "rope_type": "llama3",
        "factor": round(float(divisors.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config.rope_parameters = rope
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    steps = torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies))
    if len(divisors) != len(frequencies) or not torch.allclose(
        plain["rope_theta"] ** -steps / divisors, frequencies, rtol=1e-4
    ):
        raise RuntimeError(f"load_gguf: {path}: the divisors in rope_freqs.weight are not those of Llama 3")
    return rope


def _places(path: Path, model: PreTrainedModel, tensors: dict[str, Any]) -> dict[str, Any]:
    """The file's tensor for each tensor of the model, checked."""
    import gguf

    from .gguf_blocks import BLOCK_BYTES

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[model.config.model_type], model.config.num_hidden_layers)
    left, found = dict(tensors), {}
    left.pop("rope_freqs.weight", None)
    for key, place in model.state_dict().items():
        if key in model.all_tied_weights_keys:
            continue
        module, _, part = key.rpartition(".")
        name = f"{names.get_name(module)}.{part}"
        tensor = left.pop(name, None)
        if tensor is None:
            raise RuntimeError(f"load_gguf: {path}: the file has no tensor {name}, for {key}")
        shape = [int(n) for n in reversed(tensor.shape)]
        if shape != list(place.shape):
            raise RuntimeError(f"load_gguf: {path}: {name} must have the shape {list(place.shape)}, got {shape}")
        kind = tensor.tensor_type
        if kind.name not in ("F32", "F16", "BF16") and not (kind in BLOCK_BYTES and place.dim() == 2):
            types = ", ".join(("F32", "F16", "BF16", *(k.name for k in BLOCK_BYTES)))
            raise RuntimeError(f"load_gguf: {path}: {name} must have one of the types {types}, got {kind.name}")
        found[key] = tensor
    if left:
        raise RuntimeError(f"load_gguf: {path}: {min(left)} is not a tensor of {type(model).__name__}")
    return found


def _convert(
    model: PreTrainedModel, places: dict[str, Any], scales_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, float]]:
    """The state dict; and the formats and errors of packed modules, with False for modules that stay dense."""
    from gguf import dequantize

    from .gguf_blocks import BLOCK_BYTES, pack

    state: dict[str, Tensor] = {}
    formats: dict[str, Any] = {}
    errors = {}
    for key, tensor in tqdm(places.items(), desc="Reading weights"):
        module, _, part = key.rpartition(".")
        rows = _rows(model.config, key)
        if tensor.tensor_type in BLOCK_BYTES:
            packed = pack(torch.from_numpy(tensor.data.copy())[rows], tensor.tensor_type, scales_dtype)
            state[key], state[f"{module}.scales"], state[f"{module}.biases"] = packed[1:4]
            formats[module] = {"bits": packed.bits}
            if packed.error:
                errors[module] = packed.error
        else:
            state[key] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())[rows].to(dtype)
            if part == "weight" and isinstance(model.get_submodule(module), (nn.Linear, nn.Embedding)):
                formats[module] = False
    for head, owner in _ties(model):
        formats[head] = formats[owner]
    return state, formats, errors


def _ties(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    for head, owner in model.all_tied_weights_keys.items():
        yield head.removesuffix(".weight"), owner.removesuffix(".weight")


def _rows(config: Any, key: str) -> Any:
    """The row order: for Llama's q and k, llama.cpp stores rotation pairs together, transformers in halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None or config.model_type != "llama":
        return slice(None)
    return torch.arange(heads * config.head_dim).view(heads, config.head_dim // 2, 2).transpose(1, 2).flatten()
