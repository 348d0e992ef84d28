"""Optimizers on the fused ops, interchangeable with torch's of the same name."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops.adamw import adamw_

__all__ = ["AdamW"]


_ONLY = {"amsgrad": False, "capturable": False, "differentiable": False, "decoupled_weight_decay": True}
"""Arguments of torch's that have one value here."""


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on the fused op: the same arguments, groups, states and checkpoints.

    State dicts go both ways between this class and torch's in the middle of a training. On a GPU a step never waits
    for the device; a learning rate that is a tensor is read on the host, so keep it on the CPU.

    Args:
        params: parameters, named parameters, or groups of them; float32, float16 or bfloat16, on the CPU float64 too.
            The gradient is converted to its parameter's dtype, should it have another.
        lr: learning rate, a float or a tensor of one element.
        betas: coefficients of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        amsgrad: False; the fused op has no running maximum.
        maximize: follow the gradient instead of descending.
        foreach, fused: of no effect: the op is always fused. They are kept in the groups, as torch's loops read them.
        capturable: False; the op reads the number of the step on the host, so a CUDA graph would repeat one step.
        differentiable: False; the op has no gradient.
        decoupled_weight_decay: True; so that ``**optimizer.defaults`` of torch's AdamW are arguments.
        state_dtype: of both running averages; None is each parameter's own, as in torch. ``torch.float32`` keeps what
            16-bit averages lose: with beta2 of 0.999 a bfloat16 one never shrinks.

    Raises:
        ValueError: an argument is out of range, or ``amsgrad``, ``capturable``, ``differentiable`` or
            ``decoupled_weight_decay``, as an argument or in a group, is not as above; ``state_dtype`` is not None or
            float32.
        RuntimeError: both ``foreach`` and ``fused`` are True.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch_fused.optim.AdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

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
    ) -> None:
        if state_dtype not in (None, torch.float32):
            raise ValueError(f"AdamW: state_dtype must be None or torch.float32, got {state_dtype}")
        _check_group({"decoupled_weight_decay": decoupled_weight_decay})
        self.state_dtype = state_dtype
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
        self._step_supports_amp_scaling = False  # torch's fused step would unscale the gradients itself

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, but a parameter that is in the group twice, which would be updated twice, is an error.

        Args:
            param_group: ``params``, and arguments of this class that the group has of its own.

        Raises:
            ValueError: an argument is not one that this class takes, or a parameter is in the group twice or already in
                another; nothing is added then.
        """
        _check_group(self.defaults | param_group)
        if not isinstance(param_group["params"], Tensor):
            param_group["params"] = list(param_group["params"])
            tensors = [param[1] if isinstance(param, tuple) else param for param in param_group["params"]]
            places: dict[int, int] = {}
            for i, tensor in enumerate(tensors):
                if (first := places.setdefault(id(tensor), i)) != i:
                    raise ValueError(f"AdamW: params {first} and {i} of a group are one parameter: give it once")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse or complex, or a group has a value that the constructor refuses. Every
                parameter stays as it was.
            RuntimeError: parameters of a group, or their states, share memory with each other. Those of the groups
                before it have been updated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        wanted = [_params_with_grad(group) for group in self.param_groups]
        for group, operands in zip(self.param_groups, [self._operands(params) for params in wanted], strict=True):
            self._step_group(group, operands)
        return loss

    def _operands(self, params: list[Tensor]) -> dict[torch.device, tuple[list[Tensor], ...]]:
        """Parameters, gradients, states and steps, for each device."""
        operands: dict[torch.device, tuple[list[Tensor], ...]] = defaultdict(lambda: ([], [], [], [], []))
        for param in params:
            state = self.state[param] or self._new_state(param)
            tensors: tuple[Any, ...] = (param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
            if hasattr(param, "to_local"):  # sharded: the step is elementwise, so this process updates its part
                tensors = (*(tensor.to_local() for tensor in tensors[:4]), state["step"])
            for to, tensor in zip(operands[param.device], tensors, strict=True):
                to.append(tensor)
        return operands

    def _step_group(self, group: dict[str, Any], operands: dict[torch.device, tuple[list[Tensor], ...]]) -> None:
        beta1, beta2 = group["betas"]
        for params, grads, exp_avgs, exp_avg_sqs, steps in operands.values():
            adamw_(
                params,
                [grad.to(param.dtype) for grad, param in zip(grads, params, strict=True)],
                exp_avgs,
                exp_avg_sqs,
                steps,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )

    def _new_state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=self.state_dtype or param.dtype)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state dict of this class or of torch's AdamW, whatever the implementation that wrote it.

        Args:
            state_dict: what ``state_dict()`` of either returned; it is not changed.

        Raises:
            ValueError: its groups do not fit those of this optimizer, or one has a value that the constructor refuses,
                such as ``amsgrad=True``. The optimizer stays as it was.
        """
        for group in state_dict["param_groups"]:
            # Torch's AdamW takes an Adam's checkpoint too, and decouples the decay.
            _check_group(group | {"decoupled_weight_decay": True})
        super().load_state_dict(state_dict)
        # Torch has rounded the averages to the parameter's dtype.
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if self.state_dtype and number in state_dict["state"]:
                    loaded = state_dict["state"][number][name]
                    self.state[param][name] = loaded.to(device=param.device, dtype=self.state_dtype, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called when a state dict is loaded: the step counters go to the host, where they are read."""
        super().__setstate__(state)
        for values in self.state.values():
            if "step" in values:
                values["step"] = values["step"].to(device="cpu", dtype=torch.float32)


def _check_group(group: dict[str, Any]) -> None:
    for name, only in _ONLY.items():
        if bool(group.get(name, only)) != only:
            raise ValueError(f"AdamW: {name} must be {only}, got {group[name]}: use torch.optim.AdamW for it")


def _params_with_grad(group: dict[str, Any]) -> list[Tensor]:
    _check_group(group)
    params = [param for param in group["params"] if param.grad is not None]
    for param in params:
        if param.grad.layout != torch.strided:
            layout = str(param.grad.layout).removeprefix("torch.")
            raise ValueError(f"AdamW: gradients must be dense, got one that is {layout}")
        if param.grad.is_complex():
            raise ValueError(f"AdamW: gradients must be real, got one of {param.grad.dtype}: use torch.optim.AdamW")
    return params
