"""Fused generation for Hugging Face transformers models."""

from .cache import FusedKVCache
from .generate import generate
from .patch import apply_torch_fused

__all__ = ["FusedKVCache", "apply_torch_fused", "generate"]
