"""LoRA adapters of PEFT in training: what an adapter adds to its layer is added by the product that makes it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import Low, is_lora, lora_of
from .models import is_hooked, is_plain, is_transformed
from .origin import home_of


def lora_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``base(x) + scale * b(a(dropout(x)))`` where an adapter is trained; the class's own forward anywhere else."""
    low = None if args or kwargs else _trained(self, x)
    if low is None:
        return type(self).forward(self, x, *args, **kwargs)
    dropped = low.dropout(x)
    tensors = [x, None if dropped is x else dropped, *_tensors(self.base_layer, low)]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    return _LoraLinear.apply(*tensors, low.scale)


def _tensors(base: nn.Linear, low: Low) -> list[Any]:
    return [base.weight, base.bias, low.a.weight, low.b.weight]


def _trained(layer: Any, x: Tensor) -> Low | None:
    """The one adapter of a layer, if it is trained and all that a call runs is known."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_lora(layer):
        return None
    found, reason = lora_of(layer)
    base = layer.base_layer
    if reason or len(found) != 1 or type(base) is not nn.Linear:
        return None
    low = found[0]
    if not all(_runs_its_forward_alone(part) for part in (base, low.a, low.b)):
        return None
    weight, bias, a, b = _tensors(base, low)
    tensors = [tensor for tensor in (x, weight, bias, a, b) if tensor is not None]
    if not is_plain(*tensors) or is_transformed(*tensors) or len({tensor.device for tensor in tensors}) > 1:
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        return None
    if len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type):
        return None
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return low if frozen and a.requires_grad and b.requires_grad and x.dim() > 1 else None


def _runs_its_forward_alone(linear: nn.Linear) -> bool:
    return (
        "forward" not in linear.__dict__
        and linear._compiled_call_impl is None
        and home_of(type(linear)) is not None
        and not is_hooked(linear)
    )


class _LoraLinear(torch.autograd.Function):
    """With a frozen weight. An adapter of low rank costs little arithmetic: what it costs is the passes over tensors
    of the layer's size, and here its products add to those of the layer in place."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):  # type: ignore[override]
        states = x if dropped is None else dropped
        low = states.flatten(0, -2) @ a.t()
        result = F.linear(x.flatten(0, -2), weight, bias).addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(states, weight, a, b, low)
        ctx.scale, ctx.joined = scale, dropped is None
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        states, weight, a, b, low = ctx.saved_tensors
        rows, grad = states.flatten(0, -2), grad.reshape(-1, grad.shape[-1])
        if torch.is_grad_enabled():  # a second derivative goes through it
            low = rows @ a.t()
        of_low = F.linear(grad, (b * ctx.scale).t().contiguous())
        of_a, of_b = of_low.t() @ rows, ((low * ctx.scale).t() @ grad).t()
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        of_dropped = None
        if ctx.joined:
            of_x = None if of_x is None else of_x.addmm_(of_low, a)
        elif ctx.needs_input_grad[1]:
            of_dropped = (of_low @ a).view(states.shape)
        return None if of_x is None else of_x.view(states.shape), of_dropped, None, None, of_a, of_b, None
