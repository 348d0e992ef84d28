"""`torch.mps.compile_shader` for CPU tensors too, which run in the emulator."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .emulation import checking
from .host import compile_host
from .parser import parse
from .program import Kernel as Declaration

MAX_THREADS = 1024
CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def compile_shader(source: str, name: str = "shader.metal") -> Library:
    """The kernels of a Metal source as attributes of a library, as :func:`torch.mps.compile_shader` gives them.

    Called with CPU tensors, a kernel runs in the emulator, under the settings of the :func:`emulate` block around the
    call, or checked and in order outside of one. Called with MPS tensors, it runs on the GPU.

    Args:
        source: Metal text; it may include ``<metal_stdlib>`` and nothing else.
        name: the file that messages name.

    Returns:
        A :class:`Library`.

    Raises:
        MetalError: the source is not valid: from here what the parser sees, from a kernel's first call on CPU tensors
            what the host's compiler sees.

    Example:
        >>> library = compile_shader('''
        ... #include <metal_stdlib>
        ... kernel void twice(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) { x[i] *= 2.0f; }
        ... ''')
        >>> x = torch.ones(3)
        >>> library.twice(x)
        >>> x
        tensor([2., 2., 2.])
    """
    return Library(source, name)


class Library:
    """What :func:`compile_shader` returns: the kernels of a source, each a :class:`Kernel`, as attributes."""

    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name
        self._kernels = {kernel.name: kernel for kernel in parse(source, name).kernels}

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__") or name not in self._kernels:
            raise AttributeError(f"{self._name} has no kernel {name!r}; it has {sorted(self._kernels)}")
        return Kernel(self, self._kernels[name])

    def __dir__(self) -> list[str]:
        return sorted(self._kernels)

    @functools.cached_property
    def _on_mps(self) -> Any:
        return torch.mps.compile_shader(self._source)


class Kernel:
    """A kernel function, to be called with its buffers in order."""

    def __init__(self, library: Library, declaration: Declaration) -> None:
        self._library = library
        self._declaration = declaration

    @property
    def max_threads_per_threadgroup(self) -> int:
        """1024, or what the kernel's attribute ``max_total_threads_per_threadgroup`` says."""
        return self._declaration.max_threads or MAX_THREADS

    @property
    def thread_execution_width(self) -> int:
        """Threads in a simdgroup: 32."""
        return 32

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | Mapping[int, str] | None = None,
    ) -> None:
        """Runs the kernel.

        Args:
            args: tensors; floats (a 4-byte float), ints (8 bytes), bools and lists of them, bound as constants.
            threads: in up to three dimensions; all elements of the first tensor if not given.
            group_size: threads in a threadgroup, as many dimensions; threadgroups at the edge are smaller.
            arg_casts: the type of numbers, or of those at some positions: "fp16", "bf16", "int32", "int16", "int8" or
                "uint8".

        Raises:
            RuntimeError: the kernel does something wrong, on CPU tensors; with kernel, file and line.
            ValueError: a tensor is on another device than CPU or MPS, or ``threads`` and ``group_size`` do not fit.
            TypeError: an argument is none of the above.
            MetalError: the host's compiler rejects the source.
            RuntimeError: the cache folder cannot be used; the message names it.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(tensor.device.type == "mps" for tensor in tensors):
            kernel = getattr(self._library._on_mps, self._declaration.name)
            kernel(*args, threads=threads, group_size=group_size, arg_casts=arg_casts)
            return
        name = self._declaration.name
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.device.type != "cpu":
                raise ValueError(f"{name}: argument {i} is on {arg.device}: only cpu and mps tensors are taken")
        if threads is None and not tensors:
            raise ValueError(f"{name}: threads must be given when no argument is a tensor")
        grid = _dimensions(tensors[0].numel() if threads is None else threads)
        group = _dimensions(
            max(1, min(grid[0], self.max_threads_per_threadgroup)) if group_size is None else group_size
        )
        group += [1] * (len(grid) - len(group) if group_size is None else 0)
        if not 1 <= len(grid) <= 3 or len(group) != len(grid) or min(*grid, *group) < 0:
            raise ValueError(
                f"{name}: threads and group_size have the same one to three dimensions, got {grid}, {group}"
            )
        if not 1 <= math.prod(group) <= self.max_threads_per_threadgroup:
            limit = self.max_threads_per_threadgroup
            raise ValueError(f"{name}: a threadgroup has 1 to {limit} threads, got group_size {group}")
        buffers = [_buffer(name, i, arg, arg_casts) for i, arg in enumerate(args)]
        library = compile_host(self._library._source, self._library._name, checking())
        torch.ops.torch_fused._emulator_run(os.fsencode(library), name, grid, group, buffers)


def _dimensions(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _buffer(kernel: str, index: int, value: Any, casts: str | Mapping[int, str] | None) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    cast = casts.get(index) if isinstance(casts, Mapping) else casts
    if not numbers or not all(isinstance(number, (bool, int, float)) for number in numbers):
        raise TypeError(f"{kernel}: argument {index} is a tensor, a number or a list of numbers, got {value!r}")
    if cast is not None and cast not in CASTS:
        raise ValueError(f"{kernel}: arg_casts takes {sorted(CASTS)}, got {cast!r}")
    if cast is not None:
        dtype = CASTS[cast]
    elif isinstance(numbers[0], bool):
        dtype = torch.bool
    else:
        dtype = torch.float32 if isinstance(numbers[0], float) else torch.int64
    return torch.tensor(numbers, dtype=dtype)
