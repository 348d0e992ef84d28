"""What the parser finds in a Metal source."""

from __future__ import annotations

from dataclasses import dataclass

from .lexer import Token

# Kernel arguments the hardware supplies. The numbers are those of the emulator's argument table.
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
}
MAX_BUFFERS = 31


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel function, in the order of its declaration."""

    name: str
    kind: str  # "buffer" or "builtin"
    index: int  # the buffer index, or the number in BUILTINS
    address_space: str  # "device" or "constant"; "" for a builtin
    is_pointer: bool
    is_reference: bool
    line: int


@dataclass(frozen=True)
class Kernel:
    """One kernel the host can launch: a plain kernel function, or an instantiation of a template."""

    name: str
    function: str
    template_args: str  # "<float, 4>", or "" for a plain function
    params: tuple[Parameter, ...]
    max_threads: int | None  # [[max_total_threads_per_threadgroup(n)]]
    file: str
    line: int

    @property
    def buffers(self) -> list[Parameter]:
        """The buffer arguments in increasing buffer index."""
        return sorted((p for p in self.params if p.kind == "buffer"), key=lambda p: p.index)


@dataclass(frozen=True)
class ThreadgroupVariable:
    """A declaration such as `threadgroup float a[32], b;`, tokens `start` to `stop` (the semicolon excluded)."""

    start: int
    stop: int
    type: str
    declarators: tuple[tuple[str, str], ...]  # (name, dimensions): ("a", "[32]"), ("b", "")


@dataclass(frozen=True)
class Program:
    name: str
    tokens: list[Token]
    kernels: list[Kernel]
    threadgroup_variables: list[ThreadgroupVariable]
    attributes: set[int]  # indices of the tokens of [[...]] and of `kernel`
    definitions: list[int]  # index of the return type of each kernel function's definition
    instantiations: list[range]  # tokens of each explicit instantiation of a kernel template


def token_text(tokens: list[Token]) -> str:
    """The tokens on one line, spaced as in the source."""
    return "".join((" " if t.space and i else "") + t.text for i, t in enumerate(tokens))
