"""Optimizers that use the fused ops, interchangeable with torch's."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops.adamw import adamw_
from .ops.sum_of_squares import sum_of_squares
from .sharding import as_parameter, is_sharded, local, total_of_shards

__all__ = ["AdamW"]


_ONLY = {"differentiable": False, "decoupled_weight_decay": True}
"""Arguments of torch's AdamW that can have only one value here."""

_LARGEST = float(torch.finfo(torch.float32).max)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the fused op: the same arguments, groups, states and checkpoints.

    State dicts can be exchanged with torch's AdamW in both directions, also during training. On a GPU, a step never
    waits for the device.

    DTensor parameters, such as FSDP2's, are updated through the shards of this process. Gradients with other placements
    than their parameters are redistributed first, as in torch's ops.

    Args:
        params: parameters, named parameters, or groups of them; float32, float16 or bfloat16, or float64 on the CPU.
            A gradient with another dtype is converted to its parameter's dtype.
        lr: learning rate, a float or a tensor with one element. If the tensor is on a GPU, a kernel reads it.
        betas: coefficients of the running averages of the gradient and of its square; floats or tensors, like `lr`.
        eps: added to the denominator.
        weight_decay: decoupled weight decay coefficient.
        amsgrad: divide by the maximum of the running averages of the squared gradient.
        maximize: maximize the objective instead of minimizing it.
        foreach, fused: no effect, because the op is always fused. Kept in the groups, where torch reads them.
        capturable: count the steps on the device of the parameters, so that a CUDA graph can replay a step. To change
            the learning rate between replays, pass it as a tensor on the GPU.
        differentiable: must be False; the op has no gradient.
        decoupled_weight_decay: must be True; accepted so that ``**optimizer.defaults`` of torch's AdamW work.
        state_dtype: dtype of the running averages; None uses each parameter's dtype, as in torch. With
            ``torch.float32``, averages of 16-bit parameters stay accurate: with beta2 of 0.999, a bfloat16 average
            never shrinks.
        max_grad_norm: clip the total norm of all gradients, over all groups, devices and shards, like
            :func:`torch.nn.utils.clip_grad_norm_` before the step, but without changing the gradients. It may be
            changed between steps: ``optimizer.max_grad_norm = 0.5``. None does not clip. ``optimizer.grad_norm`` is the
            norm in the last step, after unscaling and before clipping, as a scalar tensor; None without clipping.

    With a :class:`torch.amp.GradScaler`, the step unscales the gradients, and is skipped if one is infinite or NaN,
    without the host waiting for it. Steps are then counted on the device.

    Raises:
        ValueError: an argument is out of range; ``differentiable`` or ``decoupled_weight_decay``, as an argument or in
            a group, has another value than above; ``state_dtype`` is not None or float32.
        RuntimeError: both ``foreach`` and ``fused`` are True.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch_fused.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm
        tensor(3.1623)
    """

    grad_norm: Tensor | None = None
    """Total norm of the gradients in the last step, unscaled and before clipping; None without ``max_grad_norm``."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        state_dtype: torch.dtype | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"AdamW: state_dtype must be None or torch.float32, got {state_dtype}")
        if max_grad_norm is not None and not 0 <= max_grad_norm < _LARGEST:
            raise ValueError(f"AdamW: max_grad_norm must be None, or finite and at least 0, got {max_grad_norm}")
        _check_group({"decoupled_weight_decay": decoupled_weight_decay})
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._step_supports_amp_scaling = True  # so GradScaler sets grad_scale and found_inf, and does not read them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, like torch's AdamW, but a parameter may not be in the group twice.

        Args:
            param_group: ``params``, and optionally arguments of this class for this group.

        Raises:
            ValueError: an argument has a value that this class does not support, or a parameter is in the group twice
                or in another group; nothing is added then.
        """
        _check_group(self.defaults | param_group)
        if not isinstance(param_group["params"], Tensor):
            param_group["params"] = list(param_group["params"])
            tensors = [param[1] if isinstance(param, tuple) else param for param in param_group["params"]]
            places: dict[int, int] = {}
            for i, tensor in enumerate(tensors):
                if (first := places.setdefault(id(tensor), i)) != i:
                    raise ValueError(f"AdamW: params {first} and {i} of a group are the same parameter; pass it once")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients before the step.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: a gradient is sparse or complex, a parameter is a DTensor with a ``Partial`` placement, or a
                group has a value that the constructor does not accept. No parameter has changed then.
            RuntimeError: parameters of a group, or their states, share memory; the groups before it have been updated
                then. Or a CUDA graph is being captured without ``capturable``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        groups = [(group, _Gradients(group)) for group in self.param_groups]
        squares = self._squares([gradients for _, gradients in groups])
        for group, gradients in groups:
            capturable = bool(group["capturable"]) or found_inf is not None
            for device, params in gradients.by_device().items():
                _check_capture(device, capturable)
                self._step_params(group, gradients, params, device, capturable, squares)
        return loss

    def _squares(self, groups: list["_Gradients"]) -> Tensor | None:
        """The sum of squares of all gradients, over all devices and shards, if they are clipped."""
        self.grad_norm = None
        if self.max_grad_norm is None or not any(group.params for group in groups):
            return None
        total = total_of_shards(
            [(param, grad) for group in groups for param, grad in zip(group.params, group.grads, strict=True)],
            sum_of_squares,
        )
        scale = getattr(self, "grad_scale", None)
        self.grad_norm = total.sqrt() if scale is None else total.sqrt() / scale.to(total.device, non_blocking=True)
        return total

    def _step_params(
        self,
        group: dict[str, Any],
        gradients: "_Gradients",
        places: list[int],
        device: torch.device,
        capturable: bool,
        squares: Tensor | None,
    ) -> None:
        names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
        params = [gradients.params[i] for i in places]
        counts_on = device if capturable else torch.device("cpu")
        states = [self._state_of(param, names, counts_on) for param in params]
        averages = {name: [state[name] for state in states] for name in names}
        if gradients.sharded:
            params = [local(param) for param in params]
            averages = {name: [local(average) for average in tensors] for name, tensors in averages.items()}
        beta1, beta2 = group["betas"]
        on_device = {
            name: None if value is None else value.to(device, non_blocking=True)
            for name, value in (
                ("grad_scale", getattr(self, "grad_scale", None)),
                ("found_inf", getattr(self, "found_inf", None)),
                ("grad_squares", squares),
            )
        }
        adamw_(
            params,
            [gradients.grads[i] for i in places],
            averages["exp_avg"],
            averages["exp_avg_sq"],
            [state["step"] for state in states],
            averages.get("max_exp_avg_sq", []),
            lr=_number(group["lr"], device),
            beta1=_number(beta1, device),
            beta2=_number(beta2, device),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            capturable=capturable,
            max_grad_norm=None if squares is None else self.max_grad_norm,
            **on_device,
        )

    def _state_of(self, param: Tensor, names: list[str], counts_on: torch.device) -> dict[str, Tensor]:
        """The state of a parameter, created or completed, with its step on the device `counts_on`."""
        state = self.state[param]
        step = state.get("step")
        if step is None:
            state["step"] = torch.zeros((), dtype=torch.float32, device=counts_on)
        elif step.device != counts_on:
            state["step"] = step.to(counts_on, non_blocking=step.is_cpu)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=self.state_dtype or param.dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's AdamW, with any of its implementations.

        Args:
            state_dict: the result of ``state_dict()`` of either class; it is not changed.

        Raises:
            ValueError: its groups do not match those of this optimizer, or one has a value that the constructor does
                not accept, such as ``differentiable=True``. The optimizer has not changed then.
        """
        for group in state_dict["param_groups"]:
            # Torch's AdamW also loads checkpoints of Adam, and decouples the decay.
            _check_group(group | {"decoupled_weight_decay": True})
        super().load_state_dict(state_dict)
        # Torch has rounded the averages to the parameter's dtype.
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            for name, loaded in state_dict["state"].get(number, {}).items():
                if self.state_dtype and name != "step":
                    self.state[param][name] = loaded.to(device=param.device, dtype=self.state_dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state_dtype": self.state_dtype, "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called when a state dict is loaded: moves each step counter to the right device."""
        super().__setstate__(state)
        for group in self.param_groups:
            for param in group["params"]:
                if "step" in (values := self.state.get(param, {})):
                    device = param.device if group["capturable"] else "cpu"
                    values["step"] = values["step"].to(device=device, dtype=torch.float32)


class _Gradients:
    """A group's parameters that have a gradient, and this process's part of the gradients."""

    def __init__(self, group: dict[str, Any]) -> None:
        _check_group(group)
        found = [(param, grad) for param in group["params"] if (grad := param.grad) is not None]
        for _, grad in found:
            _check_gradient(grad)
        self.params = [param for param, _ in found]
        self.sharded = any(map(is_sharded, self.params))
        if self.sharded:
            found = [(param, local(as_parameter(grad, param))) for param, grad in found]
        self.grads = [grad if grad.dtype == param.dtype else grad.to(param.dtype) for param, grad in found]

    def by_device(self) -> dict[torch.device, list[int]]:
        """The indices of the parameters on each device."""
        places: dict[torch.device, list[int]] = defaultdict(list)
        for i, param in enumerate(self.params):
            places[param.device].append(i)
        return places


def _number(value: float | Tensor, device: torch.device) -> float | Tensor:
    """The value for the op: a number, or a tensor on the CPU or on the device of the parameters."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_cpu:
        return value if value.is_floating_point() else value.float()
    return value.to(device=device, dtype=torch.float32, non_blocking=device.type != "cpu")


def _check_capture(device: torch.device, capturable: bool) -> None:
    if device.type == "cuda" and not capturable and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("AdamW: capturing a step in a CUDA graph requires capturable=True")


def _check_group(group: dict[str, Any]) -> None:
    for name, only in _ONLY.items():
        if bool(group.get(name, only)) != only:
            raise ValueError(f"AdamW: {name} must be {only}, got {group[name]}; use torch.optim.AdamW instead")


def _check_gradient(grad: Tensor) -> None:
    if grad.layout != torch.strided:
        layout = str(grad.layout).removeprefix("torch.")
        raise ValueError(
            f"AdamW: gradients must be dense, got a {layout} one; use torch.optim.SparseAdam, or create layers such as "
            "torch.nn.Embedding without sparse=True"
        )
    if grad.is_complex():
        raise ValueError(f"AdamW: gradients must be real, got {grad.dtype}; use torch.optim.AdamW instead")
