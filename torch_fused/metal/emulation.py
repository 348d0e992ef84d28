"""Runs the Metal kernels on CPU tensors, checked, on any machine with a C++ compiler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .host import compile_all
from .parser import parse

SCHEDULES = ("sequential", "reversed", "random", "preemptive")


@dataclass(frozen=True)
class Traffic:
    """Bytes that a launch read from and wrote to one of its buffers; all 0 in an unchecked emulation."""

    read: int
    written: int
    distinct_read: int  # a byte read twice counts once
    distinct_written: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch. If buffers share memory, the traffic is counted for the first one."""

    kernel: str
    threadgroups: int
    threads: int  # per threadgroup
    buffers: list[Traffic]  # by Metal's buffer index, including the parameters


class Emulation:
    """The result of :func:`emulate`, with the launches inside the block."""

    def __init__(self, libraries: Mapping[str, Path], checked: bool, schedule: str, seed: int) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"emulate: schedule must be one of {SCHEDULES}, got {schedule!r}")
        self.checked = checked
        paths = [os.fsencode(path) for path in libraries.values()]
        self._number = torch.ops.torch_fused._emulator_begin(list(libraries), paths, checked, schedule, seed)
        self._launches: list[Launch] | None = None  # once the block is closed

    @property
    def launches(self) -> list[Launch]:
        """The launches so far, in order, from all threads; after the block, all launches of the block."""
        if self._launches is not None:
            return self._launches
        kernels, numbers = torch.ops.torch_fused._emulator_launches(self._number)
        return [_launch(*launch) for launch in zip(kernels, numbers, strict=True)]

    def clear(self) -> None:
        """Clears the list of launches."""
        if self._launches is None:
            torch.ops.torch_fused._emulator_clear(self._number)
        else:
            self._launches = []

    def _close(self) -> None:
        self._launches = self.launches
        torch.ops.torch_fused._emulator_end(self._number)


def _launch(kernel: str, numbers: list[int]) -> Launch:
    threadgroups, threads, *traffic = numbers
    return Launch(kernel, threadgroups, threads, [Traffic(*traffic[i : i + 4]) for i in range(0, len(traffic), 4)])


_open: list[Emulation] = []


def active() -> bool:
    """Whether an :func:`emulate` block is active."""
    return bool(_open)


def checking() -> bool:
    """Whether kernels are checked now, in the innermost block or outside any block."""
    return _open[-1].checked if _open else True


@contextlib.contextmanager
def emulate(
    checked: bool = True,
    schedule: str = "sequential",
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
) -> Iterator[Emulation]:
    """Runs the Metal kernels of every op on CPU tensors, in a ``with`` block or as a decorator, on all threads.

    On entry, all sources are compiled by the host's C++ compiler and cached per user.

    Args:
        checked: stop at data races within and across threadgroups, one thread waiting for another, accesses outside a
            tensor's elements, misaligned accesses, reads of uninitialised threadgroup memory and divergent barriers.
            False is several times faster.
        schedule: the thread order: ``"sequential"``, ``"reversed"``, ``"random"``, or ``"preemptive"``, which is random
            and also interrupts threads at memory accesses. A correct kernel gives the same result with each.
        seed: seed of the random schedules.
        sources: ``{name of an op's .metal file: Metal source}``, to use instead of the built-in sources.

    Yields:
        An :class:`Emulation`; its ``launches`` lists every launch and, if checked, its memory traffic.

    Raises:
        MetalError: a source does not compile.
        ValueError: an unknown schedule or source.
        RuntimeError: the cache folder cannot be used; the message names it. An op also raises it if its kernel fails a
            check, with kernel, file and line.

    Example:
        >>> with torch_fused.metal.emulate(schedule="random", seed=1) as run:
        ...     y = torch_fused.functional.rms_norm(torch.randn(4, 64), (64,))
        >>> run.launches[0].kernel
        'rms_norm_f32_1'
    """
    texts = dict(zip(*torch.ops.torch_fused._metal_sources(), strict=True))
    unknown = set(sources or {}) - set(texts)
    if unknown:
        raise ValueError(f"emulate: no source named {min(unknown)!r}; there are {sorted(texts)}")
    for name, text in (sources or {}).items():
        parse(text, f"{name}.metal", own=True)
    libraries = compile_all(texts | dict(sources or {}), checked)
    emulation = Emulation(libraries, checked, schedule, seed)
    _open.append(emulation)
    try:
        yield emulation
    finally:
        _open.remove(emulation)
        emulation._close()
