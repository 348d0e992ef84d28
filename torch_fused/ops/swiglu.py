"""The activation of SwiGLU feed-forward networks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating, check_shape
from .library import leading, register


def silu_mul_reference(gate: Tensor, up: Tensor, *, casting_mode: str = "torch") -> Tensor:
    """`silu_mul` in plain torch: float32 throughout ("torch"), or silu rounded first ("llama")."""
    gate, up = gate.contiguous(), up.contiguous()
    wide = gate.to(_arithmetic_dtype(gate))
    silu = wide * torch.sigmoid(wide)  # torch has no forward mode for the gradient of F.silu
    if casting_mode == "llama":
        return silu.to(gate.dtype) * up
    return (silu * up.to(wide.dtype)).to(gate.dtype)


def silu_mul_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dtype = _arithmetic_dtype(gate)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dy, g = grad.to(dtype), gate.to(dtype)
    sigmoid = torch.sigmoid(g)
    grad_gate = dy * up.to(dtype) * sigmoid * (1 + g * (1 - sigmoid))
    return grad_gate.to(gate.dtype), (dy * g * sigmoid).to(up.dtype)


def _arithmetic_dtype(gate: Tensor) -> torch.dtype:
    return torch.float64 if gate.dtype == torch.float64 else torch.float32


def _silu_mul_fake(gate, up, *, casting_mode="torch"):
    return gate.new_empty(gate.shape)


def _silu_mul_backward_fake(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


register("silu_mul", reference=silu_mul_reference, fake=_silu_mul_fake)
register(
    "silu_mul_backward",
    reference=silu_mul_backward_reference,
    fake=_silu_mul_backward_fake,
    batched=silu_mul_backward_reference,
)


@torch.library.register_vmap("torch_fused::silu_mul")
def _silu_mul_vmap(info, in_dims, gate, up, *, casting_mode="torch"):
    """A batch is one more leading dimension."""
    gate, up = leading(info, gate, in_dims[0]), leading(info, up, in_dims[1])
    return _silu_mul(gate, up, casting_mode=casting_mode), 0


def silu_mul(gate: Tensor, up: Tensor, *, casting_mode: str = "torch") -> Tensor:
    r"""The activation of SwiGLU: :math:`\mathrm{silu}(gate) \cdot up` with :math:`\mathrm{silu}(g) = g / (1 + e^{-g})`.

    Replaces ``F.silu(gate) * up``; differentiable in both.

    Args:
        gate: any shape; float32, float16 or bfloat16, on the CPU float64 too. Rows with a unit last stride, such as the
            halves of one projection, are read in place; any other layout is copied once.
        up: as ``gate``: shape and device. Another dtype promotes the result as in torch.
        casting_mode: ``"torch"`` computes in float32 and rounds once. ``"llama"`` rounds silu first, as Hugging Face's
            ``LlamaMLP`` does (models/llama/modeling_llama.py).

    Returns:
        A dense tensor of ``gate``'s shape, of the promoted dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.silu_mul(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0]))
        tensor([0.0000, 1.4621])
    """
    if gate.dtype != up.dtype:
        check_floating("silu_mul", gate=gate, up=up)
        check_shape("silu_mul", "up", up, gate.shape)
        if casting_mode == "llama":
            return F.silu(gate) * up
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    return _silu_mul(gate, up, casting_mode=casting_mode)


_silu_mul = torch.ops.torch_fused.silu_mul.default
