"""Checks of arguments that are converted to one dtype before the op can check them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raises if a named tensor has a dtype that the ops do not support."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            continue
        on_cpu = tensor.device.type == "cpu"
        if not (on_cpu and tensor.dtype == torch.float64):
            also = " (or float64 on the CPU)" if on_cpu else ""
            raise RuntimeError(f"{op}: {name} must be float32, float16 or bfloat16{also}, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises if the tensor does not have exactly this shape."""
    if tensor.shape != tuple(shape):
        raise RuntimeError(f"{op}: {name} must have the shape {list(shape)}, got {list(tensor.shape)}")


def check_casting_mode(op: str, casting_mode: str) -> None:
    """Raises if the casting mode is unknown."""
    if casting_mode not in ("torch", "llama"):
        raise RuntimeError(f"{op}: casting_mode must be 'torch' or 'llama', got '{casting_mode}'")
