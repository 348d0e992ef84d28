"""Compiles the host dialect of a Metal program to a library that the emulator loads, cached per user."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from ..cache import cache_dir
from .emit import INCLUDE, emit_host
from .errors import MetalError
from .parser import parse
from .preprocess import compiler

# No contraction: the bits of the source. -fsanitize=thread only instruments; hooks.h takes the calls.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti -fvisibility=hidden -nostdinc++ "
    "-Wno-unknown-pragmas -Wno-attributes"
).split()
CHECKED = ["-fsanitize=thread", "-DMSL_CHECKED"]


def compile_host(text: str, name: str, checked: bool = True) -> Path:
    """The library of flattened Metal source `text`; diagnostics call it `name`.

    Raises MetalError if the source is not Metal that can be compiled.
    """
    code = emit_host(parse(text, name))
    flags = FLAGS + (CHECKED if checked else [])
    key = hashlib.sha256("\0".join([code, *flags, *_environment()]).encode()).hexdigest()[:24]
    library = cache_dir("emulator") / f"{name}-{key}.so"
    if not library.exists():
        _compile(code, flags, name, library)
    return library


def _compile(code: str, flags: list[str], name: str, library: Path) -> None:
    partial = library.with_suffix(f".{os.getpid()}.o")
    shared = library.with_suffix(f".{os.getpid()}.so")
    steps = (
        [*compiler(), *flags, f"-I{INCLUDE}", "-x", "c++", "-c", "-", "-o", str(partial)],
        [*compiler(), "-shared", str(partial), "-o", str(shared), "-lm"],
    )
    try:
        for step in steps:
            result = subprocess.run(step, input=code, capture_output=True, text=True)
            if result.returncode:
                errors = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr]
                raise MetalError(f"{name}: the host compiler rejects the kernel:\n" + "\n".join(errors[:20]))
        shared.rename(library)  # whole or not there: another process may be compiling the same
    finally:
        partial.unlink(missing_ok=True)
        shared.unlink(missing_ok=True)


@cache
def _environment() -> tuple[str, ...]:
    """What a library depends on besides its own text: the shims and the compiler."""
    shims = "".join(path.read_text() for path in sorted(INCLUDE.iterdir()))
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    return shims, version, sys.platform
