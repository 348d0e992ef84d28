"""Registers the Python side of the ops that the C++ extension defines in `torch.ops.torch_fused`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Each op once more in plain torch: what the op falls back to where its GPU kernels cannot be built, what torch
# differentiates where the op's own gradient is not enough (common/autograd.h), and what the tests compare it with.
_references = torch.library.Library("torch_fused_reference", "FRAGMENT")
_ops = torch.library.Library("torch_fused", "IMPL")


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    batched: Callable[..., Any] | None = None,
) -> None:
    """Registers the plain-torch reference and the fake (shapes and dtypes only) of `torch_fused::<name>`.

    `batched` is what `torch.func.vmap` maps instead of the op, if the op has no rule of its own. An op that writes its
    arguments refuses.
    """
    schema = getattr(torch.ops.torch_fused, name).default._schema
    _references.define(str(schema).partition("::")[2])
    _references.impl(name, reference, "CompositeImplicitAutograd")
    torch.library.register_fake(f"torch_fused::{name}", fake)
    if schema.is_mutable:
        refuse_vmap(name)
    elif batched is not None:
        op = getattr(torch.ops.torch_fused, name).default

        def rule(info, in_dims, *args, **kwargs):
            run_first(op, info, in_dims, *args, **kwargs)
            return torch.vmap(partial(batched, **kwargs), in_dims)(*args), 0

        torch.library.register_vmap(f"torch_fused::{name}", rule)


def leading(info, x: Tensor, dim: int | None) -> Tensor:
    """`x` with the batch as its first dimension."""
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def run_first(op: Callable[..., Any], info, in_dims, *args: Any, **kwargs: Any) -> Any:
    """`op` on the first of a batch, or on zeros if the batch is empty: for its checks, and the dtype of its results."""

    def first(x: Any, dim: Any) -> Any:
        if not isinstance(dim, int):
            return x
        return x.select(dim, 0) if info.batch_size else x.sum(dim)

    return op(*map(first, args, in_dims), **kwargs)


def refuse_vmap(name: str) -> None:
    """Makes `torch_fused::<name>` raise where `torch.func.vmap` gives it a batched tensor."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{name}: torch.func.vmap cannot batch an op that writes its arguments: call it outside of vmap"
        )

    _ops.impl(name, refuse, "FuncTorchBatched")
