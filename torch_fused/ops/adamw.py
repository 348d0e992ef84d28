"""One AdamW step over many tensors, in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import register


def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    capturable: bool = False,
    lr_tensor: Tensor | None = None,
    beta1_tensor: Tensor | None = None,
    beta2_tensor: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_squares: Tensor | None = None,
    max_grad_norm: float | None = None,
) -> None:
    """`adamw_` in plain torch, without its checks: in float32 (float64 for float64), each result rounded once."""
    numbers = [(lr, lr_tensor), (beta1, beta1_tensor), (beta2, beta2_tensor)]
    rate, momentum, decay = (number if tensor is None else tensor.reshape(()) for number, tensor in numbers)
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    scale = 1.0 if grad_scale is None else grad_scale.reshape(())
    factor = _clipping(grad_squares, max_grad_norm, scale) / scale * (-1 if maximize else 1)
    for i, (param, exp_avg, exp_avg_sq, step) in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        count = step.reshape(()) + 1 if capturable else step.item() + 1
        g = grads[i].to(wide) * factor
        m = exp_avg.to(wide).lerp(g, _as_tensor(1 - momentum, g))
        v = exp_avg_sq.to(wide) * decay + (1 - decay) * g * g
        largest = v.maximum(max_exp_avg_sqs[i].to(wide)) if max_exp_avg_sqs else v
        denominator = largest.sqrt().div(_one_minus_power(decay, count) ** 0.5).add(eps)
        updated = (
            param.to(wide) * (1 - rate * weight_decay) - rate / _one_minus_power(momentum, count) * m / denominator
        )
        changes = [(param, updated), (exp_avg, m), (exp_avg_sq, v), (step, step + 1)]
        if max_exp_avg_sqs:
            changes.append((max_exp_avg_sqs[i], largest))
        for tensor, new in changes:
            tensor.copy_(new if skip is None else torch.where(skip, tensor, new.to(tensor.dtype)))


def _clipping(squares: Tensor | None, max_norm: float | None, scale: float | Tensor) -> float | Tensor:
    if squares is None or max_norm is None:
        return 1.0
    return (max_norm / (squares.reshape(()).sqrt() / scale + 1e-6)).clamp(max=1.0)


def _one_minus_power(base: float | Tensor, count: float | Tensor) -> float | Tensor:
    """In float64 if the device has it, because the result is close to 0 at first."""
    if isinstance(base, Tensor) and base.device.type != "mps":
        base = base.double()
    if isinstance(count, Tensor) and count.device.type != "mps":
        count = count.double()
    return 1 - base**count


def _as_tensor(number: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)


def _adamw_fake(params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs, **settings):
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.is_meta and not params[0].is_meta:
            raise RuntimeError(
                f"adamw_: {name} must be on the device of params[0], {params[0].device}, got {value.device}"
            )


register("adamw_", reference=adamw_reference, fake=_adamw_fake)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    *,
    lr: float | Tensor = 1e-3,
    beta1: float | Tensor = 0.9,
    beta2: float | Tensor = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    capturable: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_squares: Tensor | None = None,
    max_grad_norm: float | None = None,
) -> None:
    r"""One step of AdamW on every parameter, in place; seven tensors per launch on a GPU.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2

    .. math::
        w \leftarrow (1 - \gamma\lambda) w
            - \frac{\gamma}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with the step :math:`t` of each parameter, the learning rate :math:`\gamma` and the weight decay
    :math:`\lambda`. With AMSGrad, the :math:`v` in the denominator is its maximum so far. Computes in float32 (float64
    for float64) and rounds each result once. The host never waits for a GPU: kernels read the values of tensors on it,
    with one more launch per 21 parameters. Not differentiable: call it under :func:`torch.no_grad`.

    Args:
        params: at least one tensor, all on one device; each float32, float16 or bfloat16, or float64 on the CPU. Any
            strides except expanded ones. Dense tensors, transposed or not, are updated without a copy.
        grads: one per parameter, with its shape and dtype.
        exp_avgs, exp_avg_sqs: the states, with the shape of their parameter, in its dtype or float32. Parameters,
            states and steps must not overlap with each other or with other arguments; they may be parts of one buffer.
        steps: the number of steps so far, one float32 per parameter, on the CPU or, with ``capturable``, on the device
            of the parameters. Incremented by one.
        max_exp_avg_sqs: for AMSGrad, the maximum of ``exp_avg_sqs`` so far, in the same format, with five tensors per
            launch. Otherwise empty.
        lr, beta1, beta2: as in :class:`torch.optim.AdamW`; or a tensor with one float32, on the device of the
            parameters or on the CPU (where it may be float64). Values on a GPU are not checked.
        eps, weight_decay: as in :class:`torch.optim.AdamW`.
        maximize: maximize the objective instead of minimizing it.
        capturable: count the steps on the device of the parameters, so that a CUDA graph counts them too.
        grad_scale: one float32 on the device of the parameters. Gradients are divided by it as they are read; they are
            not written.
        found_inf: one float32 on the device of the parameters. If it is not 0, nothing is written and the step is not
            counted. Requires ``capturable``.
        grad_squares: the :func:`sum_of_squares` of all gradients, before ``grad_scale``, on the device of the
            parameters. Required with ``max_grad_norm``.
        max_grad_norm: gradients are multiplied by ``max_grad_norm / (norm + 1e-6)`` if that is below 1, like
            :func:`torch.nn.utils.clip_grad_norm_`, with the norm of the unscaled gradients.

    Raises:
        RuntimeError: an argument does not meet the requirements above; the message names it. Nothing is written then.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, https://arxiv.org/abs/1711.05101.

    Example:
        >>> import torch
        >>> from torch_fused.ops.adamw import adamw_
        >>> param, grad, step = torch.ones(2), torch.tensor([1.0, -1.0]), torch.zeros(())
        >>> adamw_([param], [grad], [torch.zeros(2)], [torch.zeros(2)], [step], lr=0.1, weight_decay=0.0)
        >>> param, step
        (tensor([0.9000, 1.1000]), tensor(1.))
    """
    numbers: dict[str, Any] = {
        f"{name}_tensor" if isinstance(value, Tensor) else name: value
        for name, value in (("lr", lr), ("beta1", beta1), ("beta2", beta2))
    }
    _adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        steps,
        max_exp_avg_sqs,
        **numbers,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        capturable=capturable,
        grad_scale=grad_scale,
        found_inf=found_inf,
        grad_squares=grad_squares,
        max_grad_norm=max_grad_norm,
    )


_adamw = torch.ops.torch_fused.adamw_.default
