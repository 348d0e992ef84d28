"""CPU loops that are compiled for several instruction sets call nothing that is compiled for the oldest one only."""

import platform
import re
import subprocess
from collections.abc import Iterator

import pytest

from torch_fused import _C

NEWER = re.compile(r"\.arch_x86_64_v[34]")
DISPATCHED = re.compile(r"widen_run|narrow_run")
"""They choose the machine's instructions when they run."""
STANDARD = re.compile(r"std::|@plt|\.cold")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="functions are compiled for several instruction sets on x86-64 Linux only",
)


def calls() -> Iterator[tuple[str, str]]:
    """Pairs of a function and one that it calls."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _C.__file__]
    function = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        called = re.search(r"\t(?:call|jmp) .*?<(.+?)(\+0x[0-9a-f]+)?>$", line)
        if called and called[1] != function:
            yield function, called[1]


def test_loops_are_compiled_for_the_machine():
    """A function that is not inlined into such a loop would be many times slower: its `fma` is a call of libm."""
    found = set(calls())
    loops = {function for function, _ in found if NEWER.search(function)}
    comment = subprocess.run(
        ["readelf", "--string-dump=.comment", _C.__file__], capture_output=True, text=True, check=True
    )
    assert len(found) > 1000 and bool(loops) == ("clang" not in comment.stdout)  # clang builds have no such copies
    for function, called in found:
        if called in ("fma@plt", "fmaf@plt"):
            assert ".default" in function, (function, called)
        if function in loops and not STANDARD.search(called) and not DISPATCHED.search(called):
            assert NEWER.search(called), (function, called)
