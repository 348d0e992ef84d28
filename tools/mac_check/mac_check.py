"""Checks the macOS build on Linux: compiles every source for arm64 macOS and strictly links the module.

    python tools/mac_check/mac_check.py [--torch 2.13.0]

The compiler is ziglang's clang, which brings macOS's C headers. The headers and libraries of torch come from its macOS
wheel. Foundation and Metal are declared in stub/, as far as they are used. A Mac links extensions with
`-undefined dynamic_lookup`, where a missing symbol shows at import only: this link is the stricter one. What it cannot
show is how the module runs, and what the Metal compiler says of a shader.

Needs Debian's lld-19 and llvm-19. Downloads stay in the user's cache, object files in build/mac_check.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from link_stubs import read_system_symbols, write_link_stubs
from toolchain import Torch, cache_directory, fetch_torch, fetch_zig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc_mps"
MACOS = "14.0"  # torch's wheels need it from 2.13 on
TOOLS = ("ld64.lld-19", "llvm-nm-19", "llvm-otool-19")
FLAGS = ["-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fno-sanitize=all", "-DAT_PER_OPERATOR_HEADERS"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wundeclared-selector", "-Werror"]


class CheckError(Exception):
    """The check failed; the message says why."""


class Compiler:
    """Compiles for arm64 macOS against one version of torch; recompiles a file only if it or its headers change."""

    def __init__(self, zig: Path, torch: Torch, objects: Path):
        # Python's headers are from this machine: all systems share them except pyconfig.h, which PyInit does not use.
        headers = [HERE / "stub", *torch.include, Path(sysconfig.get_path("include"))]
        target = ["-target", f"aarch64-macos.{MACOS}", f"-std={torch.standard}"]
        includes = [f"-I{SOURCES}", *(f"-isystem{path}" for path in headers)]
        self.command = [str(zig / "zig"), "c++", *target, *FLAGS, *WARNINGS, *includes]
        self.objects = objects
        zig_cache = str(cache_directory() / "zig")
        self.environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache}

    def compile(self, source: Path) -> Path:
        """The source's object file. Raises CheckError with the compiler's messages."""
        target = self.objects / (str(source.relative_to(ROOT)).replace("/", "-") + ".o")
        dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".stamp")
        command = [*self.command, "-MMD", "-MF", str(dependencies), "-c", str(source), "-o", str(target)]
        if stamp.exists() and stamp.read_text() == fingerprint(command, dependencies):
            return target
        stamp.unlink(missing_ok=True)
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if result.returncode:
            raise CheckError(f"{source.relative_to(ROOT)} does not compile:\n{result.stderr}")
        stamp.write_text(fingerprint(command, dependencies))
        return target

    def compile_all(self, sources: list[Path], jobs: int) -> list[Path]:
        """The object files of all sources. Raises CheckError with the messages for all files that do not compile."""
        with ThreadPoolExecutor(jobs) as pool:
            results = [pool.submit(self.compile, source) for source in sources]
        if errors := [str(result.exception()) for result in results if result.exception()]:
            raise CheckError("\n".join(errors))
        return [result.result() for result in results]


def fingerprint(command: list[str], dependencies: Path) -> str:
    """A hash of everything that affects an object file: the command, the files in its .d file, the stub headers."""
    files = shlex.split(dependencies.read_text().replace("\\\n", " "))[1:] + sorted(map(str, HERE.glob("stub/*/*.h")))
    digest = hashlib.sha256(shlex.join(command).encode())
    for file in files:
        digest.update(Path(file).read_bytes() if Path(file).exists() else b"gone")
    return digest.hexdigest()


def link(objects: list[Path], output: Path, torch: Torch, stubs: Path) -> str:
    """Links the module as on a Mac, but with every symbol resolved. Returns the linker's errors, empty if none."""
    command = ["ld64.lld-19", "-arch", "arm64", "-platform_version", "macos", MACOS, MACOS, "-bundle"]
    command += ["-demangle", "--error-limit=0", "-o", str(output), *map(str, objects)]
    command += [f"-L{torch.lib}", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"]
    command += [f"-L{stubs}", "-lc++", "-lobjc", "-lSystem", f"-F{stubs}", "-framework", "Foundation"]
    for name in sorted(read_system_symbols()["Python"]):
        command += ["-U", name]
    result = subprocess.run(command, capture_output=True, text=True)
    return (result.stderr or f"{command[0]} exited with {result.returncode}") if result.returncode else ""


def sent_messages(binary: Path) -> set[str]:
    """The Objective-C selectors that a binary sends."""
    command = ["llvm-otool-19", "-X", "-v", "-s", "__TEXT", "__objc_methname", str(binary)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def check_messages(module: Path, torch: Torch) -> None:
    """Our own stub headers prove little, so each message must also be sent by torch, or be listed."""
    known = sent_messages(torch.lib / "libtorch_cpu.dylib") | read_system_symbols()["selector"]
    if unknown := sent_messages(module) - known:
        raise CheckError(f"messages that torch does not send and system_symbols.txt does not list: {sorted(unknown)}")


def check_controls(compiler: Compiler, objects: list[Path], torch: Torch, stubs: Path) -> None:
    """Plants two bugs that the check must find."""
    try:
        compiler.compile(HERE / "controls/unknown_selector.mm")
    except CheckError as error:
        if "noSuchLabel" not in str(error):
            raise
    else:
        raise CheckError("an unknown Objective-C selector compiled: the check is void")
    control = compiler.compile(HERE / "controls/unknown_symbol.cpp")
    errors = link([*objects, control], compiler.objects / "control.so", torch, stubs)
    if errors.count("undefined symbol") != 1 or "at::mps::no_such_function" not in errors:
        raise CheckError(f"the link must fail for at::mps::no_such_function alone, its errors are:\n{errors}")


def check(version: str, jobs: int) -> str:
    """Runs the whole check; returns a one-line summary."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        raise CheckError(f"{', '.join(missing)} not found: apt-get install lld-19 llvm-19")
    zig, torch = fetch_zig(), fetch_torch(version)
    output = ROOT / "build/mac_check" / f"torch-{version}"
    output.mkdir(parents=True, exist_ok=True)
    stubs = output / "stubs"
    write_link_stubs(stubs, sorted(torch.lib.glob("*.dylib")), zig)

    compiler = Compiler(zig, torch, output)
    sources = sorted([*SOURCES.rglob("*.cpp"), *SOURCES.rglob("*.mm")])
    objects = compiler.compile_all(sources, jobs)
    module = output / "_C.so"
    if errors := link(objects, module, torch, stubs):
        raise CheckError(f"the module does not link:\n{errors}")
    check_messages(module, torch)
    check_controls(compiler, objects, torch, stubs)
    return f"{len(sources)} sources compile as {torch.standard} and link for macOS {MACOS} and torch {version}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", default="2.13.0", metavar="VERSION", help="torch's version (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="parallel compiler jobs (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print("mac-check:", check(arguments.torch, arguments.jobs))
    except CheckError as error:
        sys.exit(f"mac-check: {error}")


if __name__ == "__main__":
    main()
