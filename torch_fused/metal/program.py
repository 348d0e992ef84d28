"""The result of parsing a Metal source."""

from __future__ import annotations

from dataclasses import dataclass, field

from .lexer import Token

# Kernel arguments supplied by the hardware, with their numbers in the emulator's argument table.
BUILTINS = {
    "thread_position_in_grid": 0,
    "thread_position_in_threadgroup": 1,
    "thread_index_in_threadgroup": 2,
    "threadgroup_position_in_grid": 3,
    "threads_per_threadgroup": 4,
    "dispatch_threads_per_threadgroup": 5,
    "threadgroups_per_grid": 6,
    "threads_per_grid": 7,
    "thread_index_in_simdgroup": 8,
    "simdgroup_index_in_threadgroup": 9,
    "simdgroups_per_threadgroup": 10,
    "dispatch_simdgroups_per_threadgroup": 11,
    "threads_per_simdgroup": 12,
    "thread_execution_width": 12,
    "thread_index_in_quadgroup": 13,
    "quadgroup_index_in_threadgroup": 14,
    "quadgroups_per_threadgroup": 15,
    "dispatch_quadgroups_per_threadgroup": 16,
    "grid_origin": 17,
    "grid_size": 7,
}
CUDA_BUILTINS = 13  # the ones that the CUDA translation supports
MAX_BUFFERS = 31
ELEMENTS = ("float", "half", "bfloat", "int", "uint", "short", "ushort", "char", "uchar", "long", "ulong", "bool")


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel function, in declaration order."""

    name: str
    kind: str  # "buffer", "threadgroup" or "builtin"
    index: int  # of the buffer or the threadgroup memory, or the number in BUILTINS
    address_space: str  # "device", "constant" or "threadgroup"; "" for a builtin, or if a typedef hides it
    is_pointer: bool
    is_reference: bool
    line: int
    condition: str = ""  # the function constant that enables the argument


@dataclass(frozen=True)
class Kernel:
    """One kernel the host can launch: a plain kernel function, or an instantiation of a template."""

    name: str
    function: str  # with its namespaces
    template_args: str  # "<float, 4>", or "" for a plain function
    params: tuple[Parameter, ...]
    max_threads: int | None  # [[max_total_threads_per_threadgroup(n)]]
    file: str
    line: int
    types: tuple[str, ...] | None = None  # of the parameters, in C++, if the function has overloads

    @property
    def buffers(self) -> list[Parameter]:
        """The buffer arguments, sorted by index."""
        return sorted((p for p in self.params if p.kind == "buffer"), key=lambda p: p.index)

    @property
    def symbol(self) -> str:
        """The name as an identifier, the same as in csrc_mps/runtime/emulator/library.cpp."""
        return "".join(c if c.isascii() and (c.isalnum() or c == "_") else f"${ord(c):02x}" for c in self.name)


@dataclass(frozen=True)
class ThreadgroupVariable:
    """A declaration such as `threadgroup float a[32], b;`, tokens `start` to `stop` (the semicolon excluded)."""

    start: int
    stop: int
    type: str
    declarators: tuple[tuple[str, str], ...]  # (name, dimensions): ("a", "[32]"), ("b", "")


@dataclass(frozen=True)
class FunctionConstant:
    """A declaration such as `constant bool flag [[function_constant(0)]];`."""

    name: str
    type: str
    index: int
    token: int  # the index of the name
    optional: bool  # the source checks whether it has a value


@dataclass(frozen=True)
class Program:
    name: str
    tokens: list[Token]
    kernels: list[Kernel]
    threadgroup_variables: list[ThreadgroupVariable]
    attributes: set[int]  # indices of the tokens of [[...]] and of `kernel`
    definitions: list[int]  # index of the return type of each kernel function's definition
    instantiations: list[range]  # tokens of each explicit instantiation of a kernel template
    overloads: list[range] = field(default_factory=list)  # definitions that C++ cannot distinguish from others
    constants: list[FunctionConstant] = field(default_factory=list)
    member_specialisations: list[int] = field(default_factory=list)  # indices of `template <>` in classes
