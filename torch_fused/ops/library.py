"""Registers the Python side of the ops that the C++ extension defines in `torch.ops.torch_fused`."""

from collections.abc import Callable
from typing import Any

import torch

# Each op once more in plain torch: what the op falls back to where its GPU kernels cannot be built, and what the tests
# compare it with.
_references = torch.library.Library("torch_fused_reference", "FRAGMENT")

COMPOSED: dict[str, tuple[str, ...]] = {}
"""Ops that have no kernel of their own, and the ops that they call."""


def register(name: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers the plain-torch reference and the fake (shapes and dtypes only) of `torch_fused::<name>`."""
    schema = getattr(torch.ops.torch_fused, name).default._schema
    _references.define(str(schema).partition("::")[2])
    _references.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"torch_fused::{name}", fake)
