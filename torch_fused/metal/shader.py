"""`torch.mps.compile_shader` for CPU tensors too, which run in the emulator."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .emulation import checking
from .flatten import expand
from .host import compile_host
from .parser import parse
from .program import Kernel as Declaration

MAX_THREADS = 1024
MAX_BUFFERS = 31
CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def compile_shader(
    source: str, name: str = "shader.metal", *, constants: Mapping[str | int, bool | int | float] | None = None
) -> Library:
    """The kernels of a Metal source as attributes of a library, as :func:`torch.mps.compile_shader` gives them.

    Called with CPU tensors, a kernel runs in the emulator, under the settings of the :func:`emulate` block around the
    call, or checked and in order outside of one. Called with MPS tensors, it runs on the GPU.

    Args:
        source: Metal text; it may include Metal's headers and those of torch, ``<c10/metal/...>``.
        name: the file that messages name.
        constants: values of the source's function constants, by name or index; for CPU tensors only.

    Returns:
        A :class:`Library`.

    Raises:
        MetalError: the source is not valid: from here what the parser sees, from a kernel's first call on CPU tensors
            what the host's compiler sees.
        ValueError: ``constants`` names none of the source's.

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
    return Library(source, name, dict(constants or {}))


class Library:
    """What :func:`compile_shader` returns: the kernels of a source, each a :class:`Kernel`, as attributes."""

    def __init__(self, source: str, name: str, constants: Mapping[str | int, bool | int | float]) -> None:
        self._source = source
        self._name = name
        self._text = expand(source, name)
        program = parse(self._text, name)
        self._kernels = {kernel.name: kernel for kernel in program.kernels}
        indices: dict[str | int, int] = {c.name: c.index for c in program.constants}
        indices |= {c.index: c.index for c in program.constants}
        unknown = [key for key in constants if key not in indices]
        if unknown:
            raise ValueError(f"{name} has no function constant {unknown[0]!r}; it has {sorted(indices, key=str)}")
        self._constants = {indices[key]: value for key, value in constants.items()}
        # Those without a value that the source does not ask for: no kernel can be made.
        self._missing = [c for c in program.constants if c.index not in self._constants and not c.optional]

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("__") or name not in self._kernels:
            raise AttributeError(f"{self._name} has no kernel {name!r}; it has {sorted(self._kernels)}")
        return Kernel(self, self._kernels[name])

    def __dir__(self) -> list[str]:
        return sorted(self._kernels)

    @functools.cached_property
    def _on_mps(self) -> Any:
        if self._constants:
            raise ValueError(f"{self._name}: torch.mps.compile_shader takes no function constants")
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
        threadgroup_memory: Mapping[int, int] | None = None,
    ) -> None:
        """Runs the kernel.

        Args:
            args: tensors; floats (a 4-byte float), ints (8 bytes), bools and lists of them, bound as constants.
            threads: in up to three dimensions; all elements of the first tensor if not given.
            group_size: threads in a threadgroup, as many dimensions; threadgroups at the edge are smaller.
            arg_casts: the type of numbers, or of those at some positions: "fp16", "bf16", "int32", "int16", "int8" or
                "uint8".
            threadgroup_memory: ``{index: bytes}`` of what arguments with ``[[threadgroup(index)]]`` point to; for CPU
                tensors only.

        Raises:
            RuntimeError: the kernel does something wrong, on CPU tensors; with kernel, file and line.
            ValueError: a tensor is on another device than CPU or MPS, or ``threads`` and ``group_size`` do not fit.
            TypeError: an argument is none of the above.
            MetalError: the host's compiler rejects the source.
            RuntimeError: the cache folder cannot be used; the message names it.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(tensor.device.type == "mps" for tensor in tensors):
            if threadgroup_memory:
                raise ValueError(f"{self._declaration.name}: torch.mps takes no threadgroup_memory")
            kernel = getattr(self._library._on_mps, self._declaration.name)
            kernel(*args, threads=threads, group_size=group_size, arg_casts=arg_casts)
            return
        name = self._declaration.name
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.device.type != "cpu":
                raise ValueError(f"{name}: argument {i} is on {arg.device}: only cpu and mps tensors are taken")
        for constant in self._library._missing:
            raise ValueError(
                f"{name}: function constant {constant.name!r} has no value: "
                f"compile_shader(source, constants={{{constant.name!r}: value}})"
            )
        memory = dict(threadgroup_memory or {})
        if any(index < 0 or index > MAX_BUFFERS or size < 0 for index, size in memory.items()):
            raise ValueError(f"{name}: threadgroup_memory is {{index: bytes}}, got {memory}")
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
        source, constants = self._library._text, tuple(sorted(self._library._constants.items()))
        library = compile_host(source, self._library._name, checking(), constants)
        sizes = [memory.get(index, 0) for index in range(max(memory, default=-1) + 1)]
        torch.ops.torch_fused._emulator_run(os.fsencode(library), name, grid, group, buffers, sizes)


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
