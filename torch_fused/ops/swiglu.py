"""The activations of SwiGLU and GeGLU feed-forward networks."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating, check_shape
from .library import leading, register


def silu_mul_reference(gate: Tensor, up: Tensor, *, casting_mode: str = "torch") -> Tensor:
    """`silu_mul` in plain torch: float32 throughout ("torch"), or silu rounded first ("llama")."""
    return _gated(lambda g: g * torch.sigmoid(g), gate, up, casting_mode)  # F.silu's gradient has no forward mode


def gelu_mul_reference(gate: Tensor, up: Tensor, *, approximate: str = "none", casting_mode: str = "torch") -> Tensor:
    """`gelu_mul` in plain torch: float32 throughout ("torch"), or gelu rounded first ("llama")."""
    gelu = _gelu_by_tanh if approximate == "tanh" else _gelu
    return _gated(lambda g: gelu(g)[0], gate, up, casting_mode)


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, casting_mode: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    wide = gate.to(_arithmetic_dtype(gate))
    activated = activation(wide)
    if casting_mode == "llama":
        return activated.to(gate.dtype) * up
    return (activated * up.to(wide.dtype)).to(gate.dtype)


def _gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    """Gelu and its slope."""
    below = 0.5 * torch.erfc(g * -math.sqrt(0.5))
    return g * below, below + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)


def _gelu_by_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    """Gelu by tanh and its slope, as g * sigmoid(y): 1 + tanh(y / 2) is 2 * sigmoid(y)."""
    scale = math.sqrt(8 / math.pi)
    limited = g.clamp(-30, 30)  # past that the sigmoid is 0 or 1
    square = limited * limited
    sigmoid = torch.sigmoid(scale * limited * (1 + 0.044715 * square))
    slope = sigmoid * (1 + limited * scale * (1 + 0.134145 * square) * (1 - sigmoid))
    return g * sigmoid, slope


def silu_mul_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dtype = _arithmetic_dtype(gate)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dy, g = grad.to(dtype), gate.to(dtype)
    sigmoid = torch.sigmoid(g)
    grad_gate = dy * up.to(dtype) * sigmoid * (1 + g * (1 - sigmoid))
    return grad_gate.to(gate.dtype), (dy * g * sigmoid).to(up.dtype)


def gelu_mul_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor, *, approximate: str = "none"
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dtype = _arithmetic_dtype(gate)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dy = grad.to(dtype)
    value, slope = (_gelu_by_tanh if approximate == "tanh" else _gelu)(gate.to(dtype))
    return (dy * up.to(dtype) * slope).to(gate.dtype), (dy * value).to(up.dtype)


def _arithmetic_dtype(gate: Tensor) -> torch.dtype:
    return torch.float64 if gate.dtype == torch.float64 else torch.float32


def _like_gate(gate, up, **options):
    return gate.new_empty(gate.shape)


def _like_both(grad, gate, up, **options):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


for _name, _reference, _backward_reference in (
    ("silu_mul", silu_mul_reference, silu_mul_backward_reference),
    ("gelu_mul", gelu_mul_reference, gelu_mul_backward_reference),
):
    register(_name, reference=_reference, fake=_like_gate)
    register(f"{_name}_backward", reference=_backward_reference, fake=_like_both, batched=_backward_reference)


@torch.library.register_vmap("torch_fused::silu_mul")
def _silu_mul_vmap(info, in_dims, gate, up, **options):
    """The batch becomes a leading dimension."""
    return _silu_mul(leading(info, gate, in_dims[0]), leading(info, up, in_dims[1]), **options), 0


@torch.library.register_vmap("torch_fused::gelu_mul")
def _gelu_mul_vmap(info, in_dims, gate, up, **options):
    """The batch becomes a leading dimension."""
    return _gelu_mul(leading(info, gate, in_dims[0]), leading(info, up, in_dims[1]), **options), 0


def silu_mul(gate: Tensor, up: Tensor, *, casting_mode: str = "torch") -> Tensor:
    r"""The activation of SwiGLU: :math:`\mathrm{silu}(gate) \cdot up` with :math:`\mathrm{silu}(g) = g / (1 + e^{-g})`.

    Replaces ``F.silu(gate) * up``; differentiable in both arguments.

    Args:
        gate: any shape; float32, float16 or bfloat16, or float64 on the CPU. Rows with a unit last stride, such as the
            halves of one projection, are read in place; any other layout is copied once.
        up: same shape and device as ``gate``. If dtypes differ, the result is promoted as in torch.
        casting_mode: ``"torch"`` computes in float32 and rounds once. ``"llama"`` also rounds silu, like Hugging Face's
            ``LlamaMLP`` (models/llama/modeling_llama.py).

    Returns:
        A dense tensor with ``gate``'s shape and the promoted dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.silu_mul(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    if gate.dtype != up.dtype:
        _check("silu_mul", gate, up)
        if casting_mode == "llama":
            return F.silu(gate) * up
        gate, up = _promoted(gate, up)
    return _silu_mul(gate, up, casting_mode=casting_mode)


def gelu_mul(gate: Tensor, up: Tensor, *, approximate: str = "none", casting_mode: str = "torch") -> Tensor:
    r"""The activation of GeGLU: :math:`\mathrm{gelu}(gate) \cdot up` with :math:`\mathrm{gelu}(g) = g \cdot \Phi(g)`.

    Replaces ``F.gelu(gate, approximate=approximate) * up``; differentiable in both arguments.

    Args:
        gate: any shape; float32, float16 or bfloat16, or float64 on the CPU. Rows with a unit last stride, such as the
            halves of one projection, are read in place; any other layout is copied once.
        up: same shape and device as ``gate``. If dtypes differ, the result is promoted as in torch.
        approximate: ``"none"`` uses the exact normal distribution, and stays accurate far below zero, where
            ``1 + erf(g / sqrt(2))`` loses all digits. ``"tanh"`` uses the tanh approximation, as Gemma does.
        casting_mode: ``"torch"`` computes in float32 and rounds once. ``"llama"`` also rounds gelu, like Hugging Face's
            ``Gemma2MLP`` (models/gemma2/modeling_gemma2.py).

    Returns:
        A dense tensor with ``gate``'s shape and the promoted dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Sources: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202; Hendrycks and Gimpel, Gaussian
    Error Linear Units, https://arxiv.org/abs/1606.08415.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.gelu_mul(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor([0.0000, 1.6827])
    """
    if gate.dtype != up.dtype:
        _check("gelu_mul", gate, up)
        if casting_mode == "llama":
            return F.gelu(gate, approximate=approximate) * up
        gate, up = _promoted(gate, up)
    return _gelu_mul(gate, up, approximate=approximate, casting_mode=casting_mode)


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    check_floating(op, gate=gate, up=up)
    check_shape(op, "up", up, gate.shape)


def _promoted(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return gate.to(dtype), up.to(dtype)


_silu_mul = torch.ops.torch_fused.silu_mul.default
_gelu_mul = torch.ops.torch_fused.gelu_mul.default
