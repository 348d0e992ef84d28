"""Softmax over one dimension."""

import torch
from torch import Tensor

from .library import register


def softmax_reference(input: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax over the last dimension in plain torch: float32 throughout, rounded once."""
    dtype = dtype or input.dtype
    wide = input.contiguous().to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return torch.softmax(wide, -1).to(dtype)


def softmax_backward_reference(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of the input from the output."""
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    dy, y = grad.contiguous().to(dtype), output.contiguous().to(dtype)
    dot = (dy * y).sum(-1 if y.dim() else (), keepdim=True)
    return (y * (dy - dot)).to(output.dtype)


def _softmax_fake(input, *, dtype=None):
    return input.new_empty(input.shape, dtype=dtype or input.dtype)


def _softmax_backward_fake(grad, output):
    return output.new_empty(output.shape)


register("softmax", reference=softmax_reference, fake=_softmax_fake)
register(
    "softmax_backward",
    reference=softmax_backward_reference,
    fake=_softmax_backward_fake,
    batched=softmax_backward_reference,
)


@torch.library.register_vmap("torch_fused::softmax")
def _softmax_vmap(info, in_dims, input, *, dtype=None):
    """The batch becomes a leading dimension."""
    input = input.movedim(in_dims[0], 0)
    if input.dim() == 1:  # a batch of scalars
        return _softmax(input.unsqueeze(-1), dtype=dtype).squeeze(-1), 0
    return _softmax(input, dtype=dtype), 0


def softmax(input: Tensor, dim: int = -1, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Softmax over one dimension: :math:`\exp(x_i - \max x) / \sum_j \exp(x_j - \max x)`.

    A drop-in replacement for :func:`torch.nn.functional.softmax`, differentiable in ``input``. Computes in float32
    (float64 for float64) and rounds once. A row with only -inf, or with a NaN or +inf, becomes NaN.

    Args:
        input: any shape; float32, float16 or bfloat16, or float64 on the CPU. Rows with a unit last stride are read in
            place; any other layout is copied once.
        dim: the dimension along which the result sums to 1. Any dimension but the last costs two copies.
        dtype: ``input`` is converted to this dtype first, and the result has it; ``input`` may then have any dtype.

    Returns:
        A contiguous tensor with ``input``'s shape, and ``dtype`` or ``input``'s dtype.

    Raises:
        IndexError: ``input`` has no dimension ``dim``.
        RuntimeError: the dtype is not one of the above; the message names it.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.softmax(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    dims = max(input.dim(), 1)
    if not -dims <= dim < dims:
        raise IndexError(
            f"softmax: dim must be from {-dims} to {dims - 1} for input of {input.dim()} dimensions, got {dim}"
        )
    if dim in (-1, dims - 1):
        return _softmax(input, dtype=dtype)
    return _softmax(input.transpose(dim, -1), dtype=dtype).transpose(dim, -1).contiguous()


_softmax = torch.ops.torch_fused.softmax.default
