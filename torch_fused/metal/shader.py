"""`torch.mps.compile_shader` for any device: CPU tensors run in the emulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import emulation
from .host import compile_host
from .parser import parse
from .program import MAX_BUFFERS

_CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
MAX_THREADS = 1024


class Library:
    """The kernels of one Metal source, as attributes."""

    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name
        self._kernels = {kernel.name: kernel for kernel in parse(source, name).kernels}
        self._mps: Any = None

    def __dir__(self) -> list[str]:
        return list(self._kernels)

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_") or name not in self._kernels:
            raise AttributeError(f"{self._name} has no kernel {name!r}; it has {sorted(self._kernels)}")
        return Kernel(self, name)


class Kernel:
    """One kernel, called with tensors and scalars in the order of its buffers."""

    def __init__(self, library: Library, name: str) -> None:
        self._library = library
        self._kernel = library._kernels[name]
        self.max_threads_per_threadgroup = self._kernel.max_threads or MAX_THREADS

    def __call__(
        self,
        *args: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | Mapping[int, str] | None = None,
    ) -> None:
        """Runs the kernel over a grid of `threads`, in threadgroups of `group_size`, one to three numbers each.

        Tensors are bound in place. A float becomes four bytes, an int or bool eight, a list an array; `arg_casts` names
        another type, for all arguments or by index. `threads` defaults to the elements of the first tensor.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if tensors and tensors[0].device.type == "mps":
            return self._on_mps(*args, threads=threads, group_size=group_size, arg_casts=arg_casts)
        if threads is None:
            threads = tensors[0].numel()
        grid = _three(threads)
        group = _three(group_size) if group_size is not None else [min(grid[0], self.max_threads_per_threadgroup), 1, 1]
        count = group[0] * group[1] * group[2]
        if count > self.max_threads_per_threadgroup:
            raise ValueError(
                f"{self._kernel.name}: group_size must be {self.max_threads_per_threadgroup} threads at most, got {count}"
            )
        if len(args) > MAX_BUFFERS:
            raise ValueError(f"{self._kernel.name}: takes {MAX_BUFFERS} arguments at most, got {len(args)}")
        missing = [p.index for p in self._kernel.buffers if p.index >= len(args)]
        if missing:
            raise ValueError(f"{self._kernel.name}: buffers {missing} are not bound, got {len(args)} arguments")
        constants = {p.index for p in self._kernel.buffers if p.address_space == "constant"}
        casts = dict.fromkeys(range(len(args)), arg_casts) if isinstance(arg_casts, str) else dict(arg_casts or {})
        buffers = [_buffer(arg, casts.get(i)) for i, arg in enumerate(args)]
        now = emulation.settings[-1]
        library = compile_host(self._library._source, self._library._name, now.checked)
        torch.ops.torch_fused._emulator_run(
            str(library),
            self._kernel.name,
            grid,
            group,
            buffers,
            [i in constants for i in range(len(args))],
            now.checked,
            now.schedule,
            now.seed,
        )

    def _on_mps(self, *args: Any, **kwargs: Any) -> None:
        library = self._library
        if library._mps is None:
            library._mps = torch.mps.compile_shader(library._source)
        getattr(library._mps, self._kernel.name)(*args, **{k: v for k, v in kwargs.items() if v is not None})


def _three(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values + [1, 1])[:3]


def _buffer(value: Any, cast: str | None) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    values = list(value) if isinstance(value, list | tuple) else [value]
    dtype = _CASTS[cast] if cast else torch.float32 if isinstance(values[0], float) else torch.int64
    return torch.tensor(values, dtype=dtype)


def compile_shader(source: str, name: str = "shader.metal") -> Library:
    """Compiles Metal source; its kernels are attributes that take tensors of any device torch_fused runs on.

    Follows `torch.mps.compile_shader`. CPU tensors run in the checking emulator with the settings of the innermost
    :func:`emulate`; MPS tensors run on the Apple GPU.

    Raises:
        MetalError: the source is not valid; every diagnostic as ``name:line: error: ...``.

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
