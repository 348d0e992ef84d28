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

# No contraction: the same bits as on a GPU with safe math. -w: the lint reports warnings. DWARF 4: what
# addr2line supports best; only lines are needed, and variable locations would take a fifth of the compile time.
FLAGS = shlex.split(
    "-std=c++17 -O1 -g1 -gdwarf-4 -fPIC -shared -w -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti "
    "-fvisibility=hidden -fwrapv -fno-optimize-sibling-calls -fstack-clash-protection "
    "-fsanitize=integer-divide-by-zero -fsigned-char"
)
ERROR = re.compile(r"(.*?:\d+:)(?:\d+:)? (?:fatal )?error: (.*)")
REQUIRED = re.compile(r"(.*?:\d+:)(?:\d+:)?\s+(?:required from|note: in instantiation)")
TRACE = 30  # lines of a compiler's trace that are searched
WORKERS = 2
LIBRARY = "kernels.so"


def compile_all(sources: dict[str, str], checked: bool) -> dict[str, Path]:
    """The shared object of each Metal source, compiling two at a time. Raises MetalError."""
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
    """Flags for half conversion instructions, if the processor has them, without extra precision."""
    flags = ["-Xclang", "-ffloat16-excess-precision=none"] if "clang" in _compiler_version() else []
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        f16c = re.search(r"^flags.*\bf16c\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        f16c = None
    return [*(flags or ["-fexcess-precision=16"]), *(["-mf16c"] if f16c else [])]


def _hooks(checked: bool) -> list[str]:
    """Flags to call our hooks.h at every access, without the sanitizer's runtime."""
    checks = ["-DMSL_CHECKED", "-fsanitize=thread,bounds"] if checked else []
    if "clang" in _compiler_version():
        reads = ["-mllvm", "-tsan-instrument-read-before-write"]  # also before a write
        return [*checks, *(reads if checked else []), "-fno-sanitize-link-runtime", "-lm"]
    # Without -fno-tree-sra, a vector load becomes several element loads.
    options = ["-fno-var-tracking", *(["-fno-tree-sra"] if checked else [])]
    return [*checks, *options, "-nodefaultlibs", "-lm", "-lc", "-lgcc"]


@functools.cache
def _compiler_version() -> str:
    command = [*compiler(), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise MetalError(f"the emulator needs a C++ compiler, but {command[0]} cannot be run: {error}") from None


@functools.cache
def _front_end() -> bytes:
    """Everything besides the source that affects the result of compiling."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), *sorted(INCLUDE.iterdir())]
    return b"".join(file.read_bytes() for file in files)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256(_front_end())
    # Also the machine and its C library, because several machines may share a home folder.
    for part in (*compiler(), _compiler_version(), platform.machine(), *platform.libc_ver(), *parts):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _compile(text: str, name: str, constants: tuple[tuple[int, object], ...], flags: list[str], folder: Path) -> None:
    """Writes the shared object into `folder`."""
    command = [*compiler(), "-I", str(INCLUDE), "-x", "c++", "-", "-x", "none", "-o", LIBRARY, *flags]
    source = emit_host(parse(text, name), dict(constants))
    result = subprocess.run(command, cwd=folder, input=source, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MetalError(f"{name}: errors from the host's compiler:\n{_errors(result.stderr)}")
    # Loading it runs initialisers, which may crash: load it in another process.
    load = [sys.executable, "-I", "-S", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(folder / LIBRARY)]
    if subprocess.run(load, capture_output=True, check=False).returncode < 0:
        raise MetalError(f"{name}: error: the initialiser of a constant has no value, for example a division by zero")


def _errors(output: str) -> str:
    """The compiler's errors; for an error in our headers, the line of the source that led to it."""
    lines = output.splitlines()
    found: dict[str, None] = {}
    for i, line in enumerate(lines):
        if not (match := ERROR.match(line)):
            continue
        place = match[1]
        if str(INCLUDE) in place:  # g++ prints the instantiation before the error, clang after it
            before, behind = lines[max(i - TRACE, 0) : i][::-1], lines[i + 1 : i + TRACE]
            asked = [m[1] for near in (*before, *behind) if (m := REQUIRED.match(near)) and str(INCLUDE) not in m[1]]
            if not asked and found:
                continue  # belongs to the previous error
            place = asked[0] if asked else place
        found[f"{place} error: {match[2]}"] = None
    return "\n".join(found) or output
