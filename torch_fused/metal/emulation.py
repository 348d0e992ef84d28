"""Runs the ops' Metal kernels on CPU tensors, checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .host import compile_host


@dataclass(frozen=True)
class Traffic:
    """Bytes that one launch moved through one buffer; "distinct" counts every byte once."""

    read: int = 0
    written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch and its traffic, by buffer index; the parameters are not counted."""

    kernel: str
    threadgroups: int
    threads: int
    buffers: dict[int, Traffic]


class Emulation:
    """What :func:`emulate` gives: the launches so far, in checked mode."""

    def __init__(self) -> None:
        self._first = 0
        self.clear()

    @property
    def launches(self) -> list[Launch]:
        kernels, shapes, flat = torch.ops.torch_fused._emulator_launches(self._first)
        buffers: list[dict[int, Traffic]] = [{} for _ in kernels]
        for i in range(0, len(flat), 6):
            launch, buffer, *traffic = flat[i : i + 6]
            buffers[launch][buffer] = Traffic(*traffic)
        return [Launch(kernels[i], *shapes[2 * i : 2 * i + 2], buffers[i]) for i in range(len(kernels))]

    def clear(self) -> None:
        """Forgets the launches so far."""
        self._first += len(torch.ops.torch_fused._emulator_launches(self._first)[0])


@dataclass(frozen=True)
class Settings:
    checked: bool = True
    schedule: str = "sequential"
    seed: int = 0


settings: list[Settings] = [Settings()]  # the innermost emulate() is last; compile_shader follows it


@contextlib.contextmanager
def emulate(
    checked: bool = True,
    schedule: str = "sequential",
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
) -> Iterator[Emulation]:
    """A context inside which CPU tensors of every op run the Metal kernels, backward threads included.

    All kernels are compiled with the host's C++ compiler on entry, and cached per user.

    Args:
        checked: find data races, accesses out of bounds, misaligned or to uninitialised threadgroup memory, and
            divergent barriers. An op then raises RuntimeError with the kernel, the threads and the source line. False
            runs the kernels without checks and several times faster.
        schedule: the order in which threads run: "sequential", "reversed", "random", or "preemptive", which also
            switches threads at random memory accesses.
        seed: of the random schedules.
        sources: flattened Metal text that replaces that of the op sources named, for developing a kernel.

    Example:
        >>> with torch_fused.metal.emulate(schedule="random", seed=1) as run:
        ...     torch_fused.functional.rms_norm(torch.randn(4, 64), (64,))
        >>> run.launches[0].kernel
        'rms_norm_f32_1'
    """
    texts = dict(zip(*torch.ops.torch_fused._metal_sources(), strict=True))
    unknown = set(sources or ()) - set(texts)
    if unknown:
        raise ValueError(f"emulate: sources must be among {sorted(texts)}, got {sorted(unknown)}")
    texts.update(sources or {})
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda name: compile_host(texts[name], f"{name}.metal", checked), texts))
    torch.ops.torch_fused._emulator_begin(list(texts), [str(path) for path in libraries], checked, schedule, seed)
    settings.append(Settings(checked, schedule, seed))
    try:
        yield Emulation()
    finally:
        settings.pop()
        torch.ops.torch_fused._emulator_end()
