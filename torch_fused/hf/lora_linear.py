"""LoRA adapters of PEFT in training: what an adapter adds to its layer is added by the product that makes it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import Low, is_lora, lora_of
from .models import is_hooked, is_plain, is_transformed
from .origin import home_of
from .products import linear


def lora_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``base(x) + scale * b(a(dropout(x)))`` where an adapter is trained; the class's own forward anywhere else."""
    low = None if args or kwargs else _trained(self, x)
    if low is None:
        return type(self).forward(self, x, *args, **kwargs)
    # PEFT casts before it drops. Without dropout, only products need the cast.
    cast = type(low.dropout) is not nn.Identity and _casts(self)
    given = x.to(low.a.weight.dtype) if cast else x
    dropped = low.dropout(given)
    tensors = [x, None if dropped is given else dropped, *_tensors(self.base_layer, low)]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    return _LoraLinear.apply(*tensors, low.scale)


def _tensors(base: nn.Linear, low: Low) -> list[Any]:
    return [base.weight, base.bias, low.a.weight, low.b.weight]


def _casts(layer: Any) -> bool:
    """Whether the input is cast to the adapter's dtype, which PEFT's `disable_input_dtype_casting` turns off."""
    return getattr(layer, "cast_input_dtype_enabled", True)


def _trained(layer: Any, x: Tensor) -> Low | None:
    """The one adapter of a layer, if it is trained and all that a call runs is known."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_lora(layer):
        return None
    if not torch.amp.is_autocast_available(x.device.type):  # of "meta", nothing can be asked about autocast
        return None
    found, reason = lora_of(layer)
    base = layer.base_layer
    if reason or len(found) != 1 or type(base) is not nn.Linear:
        return None
    low = found[0]
    if not all(_runs_its_forward_alone(part) for part in (base, low.a, low.b, low.dropout)):
        return None
    weight, bias, a, b = _tensors(base, low)
    tensors = [tensor for tensor in (x, weight, bias, a, b) if tensor is not None]
    if not is_plain(*tensors) or is_transformed(*tensors) or len({tensor.device for tensor in tensors}) > 1:
        return None
    if not {tensor.dtype for tensor in tensors} <= {torch.float32, torch.float16, torch.bfloat16}:
        return None
    if not torch.is_autocast_enabled(x.device.type) and not _is_served(layer, tensors[:-2], [a, b]):
        return None
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return low if frozen and a.requires_grad and b.requires_grad and x.dim() > 1 else None


def _is_served(layer: Any, of_layer: list[Tensor], of_adapter: list[Tensor]) -> bool:
    """Whether all have one dtype, or the adapter is in float32 beside a layer in 16 bits, which is PEFT's default."""
    outer, inner = ({tensor.dtype for tensor in tensors} for tensors in (of_layer, of_adapter))
    return len(outer) == 1 and (outer == inner or (inner == {torch.float32} and _casts(layer)))


def _runs_its_forward_alone(module: nn.Module) -> bool:
    return (
        "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and home_of(type(module)) is not None
        and not is_hooked(module)
    )


class _LoraLinear(torch.autograd.Function):
    """With a frozen weight. An adapter of low rank costs little arithmetic: what it costs is the passes over tensors
    of the layer's size, and here its products add to those of the layer in place.

    An adapter in float32 beside a layer in 16 bits has its products in float32. What it adds to is rounded before and
    after, as in PEFT; only the 16-bit input is saved for backward."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):  # type: ignore[override]
        states = x if dropped is None else dropped
        low = states.flatten(0, -2).to(a.dtype) @ a.t()
        result = _add_product(linear(x.flatten(0, -2), weight, bias), low, b.t(), scale)
        ctx.save_for_backward(states, weight, a, b, low)
        ctx.scale, ctx.joined = scale, dropped is None
        return result.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # forward has chosen the dtypes
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Those of `_LoraLinear`."""
    states, weight, a, b, low = ctx.saved_tensors
    rows, grad = states.flatten(0, -2).to(a.dtype), grad.reshape(-1, grad.shape[-1])
    if torch.is_grad_enabled():  # a second derivative goes through it
        low = rows @ a.t()
    wide = grad.to(a.dtype)
    of_low = F.linear(wide, (b * ctx.scale).t().contiguous())
    of_a, of_b = of_low.t() @ rows, ((low * ctx.scale).t() @ wide).t()
    of_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
    of_dropped = None
    if ctx.joined:
        of_x = None if of_x is None else _add_product(of_x, of_low, a)
    elif ctx.needs_input_grad[1]:
        of_dropped = (of_low @ a).view(states.shape)
    return None if of_x is None else of_x.view(states.shape), of_dropped, None, None, of_a, of_b, None


def _add_product(target: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``target + scale * left @ right``, in place if they have one dtype; else the sum is rounded to ``target``'s."""
    return target.to(left.dtype).addmm_(left, right, alpha=scale).to(target.dtype)
