"""`torch.mps.compile_shader` that also takes CPU tensors, which run in the emulator."""

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
    """Compiles a Metal source to a library with its kernels as attributes, like :func:`torch.mps.compile_shader`.

    Called with CPU tensors, a kernel runs in the emulator, with the settings of the surrounding :func:`emulate` block;
    without a block, it is checked and threads run in order. Called with MPS tensors, it runs on the GPU.

    Args:
        source: Metal source; it may include Metal's headers and torch's, ``<c10/metal/...>``.
        name: the file name in messages.
        constants: values of the source's function constants, by name or index; only for CPU tensors.

    Returns:
        A :class:`Library`.

    Raises:
        MetalError: the source is not valid. The parser's errors are raised here, those of the host's compiler by a
            kernel's first call on CPU tensors.
        ValueError: the source has no function constant with a name or index in ``constants``.

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
    """The result of :func:`compile_shader`, with each kernel of the source, a :class:`Kernel`, as an attribute."""

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
        # Constants without a value, although the source does not check `is_function_constant_defined`.
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
            raise ValueError(f"{self._name}: torch.mps.compile_shader does not support function constants")
        return torch.mps.compile_shader(self._source)


class Kernel:
    """A kernel function; call it with its buffers in order."""

    def __init__(self, library: Library, declaration: Declaration) -> None:
        self._library = library
        self._declaration = declaration

    @property
    def max_threads_per_threadgroup(self) -> int:
        """1024, or the value of the kernel's attribute ``max_total_threads_per_threadgroup``."""
        return self._declaration.max_threads or MAX_THREADS

    @property
    def thread_execution_width(self) -> int:
        """Threads per SIMD-group: 32."""
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
            args: tensors; or floats (4 bytes), ints (8 bytes), bools and lists of them, which are bound as constants.
            threads: number of threads, in up to three dimensions; default: all elements of the first tensor.
            group_size: threads per threadgroup, in as many dimensions; threadgroups at the edge are smaller.
            arg_casts: the type of all numbers, or position -> type: "fp16", "bf16", "int32", "int16", "int8" or
                "uint8".
            threadgroup_memory: ``{index: bytes}``, the size of ``[[threadgroup(index)]]`` arguments; only for CPU
                tensors.

        Raises:
            RuntimeError: the kernel fails a check on CPU tensors; with kernel, file and line.
            ValueError: a tensor is not on the CPU or MPS, or ``threads`` and ``group_size`` do not fit.
            TypeError: an argument has another type.
            MetalError: the host's compiler rejects the source.
            RuntimeError: the cache folder cannot be used; the message names it.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if any(tensor.device.type == "mps" for tensor in tensors):
            if threadgroup_memory:
                raise ValueError(f"{self._declaration.name}: threadgroup_memory is not supported on MPS")
            kernel = getattr(self._library._on_mps, self._declaration.name)
            kernel(*args, threads=threads, group_size=group_size, arg_casts=arg_casts)
            return
        name = self._declaration.name
        for i, arg in enumerate(args):
            if isinstance(arg, torch.Tensor) and arg.device.type != "cpu":
                raise ValueError(f"{name}: argument {i} must be on cpu or mps, got {arg.device}")
        for constant in self._library._missing:
            raise ValueError(
                f"{name}: function constant {constant.name!r} has no value; pass "
                f"compile_shader(source, constants={{{constant.name!r}: value}})"
            )
        memory = dict(threadgroup_memory or {})
        if any(index < 0 or index > MAX_BUFFERS or size < 0 for index, size in memory.items()):
            raise ValueError(f"{name}: threadgroup_memory must be {{index: bytes}}, got {memory}")
        if threads is None and not tensors:
            raise ValueError(f"{name}: threads is required if no argument is a tensor")
        grid = _dimensions(tensors[0].numel() if threads is None else threads)
        group = _dimensions(
            max(1, min(grid[0], self.max_threads_per_threadgroup)) if group_size is None else group_size
        )
        group += [1] * (len(grid) - len(group) if group_size is None else 0)
        if not 1 <= len(grid) <= 3 or len(group) != len(grid) or min(*grid, *group) < 0:
            raise ValueError(
                f"{name}: threads and group_size must both have 1, 2 or 3 dimensions, got {grid} and {group}"
            )
        if not 1 <= math.prod(group) <= self.max_threads_per_threadgroup:
            limit = self.max_threads_per_threadgroup
            raise ValueError(f"{name}: group_size must be 1 to {limit} threads in total, got {group}")
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
        raise TypeError(f"{kernel}: argument {index} must be a tensor, a number or a list of numbers, got {value!r}")
    if cast is not None and cast not in CASTS:
        raise ValueError(f"{kernel}: arg_casts must be one of {sorted(CASTS)}, got {cast!r}")
    if cast is not None:
        dtype = CASTS[cast]
    elif isinstance(numbers[0], bool):
        dtype = torch.bool
    else:
        dtype = torch.float32 if isinstance(numbers[0], float) else torch.int64
    return torch.tensor(numbers, dtype=dtype)
