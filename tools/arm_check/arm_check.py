"""Runs the CPU kernels' NEON versions on Linux x86-64: cross-compiled for aarch64 and run under qemu.

    python tools/arm_check/arm_check.py [--jobs 2]

The programs in this folder compare the kernels with references in double: conversions of half types, products of
packed rows, the decode step, and the ranking of tokens. The target has no torch: the programs use only the half types
of its headers, and stub/ replaces the rest. Every program is built

- for plain armv8-a, which has no byte dot product instructions,
- for armv8.2-a with these instructions, like Apple's processors and most servers, and
- with clang, a Mac's compiler, for an Apple M1.

The drawn tokens must be the same as on this machine. Then bugs are planted in the sources one by one, and the program
that covers each must fail.

Needs Debian's g++-aarch64-linux-gnu and qemu-user-static, and clang-19. Objects stay in build/arm_check.
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from planted import BUGS, Bug

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc_mps"
BUILD = ROOT / "build/arm_check"
QEMU = "qemu-aarch64-static"
TARGETS = {
    "armv8-a": ["aarch64-linux-gnu-g++", "-march=armv8-a"],
    "armv8.2-a+dotprod": ["aarch64-linux-gnu-g++", "-march=armv8.2-a+dotprod"],
    "apple-m1, clang": ["clang++-19", "--target=aarch64-linux-gnu", "-mcpu=apple-m1", "-Wno-deprecated-declarations"],
}
HOST = ["g++"]
PACKED = ["quantized/cpu/ready_vectors.cpp", "quantized/cpu/baseline.cpp"]
PROGRAMS = {  # and the sources of the extension that each is linked with
    "conversions": ["common/half_runs.cpp"],
    "quantized": PACKED,
    "step": ["decode/step/baseline.cpp", *PACKED],
    "sampling": [],
}
# As setup.py builds the extension; -static, so that qemu needs no libraries of the target.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]


class CheckError(Exception):
    """The check failed; the message says why."""


@dataclass(frozen=True)
class Builder:
    """Builds programs from `sources`, a folder like csrc_mps; rebuilds an object only if its source changes."""

    compiler: list[str]
    sources: Path

    def build(self, program: str) -> Path:
        """The linked program."""
        files = [HERE / f"{program}.cpp", *(self.sources / name for name in PROGRAMS[program])]
        objects = [self.compile(file) for file in files]
        target = objects[0].with_suffix("")
        run([*self.compiler, "-static", *map(str, objects), "-o", str(target), "-pthread"])
        return target

    def compile(self, file: Path) -> Path:
        includes = [f"-I{HERE / 'stub'}", f"-I{self.sources}", f"-I{HERE}", f"-isystem{torch_headers()}"]
        command = [*self.compiler, *FLAGS, *WARNINGS, *includes]
        # The preprocessed text without the folders' names: copies of the sources share objects.
        text = run([*command, "-E", "-P", str(file)])
        key = hashlib.sha256("\0".join([*self.compiler, *FLAGS, *WARNINGS, text]).encode()).hexdigest()[:16]
        target = BUILD / f"{file.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            run([*command, "-c", str(file), "-o", str(partial)])
            partial.rename(target)
        return target


def run(command: list[str]) -> str:
    """The output of the command. Raises CheckError with its messages."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


def torch_headers() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CheckError("torch is not installed; its headers define the half types. make arm-check installs it")
    return str(Path(spec.submodule_search_locations[0]) / "include")


def check_target(target: str, program: str) -> str:
    """Builds and runs a program for a target; returns what it printed."""
    started = time.monotonic()
    printed = run([QEMU, str(Builder(TARGETS[target], SOURCES).build(program))])
    print(f"{target:18} {printed.splitlines()[0]}, {time.monotonic() - started:.0f} s", flush=True)
    return printed


def check_bug(bug: Bug) -> None:
    """Plants the bug in a copy of the sources: the program must fail with a comparison, not a crash."""
    copy = BUILD / "planted" / str(BUGS.index(bug))
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(SOURCES, copy)
    text = (copy / bug.file).read_text()
    if text.count(bug.old) != 1:
        raise CheckError(f"{bug.name}: {bug.file} must have this once: {bug.old}")
    (copy / bug.file).write_text(text.replace(bug.old, bug.new))
    program = Builder(TARGETS[bug.target], copy).build(bug.program)
    result = subprocess.run([QEMU, str(program)], capture_output=True, text=True)
    if result.returncode != 1 or " failed" not in result.stdout:
        raise CheckError(f"planted: {bug.name}: {bug.program} does not notice\n{result.stdout}{result.stderr}")
    print(f"planted: {bug.name}: {bug.program} fails, as expected", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    jobs = parser.parse_args().jobs
    BUILD.mkdir(parents=True, exist_ok=True)
    tools = [QEMU, *HOST, *(command[0] for command in TARGETS.values())]
    missing = sorted({tool for tool in tools if not shutil.which(tool)})
    if missing:
        packages = "apt-get install g++-aarch64-linux-gnu qemu-user-static clang-19"
        print(f"arm-check: {', '.join(missing)} not found: {packages}", file=sys.stderr)
        return 1
    started = time.monotonic()
    try:
        with ThreadPoolExecutor(jobs) as pool:
            # The step takes longest to compile.
            runs = {
                (target, program): pool.submit(check_target, target, program)
                for program in sorted(PROGRAMS, key=lambda name: name != "step")
                for target in TARGETS
            }
            bugs = [pool.submit(check_bug, bug) for bug in BUGS]
            here = pool.submit(lambda: run([str(Builder(HOST, SOURCES).build("sampling"))]))
            for bug in bugs:
                bug.result()
            digests = {name: task.result().splitlines()[-1] for name, task in runs.items() if name[1] == "sampling"}
            if set(digests.values()) != {here.result().splitlines()[-1]}:
                raise CheckError(f"other tokens are drawn than on this machine: {digests}, {here.result()}")
            for task in runs.values():
                task.result()
    except CheckError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"arm-check: passed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
