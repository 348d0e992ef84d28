"""RMS norm, alone and with the residual addition that comes before it in a decoder layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_casting_mode, check_floating, check_shape
from .library import leading, register, run_first


def rms_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting_mode: str = "torch",
    weight_offset: float = 0.0,
) -> Tensor:
    """`rms_norm` in plain torch: float32 throughout ("torch"), or with the roundings of Llama's module ("llama")."""
    dims = tuple(range(-len(normalized_shape), 0))
    x = input.contiguous().to(_arithmetic_dtype(input))
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    normed = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
    if casting_mode == "llama":
        normed = normed.to(input.dtype)
        return normed if weight is None else (weight + weight_offset if weight_offset else weight) * normed
    if weight is not None:
        normed = normed * (weight.to(x.dtype) + weight_offset)
    return normed.to(input.dtype)


def add_rms_norm_reference(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    casting_mode: str = "llama",
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch."""
    total = (input + residual).contiguous()
    normed = rms_norm_reference(
        total, weight.shape, weight, eps, casting_mode=casting_mode, weight_offset=weight_offset
    )
    return normed, total


def rms_norm_backward_reference(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    casting_mode: str,
    weight_offset: float,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, with `grad_sum` added if there is one, and of the weight (empty if not needed)."""
    dtype = _arithmetic_dtype(x)
    dims = tuple(range(-len(normalized_shape), 0))
    wide, dy = x.contiguous().to(dtype), grad.contiguous().to(dtype)
    if eps is None:
        eps = torch.finfo(dtype).eps
    scale = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + eps)
    normed = wide * scale
    g = dy if weight is None else dy * (weight.to(dtype) + weight_offset)
    grad_x = scale * (g - normed * (g * normed).mean(dims, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    if not need_weight_grad:
        return grad_x.to(x.dtype), x.new_empty(0)
    rows = tuple(range(x.dim() - len(dims)))
    grad_weight = (dy * normed).sum(rows) if rows else dy * normed
    return grad_x.to(x.dtype), grad_weight.to(x.dtype)


def _arithmetic_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _rms_norm_fake(input, normalized_shape, weight=None, eps=None, *, casting_mode="torch", weight_offset=0.0):
    return input.new_empty(input.shape)


def _add_rms_norm_fake(input, residual, weight, eps=1e-6, *, casting_mode="llama", weight_offset=0.0):
    return input.new_empty(input.shape), input.new_empty(input.shape)


def _rms_norm_backward_fake(
    grad, grad_sum, x, normalized_shape, weight, eps, casting_mode, weight_offset, need_weight_grad
):
    return x.new_empty(x.shape), x.new_empty(normalized_shape if need_weight_grad else 0)


register("rms_norm", reference=rms_norm_reference, fake=_rms_norm_fake)
register("add_rms_norm", reference=add_rms_norm_reference, fake=_add_rms_norm_fake)
register(
    "rms_norm_backward",
    reference=rms_norm_backward_reference,
    fake=_rms_norm_backward_fake,
    batched=rms_norm_backward_reference,
)


def _rms_norm_vmap(
    info, in_dims, input, normalized_shape, weight=None, eps=None, *, casting_mode="torch", weight_offset=0.0
):
    """The batch becomes a leading dimension; a batched weight is applied outside the op."""
    check_casting_mode("rms_norm", casting_mode)
    input_dim, weight_dim = in_dims[0], in_dims[2] if len(in_dims) > 2 else None
    input = leading(info, input, input_dim)
    if weight_dim is None:
        return rms_norm(input, normalized_shape, weight, eps, casting_mode=casting_mode, weight_offset=weight_offset), 0
    options = {"casting_mode": casting_mode, "weight_offset": weight_offset}
    first = run_first(_rms_norm, info, (0, None, weight_dim, None), input, normalized_shape, weight, eps, **options)
    weight = leading(info, weight, weight_dim)
    weight = weight.view(info.batch_size, *[1] * (input.dim() - weight.dim()), *weight.shape[1:])
    if casting_mode == "llama":
        return (weight + weight_offset) * rms_norm(input, normalized_shape, None, eps, casting_mode=casting_mode), 0
    wide = input.to(_arithmetic_dtype(input))
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    normed = rms_norm(wide, normalized_shape, None, eps)
    return (normed * (weight.to(wide.dtype) + weight_offset)).to(first.dtype), 0


def _add_rms_norm_vmap(info, in_dims, input, residual, weight, eps=1e-6, *, casting_mode="llama", weight_offset=0.0):
    """The batch becomes a leading dimension; a batched weight takes two ops."""
    options = {"casting_mode": casting_mode, "weight_offset": weight_offset}
    input, residual, weight_dim = leading(info, input, in_dims[0]), leading(info, residual, in_dims[1]), in_dims[2]
    if weight_dim is None:
        return add_rms_norm(input, residual, weight, eps, **options), (0, 0)
    run_first(_add_rms_norm, info, (0, 0, weight_dim, None), input, residual, weight, eps, **options)
    total = input + residual
    shape = leading(info, weight, weight_dim).shape[1:]
    normed, _ = _rms_norm_vmap(info, (0, None, weight_dim, None), total, shape, weight, eps, **options)
    return (normed, total), (0, 0)


torch.library.register_vmap("torch_fused::rms_norm", _rms_norm_vmap)
torch.library.register_vmap("torch_fused::add_rms_norm", _add_rms_norm_vmap)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    casting_mode: str = "torch",
    weight_offset: float = 0.0,
) -> Tensor:
    r"""Root mean square norm over the last dimensions: :math:`x / \sqrt{\mathrm{mean}(x^2) + eps} \cdot weight`.

    A drop-in replacement for :func:`torch.nn.functional.rms_norm`, differentiable in ``input`` and ``weight``.

    Args:
        input: ``(*, *normalized_shape)``; float32, float16 or bfloat16, or float64 on the CPU. Rows with a unit last
            stride are read in place; any other layout is copied once.
        normalized_shape: the last dimensions of ``input``.
        weight: shape ``normalized_shape``, any of the dtypes above, or None for no scaling.
        eps: added to the mean square; None is the machine epsilon of float32 (of float64 for float64 input).
        casting_mode: ``"torch"`` computes in float32 and rounds once, like ``F.rms_norm``. ``"llama"`` rounds like
            Hugging Face's ``LlamaRMSNorm`` (models/llama/modeling_llama.py): to the input's dtype before multiplying by
            the weight, and again after it.
        weight_offset: added to the weight; 1.0 for Gemma and Qwen3.5, which store weight - 1.

    Returns:
        A dense tensor with ``input``'s shape and dtype (``"llama"``: the promoted dtype of input and weight).

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.rms_norm(torch.tensor([[3.0, 4.0]]), (2,), torch.ones(2), eps=0.0)
        tensor([[0.8485, 1.1314]])
    """
    if weight is not None and weight.dtype != input.dtype:
        check_casting_mode("rms_norm", casting_mode)
        check_floating("rms_norm", input=input, weight=weight)
        check_shape("rms_norm", "weight", weight, normalized_shape)
        if casting_mode == "llama":
            return (weight + weight_offset) * _rms_norm(input, normalized_shape, None, eps, casting_mode="llama")
        dtype = _arithmetic_dtype(input)
        normed = _rms_norm(input.to(dtype), normalized_shape, weight.to(dtype), eps, weight_offset=weight_offset)
        return normed.to(input.dtype)
    return _rms_norm(input, normalized_shape, weight, eps, casting_mode=casting_mode, weight_offset=weight_offset)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    casting_mode: str = "llama",
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Adds the residual and applies the RMS norm that follows in a decoder layer, in one pass over memory.

    Args:
        input: ``(*, *weight.shape)``; float32, float16 or bfloat16, or float64 on the CPU.
        residual: same shape, dtype and device as ``input``.
        weight: its shape gives the last dimensions, which are normalised; same dtype and device as ``input``.
        eps: added to the mean square.
        casting_mode, weight_offset: as in :func:`rms_norm`.

    Returns:
        ``(normed, total)``, dense, with ``input``'s shape and dtype: ``total = input + residual``, rounded to the
        dtype, and ``normed = rms_norm(total)``. Differentiable in all three tensors.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: the second half of ``LlamaDecoderLayer.forward`` (models/llama/modeling_llama.py).

    Example:
        >>> import torch, torch_fused
        >>> x, residual = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
        >>> torch_fused.functional.add_rms_norm(x, residual, torch.ones(2), eps=0.0)
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]))
    """
    return _add_rms_norm(input, residual, weight, eps, casting_mode=casting_mode, weight_offset=weight_offset)


_rms_norm = torch.ops.torch_fused.rms_norm.default
_add_rms_norm = torch.ops.torch_fused.add_rms_norm.default
