"""Layer norm over the last dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_floating
from .library import leading, register, run_first


def layer_norm_reference(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`layer_norm` in plain torch: float32 throughout, rounded once."""
    result = _normed(input, normalized_shape, eps)[0]
    if weight is not None:
        result = result * weight.to(result.dtype)
    if bias is not None:
        result = result + bias.to(result.dtype)
    return result.to(input.dtype)


def layer_norm_backward_reference(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    need_weight_grad: bool,
    need_bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and the needed gradients of weight and bias, stacked in this order."""
    dims = tuple(range(-len(normalized_shape), 0))
    normed, rstd = _normed(x, normalized_shape, eps)
    dy = grad.contiguous().to(normed.dtype)
    g = dy if weight is None else dy * weight.to(normed.dtype)
    grad_x = rstd * (g - g.mean(dims, keepdim=True) - normed * (g * normed).mean(dims, keepdim=True))
    rows = tuple(range(x.dim() - len(dims)))
    terms = [term for term, needed in ((dy * normed, need_weight_grad), (dy, need_bias_grad)) if needed]
    if not terms:
        return grad_x.to(x.dtype), x.new_empty(0, *normalized_shape)
    grad_params = torch.stack([term.sum(rows) if rows else term for term in terms])
    return grad_x.to(x.dtype), grad_params.to(x.dtype)


def _normed(x: Tensor, normalized_shape: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std, and 1 / std, in the dtype of the arithmetic."""
    dims = tuple(range(-len(normalized_shape), 0))
    wide = x.contiguous().to(_arithmetic_dtype(x))
    centred = wide - wide.mean(dims, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * rstd, rstd


def _arithmetic_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _layer_norm_fake(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return input.new_empty(input.shape)


def _layer_norm_backward_fake(grad, x, normalized_shape, weight, eps, need_weight_grad, need_bias_grad):
    return x.new_empty(x.shape), x.new_empty(need_weight_grad + need_bias_grad, *normalized_shape)


register("layer_norm", reference=layer_norm_reference, fake=_layer_norm_fake)
register(
    "layer_norm_backward",
    reference=layer_norm_backward_reference,
    fake=_layer_norm_backward_fake,
    batched=layer_norm_backward_reference,
)


@torch.library.register_vmap("torch_fused::layer_norm")
def _layer_norm_vmap(info, in_dims, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    """The batch becomes a leading dimension; batched parameters are applied outside the op."""
    input_dim, _, weight_dim, bias_dim = (*in_dims, None, None, None)[:4]
    input = leading(info, input, input_dim)
    if weight_dim is None and bias_dim is None:
        return layer_norm(input, normalized_shape, weight, bias, eps), 0
    in_dims = 0, None, weight_dim, bias_dim, None
    first = run_first(_layer_norm, info, in_dims, input, normalized_shape, weight, bias, eps)

    def spread(parameter: Tensor, dim: int | None) -> Tensor:
        """The batched parameter, reshaped to broadcast with the input."""
        if dim is None:
            return parameter
        parameter = parameter.movedim(dim, 0)
        return parameter.view(info.batch_size, *[1] * (input.dim() - parameter.dim()), *parameter.shape[1:])

    result = layer_norm(input.to(_arithmetic_dtype(input)), normalized_shape, None, None, eps)
    if weight is not None:
        result = result * spread(weight, weight_dim)
    if bias is not None:
        result = result + spread(bias, bias_dim)
    return result.to(first.dtype), 0


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""Layer norm over the last dimensions: :math:`(x - mean(x)) / \sqrt{var(x) + eps} \cdot weight + bias`.

    A drop-in replacement for :func:`torch.nn.functional.layer_norm`, differentiable in ``input``, ``weight`` and
    ``bias``. Computes in float32 (float64 for float64) and rounds once. The variance is biased (divided by the number
    of elements) and computed from the differences to the mean, so it stays accurate if the mean is large.

    Args:
        input: ``(*, *normalized_shape)``; float32, float16 or bfloat16, or float64 on the CPU. Rows with a unit last
            stride are read in place; any other layout is copied once.
        normalized_shape: the last dimensions of ``input``.
        weight: shape ``normalized_shape``, any of the dtypes above, or None for no scaling.
        bias: like ``weight``, or None for no shift.
        eps: added to the variance.

    Returns:
        A dense tensor with ``input``'s shape and dtype (float32 where autocast runs torch's layer_norm in float32).

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: Ba, Kiros and Hinton, Layer Normalization, https://arxiv.org/abs/1607.06450.

    Example:
        >>> import torch, torch_fused
        >>> torch_fused.functional.layer_norm(torch.tensor([[1.0, 3.0]]), (2,), torch.ones(2), torch.ones(2), eps=0.0)
        tensor([[0., 2.]])
    """
    dtype = input.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    check_floating("layer_norm", input=input, weight=weight, bias=bias)
    wide = [None if tensor is None else tensor.to(_arithmetic_dtype(input)) for tensor in (input, weight, bias)]
    result = _layer_norm(wide[0], normalized_shape, wide[1], wide[2], eps)
    return result if _autocast_to_float32(input.device.type) else result.to(dtype)


def _autocast_to_float32(device: str) -> bool:
    return device in ("cuda", "mps") and torch.is_autocast_enabled(device)


_layer_norm = torch.ops.torch_fused.layer_norm.default
