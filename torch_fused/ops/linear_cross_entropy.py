"""Cross entropy of a linear layer, such as a language model's head, without all logits in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy import gradient_reference, losses_reference
from .library import register, run_first


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` in plain torch, with all logits."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    losses = losses_reference(F.linear(hidden, weight, bias), target, **options)  # type: ignore[arg-type]
    if reduction == "none":
        return losses
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


def _gradients_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    own: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradients, multiplied by `grad`, in plain torch."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    loss = linear_cross_entropy_reference(
        hidden,
        weight,
        target,
        bias,
        reduction=reduction,
        **options,  # type: ignore[arg-type]
    )
    scale = torch.ones_like(loss) if grad is None else grad
    if reduction == "mean":
        scale = scale / (target != ignore_index).sum()
    logits = F.linear(hidden, weight, bias)
    of_logits = gradient_reference(logits, target, scale.expand(target.shape), **options)  # type: ignore[arg-type]
    of_logits = of_logits.to(hidden.dtype).reshape(target.numel(), -1)
    return (
        loss,
        (of_logits @ weight).view(hidden.shape) if need_hidden else hidden.new_empty(0, hidden.shape[-1]),
        of_logits.T @ hidden.reshape(target.numel(), hidden.shape[-1])
        if need_weight
        else weight.new_empty(0, weight.shape[1]),
        of_logits.sum(0) if need_bias else weight.new_empty(0),
    )


def _linear_cross_entropy_fake(
    hidden,
    weight,
    target,
    bias=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="mean",
    z_loss=0.0,
):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(target.shape if reduction == "none" else (), dtype=dtype)


def _gradients_fake(
    hidden,
    weight,
    target,
    bias,
    grad,
    ignore_index,
    label_smoothing,
    reduction,
    z_loss,
    need_hidden,
    need_weight,
    need_bias,
    own=None,
):
    return (
        _linear_cross_entropy_fake(hidden, weight, target, reduction=reduction),
        hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[-1])),
        weight.new_empty(weight.shape if need_weight else (0, weight.shape[1])),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _scale_reference(x: Tensor, factor: Tensor) -> None:
    """A gradient times the incoming one, in place: in float32, or float64 for float64, and rounded once."""
    x.copy_(x.to(factor.dtype) * factor)


register("_scale_", reference=_scale_reference, fake=lambda x, factor: None)
register("linear_cross_entropy", reference=linear_cross_entropy_reference, fake=_linear_cross_entropy_fake)
register("_linear_cross_entropy_gradients", reference=_gradients_reference, fake=_gradients_fake)


def _register_vmap(name: str) -> None:
    """Runs the batch one call at a time, each with its own logits."""
    op = getattr(torch.ops.torch_fused, name).default

    def rule(info, in_dims, *args, **kwargs):
        found = []
        for i in range(info.batch_size):
            pairs = zip(args, in_dims, strict=True)
            found.append(op(*(x if dim is None else x.select(dim, i) for x, dim in pairs), **kwargs))
        found = found or [run_first(op, info, in_dims, *args, **kwargs)]
        single = isinstance(found[0], Tensor)
        results = [torch.stack(each)[: info.batch_size] for each in ([found] if single else zip(*found, strict=True))]
        return (results[0], 0) if single else (tuple(results), (0,) * len(results))

    torch.library.register_vmap(f"torch_fused::{name}", rule)


_register_vmap("linear_cross_entropy")
_register_vmap("_linear_cross_entropy_gradients")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
) -> Tensor:
    r"""``F.cross_entropy(F.linear(hidden, weight, bias), target)`` without all logits in memory.

    The logits are computed one chunk at a time. Their gradient overwrites them, and the gradients of ``hidden``,
    ``weight`` and ``bias``, if required, are computed from it in the forward pass. The backward pass multiplies them by
    the incoming gradient. With ``reduction="none"`` and in float16, the backward pass computes the logits again
    instead; in float16, small gradients would become 0 without the scale of the loss.

    On NVIDIA GPUs, in float16 and bfloat16, a chunk is the logits of all rows for some classes. The weight's gradient
    is written from the last class to the first, and until then its memory holds the logits. Only those of the first
    classes have memory of their own: 2^20 logits (2 MB), or as many as ``hidden`` has numbers. Without that gradient
    all have: 2^24 logits (34 MB) of up to 4096 rows, 4096 classes of more. A row's loss is known after the last chunk
    only, so the logits are then computed again for the gradients, except for those of the last chunk.

    On other devices and in float32, a chunk is the logits of some rows: an eighth of them, at least 128 (256 of up to
    65,536 classes; on a GPU 512, and 1024 of 4096 rows or more). On the CPU, ignored rows are skipped.

    Differentiable in ``hidden``, ``weight`` and ``bias``. Second derivatives, forward mode and :mod:`torch.func` use
    torch's own ops, with all logits in memory.

    Args:
        hidden: ``(..., features)``; float32, float16 or bfloat16, or float64 on the CPU.
        weight: ``(classes, features)``, in ``hidden``'s dtype.
        target: class indices, int64, with the shape of ``hidden``'s leading dimensions.
        bias: ``(classes,)``, in ``hidden``'s dtype, or None.
        ignore_index: rows with this target are ignored.
        label_smoothing: the share of the target's weight that is spread evenly over all classes, from 0 to 1.
        reduction: ``"mean"`` over the rows that are not ignored, ``"sum"`` or ``"none"``.
        z_loss: the factor of the squared log-sum-exp that is added to each loss.

    Returns:
        A scalar, or the losses in ``target``'s shape, in float32; float64 for float64. The mean of no rows is NaN, as
        in torch. Logits are rounded to ``hidden``'s dtype, as in ``F.linear``; the loss is not. In float16 and
        bfloat16, gradients that are sums over chunks are summed in float32: of ``hidden`` where a chunk is of classes,
        else of ``weight``. If the sum for ``weight`` would take more memory than all logits, there is one chunk.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value; the message names it.
        IndexError: a target on the CPU is not a class. Targets on a GPU are not checked; the loss is then NaN.

    Source: Wijmans et al., Cut your losses in large-vocabulary language models, https://arxiv.org/abs/2411.09009;
    z-loss from Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311.

    Example:
        >>> import torch, torch_fused
        >>> hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.zeros(4, 8)
        >>> torch_fused.functional.linear_cross_entropy(hidden, weight, torch.tensor([0, 3, -100]))
        tensor(1.3863, grad_fn=<...>)
    """
    return _linear_cross_entropy(
        hidden,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        z_loss=z_loss,
    )


_linear_cross_entropy = torch.ops.torch_fused.linear_cross_entropy.default
