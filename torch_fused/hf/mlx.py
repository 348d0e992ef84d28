"""Loads MLX checkpoints, which have our layout, by adding what transformers needs to their config."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .quantization import TorchFusedConfig


def load_mlx(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Loads a quantised MLX checkpoint from a folder or the Hugging Face hub: ``(model, tokenizer)``.

    The packed matrices are loaded unchanged. ``from_pretrained`` alone cannot load them, because MLX's config.json has
    no ``quant_method``. After ``save_pretrained``, the model loads with ``from_pretrained``.

    Args:
        path: a folder, or the id of a repository.
        dtype: dtype of the model; None uses the checkpoint's config. The scales keep their dtype.
        options: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, ready to generate, and its tokenizer.

    Raises:
        RuntimeError: the checkpoint is not quantised; its bits, group size or mode are not supported; or a tensor is
            truncated or does not fit. The message names the module or tensor.

    Example:
        >>> model, tokenizer = load_mlx("mlx-community/Qwen2.5-0.5B-Instruct-4bit")
    """
    config = AutoConfig.from_pretrained(path)
    given = getattr(config, "quantization", None) or getattr(config, "quantization_config", None)
    if not isinstance(given, dict) or "quant_method" in given:
        raise RuntimeError(f"load_mlx: {path}: the config has no MLX quantization")
    config.quantization_config = config_of_mlx(given).to_dict()
    config.__dict__.pop("quantization", None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = dtype or config.dtype or "auto"
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options), tokenizer


def config_of_mlx(quantization: dict[str, Any]) -> TorchFusedConfig:
    """The config for an MLX quantization: its format, and modules with another format or none."""
    per_module = {name: form for name, form in quantization.items() if isinstance(form, dict) or form is False}
    for name, form in {"": quantization, **per_module}.items():
        mode = form.get("mode", "affine") if form else "affine"
        if mode != "affine":
            raise RuntimeError(f"load_mlx: {name or 'quantization'}: the mode must be affine, got {mode!r}")
    formats = {
        name: form and {key: form[key] for key in ("bits", "group_size") if key in form}
        for name, form in per_module.items()
    }
    return TorchFusedConfig(quantization.get("bits", 4), quantization.get("group_size", 64), per_module=formats)
