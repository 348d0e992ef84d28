"""Cross entropy of rows of logits, with the gradient written over the logits."""

import torch
from torch import Tensor

from .library import register


def losses_reference(
    logits: Tensor, target: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """The loss of each row in plain torch: `F.cross_entropy` without a reduction, and the square of the log-sum-exp.

    A target that is not a class gives NaN; the host does not read the targets.
    """
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    lse = wide.logsumexp(-1)
    kept = target != ignore_index
    classes = wide.shape[-1]
    is_class = (target >= 0) & (target < classes)
    of_target = wide.gather(-1, target.clamp(0, classes - 1)[..., None])[..., 0]
    loss = lse - (1 - label_smoothing) * of_target
    if label_smoothing > 0:
        loss = loss - label_smoothing * wide.mean(-1)
    if z_loss != 0:
        loss = loss + z_loss * lse.square()
    return torch.where(kept, torch.where(is_class, loss, torch.nan), 0.0)


def gradient_reference(
    logits: Tensor,
    target: Tensor,
    scale: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The gradient of each row's loss, times the scale, in the dtype of the losses."""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    classes = wide.shape[-1]
    kept = target != ignore_index
    is_class = (target >= 0) & (target < classes)
    hit = (torch.arange(classes, device=target.device) == target[..., None]).to(wide.dtype)
    grad = wide.softmax(-1)
    if z_loss != 0:
        grad = grad * (1 + 2 * z_loss * wide.logsumexp(-1, keepdim=True))
    grad = (grad - label_smoothing / classes - (1 - label_smoothing) * hit) * scale[..., None]
    grad = torch.where(is_class[..., None], grad, torch.nan)
    return torch.where(kept[..., None], grad, 0.0)


def cross_entropy_reference(logits: Tensor, target: Tensor, scale: Tensor | None = None, **options: float) -> Tensor:
    """`cross_entropy_` in plain torch, without its checks."""
    losses = losses_reference(logits, target, **options)  # type: ignore[arg-type]
    if scale is not None:
        logits.copy_(gradient_reference(logits, target, scale.to(losses.dtype), **options))  # type: ignore[arg-type]
    return losses


def _cross_entropy_fake(logits, target, scale=None, **options):
    return logits.new_empty(target.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


register("cross_entropy_", reference=cross_entropy_reference, fake=_cross_entropy_fake)


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    r"""The loss of each row of logits; with a ``scale``, the gradient overwrites the logits.

    .. math::
        \ell = \log \textstyle\sum_j e^{x_j} - (1 - \epsilon)\, x_t - \frac{\epsilon}{C} \sum_j x_j
            + z \left(\log \textstyle\sum_j e^{x_j}\right)^2

    Each row is read once for its loss (maximum and sum in one pass) and once for its gradient.
    :func:`torch_fused.functional.linear_cross_entropy` uses this op. Not differentiable.

    Args:
        logits: ``(rows, classes)``; float32, float16 or bfloat16, or float64 on the CPU. Any strides without
            overlapping elements.
        target: ``(rows,)``, int64: class indices or ``ignore_index``.
        scale: a float32 scalar, or one number per row (float64 for float64). The gradient of the loss, times this,
            overwrites the logits. None leaves the logits unchanged.
        ignore_index: the loss and gradient of rows with this target are 0.
        label_smoothing: :math:`\epsilon`, the share of the target's weight that is spread evenly over all classes, from
            0 to 1.
        z_loss: :math:`z`, the factor of the squared log-sum-exp.

    Returns:
        The losses ``(rows,)`` in float32; float64 for float64 logits.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value; the message names it.
        IndexError: a target on the CPU is not a class. Targets on a GPU are not checked; the row's loss and gradient
            are then NaN.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, https://arxiv.org/abs/1805.02867.

    Example:
        >>> import torch
        >>> from torch_fused.ops.cross_entropy import cross_entropy_
        >>> logits = torch.zeros(1, 2)
        >>> cross_entropy_(logits, torch.tensor([1]), torch.tensor(1.0))
        tensor([0.6931])
        >>> logits
        tensor([[ 0.5000, -0.5000]])
    """
    return _cross_entropy(
        logits, target, scale, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )


_cross_entropy = torch.ops.torch_fused.cross_entropy_.default
