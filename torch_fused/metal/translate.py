"""Metal to CUDA, for the build."""

from __future__ import annotations

from .cuda_dialect import emit_cuda
from .parser import parse


def translate_to_cuda(text: str, name: str = "shader.metal") -> str:
    """CUDA C++ for flattened Metal source; see emit_cuda for its entries. Raises MetalError."""
    return emit_cuda(parse(text, name, own=True))
