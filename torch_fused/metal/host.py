"""Compiles Metal sources with the host's C++ compiler, for the emulator."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..cache import cache_dir
from .emit import INCLUDE, emit_host
from .errors import MetalError
from .parser import parse
from .preprocess import compiler

# No contraction: the bits of the source, as on a GPU under safe math. -w: warnings are the lint's work. DWARF 4: what
# addr2line knows best.
FLAGS = shlex.split(
    "-std=c++17 -O1 -g1 -gdwarf-4 -fPIC -shared -w -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti "
    "-fvisibility=hidden"
)
WORKERS = 2


def compile_all(sources: dict[str, str], checked: bool) -> dict[str, Path]:
    """The shared object of each Metal text, two compiled at a time. Raises MetalError."""
    with ThreadPoolExecutor(WORKERS) as pool:
        libraries = pool.map(lambda item: compile_host(item[1], f"{item[0]}.metal", checked), sources.items())
        return dict(zip(sources, libraries, strict=True))


@functools.cache
def compile_host(text: str, name: str, checked: bool) -> Path:
    """The shared object with the kernels of flattened Metal source, from the user's cache if it was compiled before.

    `checked` has every memory access call the emulator. Raises MetalError.
    """
    flags = [*FLAGS, *_hooks(checked)]
    library = cache_dir("emulator") / _digest(text, name, *flags) / "kernels.so"
    if not library.exists():
        _compile(emit_host(parse(text, name)), name, flags, library)
    return library


def _hooks(checked: bool) -> list[str]:
    """Has the compiler call our hooks.h at every access, and leave out the sanitizer's own runtime."""
    if not checked:
        return ["-lm"]
    if "clang" in _compiler_version():
        reads = ["-mllvm", "-tsan-instrument-read-before-write"]  # of what is written next, too
        return ["-DMSL_CHECKED", "-fsanitize=thread", *reads, "-fno-sanitize-link-runtime", "-lm"]
    # Without -fno-tree-sra a vector load of which only the elements are used becomes loads of elements.
    return ["-DMSL_CHECKED", "-fsanitize=thread", "-fno-tree-sra", "-nodefaultlibs", "-lm", "-lc", "-lgcc"]


@functools.cache
def _compiler_version() -> str:
    command = [*compiler(), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MetalError(f"the emulator needs a C++ compiler, and {command[0]} does not run: {error}") from None


@functools.cache
def _front_end() -> bytes:
    """Everything besides the source that decides what is compiled."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), *sorted(INCLUDE.iterdir())]
    return b"".join(file.read_bytes() for file in files)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256(_front_end())
    for part in (*compiler(), _compiler_version(), *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _compile(text: str, name: str, flags: list[str], library: Path) -> None:
    """Compiles in a folder of its own, then renames it: several processes may do the same at once."""
    folder = Path(tempfile.mkdtemp(dir=library.parent.parent))
    try:
        (folder / "kernels.cpp").write_text(text)
        arguments = ["-I", str(INCLUDE), "-x", "c++", "kernels.cpp", "-x", "none", "-o", library.name, *flags]
        result = subprocess.run([*compiler(), *arguments], cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode:
            raise MetalError(f"{name}: the host's compiler rejects it:\n{_errors(result.stderr)}")
        try:
            os.rename(folder, library.parent)
        except OSError:
            if not library.exists():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _errors(output: str) -> str:
    lines: Iterable[str] = (line for line in output.splitlines() if "error" in line)
    return "\n".join(lines) or output
