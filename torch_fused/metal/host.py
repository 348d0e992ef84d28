"""Compiles Metal sources with the host's C++ compiler, for the emulator."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..cache import kept
from .errors import MetalError
from .host_dialect import emit_host
from .parser import parse
from .preprocess import compiler
from .rewrite import INCLUDE

# No contraction: the bits of the source, as on a GPU under safe math. -w: warnings are the lint's work. DWARF 4: what
# addr2line knows best; it asks for lines only, and where variables are would be a fifth of the compiler's time.
FLAGS = shlex.split(
    "-std=c++17 -O1 -g1 -gdwarf-4 -fPIC -shared -w -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti "
    "-fvisibility=hidden -fwrapv -fno-optimize-sibling-calls -fstack-clash-protection "
    "-fsanitize=integer-divide-by-zero -fsigned-char"
)
ERROR = re.compile(r"(.*?:\d+:)(?:\d+:)? (?:fatal )?error: (.*)")
REQUIRED = re.compile(r"(.*?:\d+:)(?:\d+:)?\s+(?:required from|note: in instantiation)")
TRACE = 30  # lines of a compiler's trace that are looked through
WORKERS = 2
LIBRARY = "kernels.so"


def compile_all(sources: dict[str, str], checked: bool) -> dict[str, Path]:
    """The shared object of each Metal text, two compiled at a time. Raises MetalError."""
    with ThreadPoolExecutor(WORKERS) as pool:
        libraries = pool.map(lambda item: compile_host(item[1], f"{item[0]}.metal", checked), sources.items())
        return dict(zip(sources, libraries, strict=True))


@functools.cache
def compile_host(text: str, name: str, checked: bool, constants: tuple[tuple[int, object], ...] = ()) -> Path:
    """The shared object with the kernels of flattened Metal source, from the user's cache if it was compiled before.

    `checked` has every memory access call the emulator; `constants` are the function constants, by index. Raises
    MetalError, or CacheError.
    """
    flags = [*FLAGS, *_hooks(checked), *_machine()]
    digest = _digest(text, name, repr(constants), *flags)
    return kept("emulator", digest, lambda folder: _compile(text, name, constants, flags, folder)) / LIBRARY


@functools.cache
def _machine() -> list[str]:
    """Instructions that convert halves, where the processor has them, and no precision beyond a half's."""
    flags = ["-Xclang", "-ffloat16-excess-precision=none"] if "clang" in _compiler_version() else []
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        f16c = re.search(r"^flags.*\bf16c\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        f16c = None
    return [*(flags or ["-fexcess-precision=16"]), *(["-mf16c"] if f16c else [])]


def _hooks(checked: bool) -> list[str]:
    """Has the compiler call our hooks.h at every access, and leave out the sanitizer's own runtime."""
    checks = ["-DMSL_CHECKED", "-fsanitize=thread,bounds"] if checked else []
    if "clang" in _compiler_version():
        reads = ["-mllvm", "-tsan-instrument-read-before-write"]  # of what is written next, too
        return [*checks, *(reads if checked else []), "-fno-sanitize-link-runtime", "-lm"]
    # Without -fno-tree-sra a vector load of which only the elements are used becomes loads of elements.
    options = ["-fno-var-tracking", *(["-fno-tree-sra"] if checked else [])]
    return [*checks, *options, "-nodefaultlibs", "-lm", "-lc", "-lgcc"]


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
    # The machine and its C library too: several may share a home.
    for part in (*compiler(), _compiler_version(), platform.machine(), *platform.libc_ver(), *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _compile(text: str, name: str, constants: tuple[tuple[int, object], ...], flags: list[str], folder: Path) -> None:
    """Writes the shared object into `folder`."""
    command = [*compiler(), "-I", str(INCLUDE), "-x", "c++", "-", "-x", "none", "-o", LIBRARY, *flags]
    source = emit_host(parse(text, name), dict(constants))
    result = subprocess.run(command, cwd=folder, input=source, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MetalError(f"{name}: the host's compiler rejects it:\n{_errors(result.stderr)}")
    # Loading it computes initialisers: in a process that may die of one.
    load = [sys.executable, "-I", "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(folder / LIBRARY)]
    if subprocess.run(load, capture_output=True, check=False).returncode < 0:
        raise MetalError(f"{name}: error: the initialiser of a constant has no value, such as a division by zero")


def _errors(output: str) -> str:
    """The compiler's errors; of one in our headers, the line of the source that led there."""
    lines = output.splitlines()
    found: dict[str, None] = {}
    for i, line in enumerate(lines):
        if not (match := ERROR.match(line)):
            continue
        place = match[1]
        if str(INCLUDE) in place:  # g++ says before it what asked for it, clang after it
            before, behind = lines[max(i - TRACE, 0) : i][::-1], lines[i + 1 : i + TRACE]
            asked = [m[1] for near in (*before, *behind) if (m := REQUIRED.match(near)) and str(INCLUDE) not in m[1]]
            if not asked and found:
                continue  # more about the error before
            place = asked[0] if asked else place
        found[f"{place} error: {match[2]}"] = None
    return "\n".join(found) or output
