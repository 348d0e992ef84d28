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

    def on_one_device(*args: Any, **kwargs: Any) -> Any:
        # With one tensor on "meta" torch calls the fake, whatever the others are on, and takes its results as they are.
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        first = None
        for argument, value in named.items():
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
                    first = tensor if first is None else first
                    if "meta" in (devices := {first.device.type, tensor.device.type}) and len(devices) > 1:
                        raise RuntimeError(
                            f"{name}: {argument} must be on {first.device}, as the tensors before it, "
                            f"got {tensor.device}"
                        )
        return fake(*args, **kwargs)

    torch.library.register_fake(f"torch_fused::{name}", on_one_device)
