"""Helpers for optimizers with tensors that are sharded over processes (DTensors, as in FSDP2)."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing torch.distributed."""
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """This process's part of the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def as_parameter(grad: Any, param: Any) -> Any:
    """The gradient, with the placements of its parameter.

    Raises:
        ValueError: the parameter has a placement whose parts cannot be updated separately.
    """
    if not is_sharded(param):
        return grad
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"AdamW: parameters must be sharded or replicated, got a DTensor with placements {param.placements}; "
            "redistribute it first"
        )
    if not is_sharded(grad) or grad.device_mesh != param.device_mesh:
        got = f"one on {grad.device_mesh}" if is_sharded(grad) else "one that is not a DTensor"
        raise ValueError(f"AdamW: gradients must be on the mesh of their parameters, {param.device_mesh}, got {got}")
    return grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)


def total_of_shards(pairs: Sequence[tuple[Any, Tensor]], total: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`total`, a sum over the elements of a list, of (parameter, what this process has of it): over all processes.

    Replicas are counted once. The result is on the first device.
    """
    parts: dict[Any, list[Tensor]] = defaultdict(list)
    for param, part in pairs:
        mesh = (param.device_mesh, tuple(_is_spread(p) for p in param.placements)) if is_sharded(param) else None
        parts[mesh, part.device].append(part)
    sums = [
        total(tensors) if mesh is None else _over_mesh(total(tensors), *mesh) for (mesh, _), tensors in parts.items()
    ]
    first = sums[0].device
    return torch.stack([part.to(first, non_blocking=True) for part in sums]).sum()


def _is_spread(placement: Any) -> bool:
    return not placement.is_replicate()


def _over_mesh(own: Tensor, mesh: Any, spread: tuple[bool, ...]) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if is_spread else Replicate() for is_spread in spread]
    return DTensor.from_local(own, mesh, placements, run_check=False).full_tensor()
