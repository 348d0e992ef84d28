"""What an op is timed on: its operands, who computes it, and the bytes that it must move."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from harness import Call, copy_bandwidth, sets

from torch_fused.testing import NAMES

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape.

    Attributes:
        op: its name; "backward" behind it is its gradient.
        shape: as it is reported.
        nbytes: every operand that must be read and every result, once; 0 if bandwidth says nothing here.
        operands: makes them on a device.
        contenders: who is timed, by name.
        prepare: of a contender and the operands makes what is timed.
        kind: of the values, where they matter.
        once: a call changes what the next one does, so a sample is a single call.
    """

    op: str
    shape: str
    dtype: torch.dtype
    nbytes: int
    operands: Callable[[str], tuple[Any, ...]]
    contenders: dict[str, Callable[..., Any]]
    prepare: Callable[..., Call] = field(default=partial)
    kind: str = ""
    once: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {NAMES[self.dtype]}" + (f" {self.kind}" if self.kind else "")

    def calls(self, contender: str, device: str) -> list[Call]:
        """As many calls on operands of their own as exceed the caches."""
        return [self.prepare(self.contenders[contender], *operands) for operands in _operands(self, device)]


# Only the case at hand keeps its operands, and has its copy timed right beside it.
@lru_cache(maxsize=1)
def _operands(case: Case, device: str) -> list[tuple[Any, ...]]:
    torch.manual_seed(0)
    return [case.operands(device) for _ in range(1 if case.once else sets(case.nbytes, device))]


@lru_cache(maxsize=1)
def copy_beside(case: Case, device: str) -> float:
    """Bytes a second of a copy that moves as many as the case."""
    return copy_bandwidth(case.nbytes, device)


def randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def gradients(of: int) -> Callable[..., Call]:
    """Prepares the gradients of the first `of` operands, for random gradients of the results."""

    def prepare(call: Callable[..., Any], *operands: torch.Tensor) -> Call:
        inputs = [operand.detach().requires_grad_() for operand in operands[:of]]
        with torch.enable_grad():
            results = call(*inputs, *operands[of:])
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.randn_like(result) for result in results]
        return lambda: torch.autograd.grad(results, inputs, grads, retain_graph=True)

    return prepare


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` by torch.compile, compiled again for every shape."""
    return torch.compile(call, dynamic=False)
