"""Fused generation for Hugging Face transformers models."""

from .cache import FusedKVCache
from .generate import generate
from .patch import apply_torch_fused
from .quantization import TorchFusedConfig, quantize_

__all__ = ["FusedKVCache", "TorchFusedConfig", "apply_torch_fused", "generate", "quantize_"]
