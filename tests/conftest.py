"""Every op test runs on each backend of this machine: the CPU, the emulated Metal kernels, a GPU if available."""

import contextlib
import shutil
from dataclasses import dataclass

import pytest
import torch

import torch_fused.metal

# The lint needs Debian's clang-19; .ci/run installs it.
collect_ignore = [] if shutil.which("clang-19") else ["test_metal_lint.py"]
# `make gpu-check` runs these on a machine with a GPU.
collect_ignore += [] if torch.cuda.is_available() else ["test_cuda.py"]


@dataclass(frozen=True)
class Backend:
    """Where an op test runs."""

    name: str

    @property
    def device(self) -> str:
        return "cpu" if self.name == "emulated" else self.name

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        halves = (torch.float32, torch.float16, torch.bfloat16)
        return (*halves, torch.float64) if self.name == "cpu" else halves

    def __str__(self) -> str:
        return self.name


def available_backends() -> list[Backend]:
    names = ["cpu", "emulated"]
    names += ["cuda"] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [Backend(name) for name in names]


@contextlib.contextmanager
def poisoned_memory():
    """New tensors contain NaN until they are written, so that an element that an op misses is visible."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=available_backends(), ids=str)
def backend(request):
    with contextlib.ExitStack() as stack:
        stack.enter_context(poisoned_memory())
        if request.param.name == "emulated":
            stack.enter_context(torch_fused.metal.emulate())
        yield request.param


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """A GPU kernel that cannot be built is an error in tests, not a silent fallback to torch."""
    monkeypatch.setenv("TORCH_FUSED_STRICT", "1")
