"""One AdamW step over many tensors, in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import register


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    """`adamw_` in plain torch, without its checks: in float32 (float64 for float64), each result rounded once."""
    for param, grad, exp_avg, exp_avg_sq, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        step += 1
        count = step.item()
        g = -grad.to(wide) if maximize else grad.to(wide)
        m = exp_avg.to(wide).lerp(g, 1 - beta1)
        v = exp_avg_sq.to(wide).mul(beta2).addcmul(g, g, value=1 - beta2)
        denominator = v.sqrt().div((1 - beta2**count) ** 0.5).add(eps)
        param.copy_(param.to(wide).mul(1 - lr * weight_decay).addcdiv(m, denominator, value=-lr / (1 - beta1**count)))
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)


def _adamw_fake(params, grads, exp_avgs, exp_avg_sqs, steps, **settings):
    return None


register("adamw_", reference=adamw_reference, fake=_adamw_fake)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
) -> None:
    r"""One step of AdamW on every parameter, in place: seven tensors a launch on a GPU.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    .. math::
        w \leftarrow (1 - \gamma\lambda) w
            - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with the step :math:`t` of each parameter, the learning rate :math:`\gamma` and the weight decay
    :math:`\lambda`. The arithmetic is in float32 (float64 for float64), each result rounded once. Not differentiable:
    call it under :func:`torch.no_grad`.

    Args:
        params: at least one tensor, all on one device; each float32, float16 or bfloat16, on the CPU float64 too. Any
            strides but expanded ones; those of a dense tensor, transposed or not, are updated without a copy.
        grads: as many, each with the shape and dtype of its parameter.
        exp_avgs, exp_avg_sqs: the states, with the shape of their parameter, and its dtype or float32. No element of a
            parameter, state or step may be that of another operand; parts of one buffer may lie side by side.
        steps: the steps each parameter has made so far, a float32 scalar on the CPU each; one is added.
        lr, beta1, beta2, eps, weight_decay: as in :class:`torch.optim.AdamW`.
        maximize: follow the gradient instead of descending.

    Raises:
        RuntimeError: an argument is not as above; the message names it. Nothing is written then.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, https://arxiv.org/abs/1711.05101.

    Example:
        >>> import torch
        >>> from torch_fused.ops.adamw import adamw_
        >>> param, grad, step = torch.ones(2), torch.tensor([1.0, -1.0]), torch.zeros(())
        >>> adamw_([param], [grad], [torch.zeros(2)], [torch.zeros(2)], [step], lr=0.1, weight_decay=0.0)
        >>> param, step
        (tensor([0.9000, 1.1000]), tensor(1.))
    """
    _adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


_adamw = torch.ops.torch_fused.adamw_.default
