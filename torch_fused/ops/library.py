"""Registers the Python side of the ops that the C++ extension defines in `torch.ops.torch_fused`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Each op in plain torch. The op falls back to it if its GPU kernels cannot be built; torch differentiates it where the
# op's own gradient is not enough (common/autograd.h); the tests compare with it.
_references = torch.library.Library("torch_fused_reference", "FRAGMENT")
_ops = torch.library.Library("torch_fused", "IMPL")

COMPOSED: dict[str, tuple[str, ...]] = {}
"""Ops without their own kernel, and the ops that they call."""


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    batched: Callable[..., Any] | None = None,
) -> None:
    """Registers the plain-torch reference and the fake (shapes and dtypes only) of `torch_fused::<name>`.

    `torch.func.vmap` maps `batched` instead of the op if the op has no vmap rule. Ops that write their arguments raise
    under vmap.
    """
    schema = getattr(torch.ops.torch_fused, name).default._schema
    _references.define(str(schema).partition("::")[2])
    _references.impl(name, reference, "CompositeImplicitAutograd")

    def on_one_device(*args: Any, **kwargs: Any) -> Any:
        # If one tensor is on "meta", torch calls the fake without checking the devices of the others.
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        first = None
        for argument, value in named.items():
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                    first = tensor if first is None else first
                    if "meta" in (devices := {first.device.type, tensor.device.type}) and len(devices) > 1:
                        raise RuntimeError(
                            f"{name}: {argument} must be on {first.device} like the tensors before it, "
                            f"got {tensor.device}"
                        )
        return fake(*args, **kwargs)

    torch.library.register_fake(f"torch_fused::{name}", on_one_device)
    if schema.is_mutable:
        refuse_vmap(name)
    elif batched is not None:
        op = getattr(torch.ops.torch_fused, name).default

        def rule(info, in_dims, *args, **kwargs):
            run_first(op, info, in_dims, *args, **kwargs)
            return torch.vmap(partial(batched, **kwargs), in_dims)(*args), 0

        torch.library.register_vmap(f"torch_fused::{name}", rule)


def leading(info, x: Tensor, dim: int | None) -> Tensor:
    """`x` with the batch as the first dimension."""
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def run_first(op: Callable[..., Any], info, in_dims, *args: Any, **kwargs: Any) -> Any:
    """Runs `op` on the first item of a batch (zeros if it is empty) for its checks and the dtype of its results."""

    def first(x: Any, dim: Any) -> Any:
        if not isinstance(dim, int):
            return x
        return x.select(dim, 0) if info.batch_size else x.sum(dim)

    return op(*map(first, args, in_dims), **kwargs)


def refuse_vmap(name: str) -> None:
    """Makes `torch_fused::<name>` raise if `torch.func.vmap` passes it a batched tensor."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{name}: torch.func.vmap cannot batch an op that writes its arguments; call it outside vmap"
        )

    _ops.impl(name, refuse, "FuncTorchBatched")
