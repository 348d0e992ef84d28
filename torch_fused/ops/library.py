"""Registers the Python side of the ops that the C++ extension defines in `torch.ops.torch_fused`."""

from collections.abc import Callable
from typing import Any

import torch

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

    `batched` runs instead of the op where `torch.func.vmap` gives it a batched tensor, if there is no
    `torch.library.register_vmap` rule.
    """
    schema = getattr(torch.ops.torch_fused, name).default._schema
    _references.define(str(schema).partition("::")[2])
    _references.impl(name, reference, "CompositeImplicitAutograd")
    torch.library.register_fake(f"torch_fused::{name}", fake)
    if batched is not None:
        _ops.impl(name, batched, "FuncTorchBatched")
