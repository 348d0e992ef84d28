"""What a planted mistake is, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new`, once, in the flattened source; running then fails with `message` at the line with `at`."""

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
OUTSIDE = r"out-of-bounds|data race|read-only buffer"  # what lies outside may be another buffer
