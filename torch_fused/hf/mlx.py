"""Checkpoints of MLX, whose layout is ours, with what transformers asks for in their config."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .quantization import TorchFusedConfig


def load_mlx(
    path: str | os.PathLike[str], *, dtype: torch.dtype | str | None = None, **options: Any
) -> tuple[Any, Any]:
    """Loads a quantised checkpoint of MLX, as it is, from a folder or a hub: ``(model, tokenizer)``.

    The packed matrices stay as they are in the file. ``from_pretrained`` alone cannot: in their config.json the
    quantisation has no ``quant_method``, so transformers does not know whom to ask. Once saved with
    ``save_pretrained``, the model loads with ``from_pretrained``.

    Args:
        path: a folder, or the id of a repository.
        dtype: of the model; None is what the checkpoint's config says. The scales keep their own.
        options: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, ready to generate, and its tokenizer.

    Raises:
        RuntimeError: the checkpoint is not quantised, or it has bits, a group size or a mode other than affine that
            are not supported, or its tensors are not whole or do not fit; the message names the module or tensor.

    Example:
        >>> model, tokenizer = load_mlx("mlx-community/Qwen2.5-0.5B-Instruct-4bit")
    """
    config = AutoConfig.from_pretrained(path)
    given = getattr(config, "quantization", None) or getattr(config, "quantization_config", None)
    if not isinstance(given, dict) or "quant_method" in given:
        raise RuntimeError(f"load_mlx: {path}: its config has no quantization of MLX")
    config.quantization_config = config_of_mlx(given).to_dict()
    config.__dict__.pop("quantization", None)
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = dtype or config.dtype or "auto"
    return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, **options), tokenizer


def config_of_mlx(quantization: dict[str, Any]) -> TorchFusedConfig:
    """The config for what MLX has in its own: the format, and modules that have another or none."""
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
