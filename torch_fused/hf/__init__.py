"""Fused generation for Hugging Face transformers models."""

from .adapters import prepare_lora
from .cache import FusedKVCache
from .generate import generate
from .gguf import load_gguf
from .mlx import load_mlx
from .patch import apply_torch_fused
from .quantization import TorchFusedConfig, quantize_

__all__ = [
    "FusedKVCache",
    "TorchFusedConfig",
    "apply_torch_fused",
    "generate",
    "load_gguf",
    "load_mlx",
    "prepare_lora",
    "quantize_",
]
