"""The class of planted bugs, and shared helpers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """Replaces `old` by `new` once in the flattened source; running then fails with `message` at the line with `at`."""

    name: str
    source: str
    old: str
    new: str
    run: Callable[[], object]
    message: str
    file: str
    at: str


BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
RACE = r"data race|uninitialised"
OUTSIDE = r"out-of-bounds|data race|read-only buffer"  # memory outside may belong to another buffer
