"""``python -m torch_fused metal FILE.metal...``: lists the kernels of Metal files, and checks them for errors."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ..arguments import Failure
from ..cache import CacheError
from .errors import MetalError
from .flatten import flatten
from .host import compile_host
from .lint import CLANG, lint
from .parser import parse
from .program import Kernel, Program


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=Path, metavar="FILE.metal")
    command.add_argument("-I", dest="include_dirs", action="append", type=Path, default=[], help="a folder of headers")
    command.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE", help="define a macro")
    command.add_argument("--no-lint", action="store_true", help=f"do not type-check with {CLANG}")


def run(args: argparse.Namespace) -> int:
    """Prints the kernels and faults of each file. Returns 1 if there are faults, else 0."""
    for path in args.files:
        if not path.is_file():
            raise Failure(f"{path}: no such file; give a .metal file")
    defines = "".join(f"#define {' '.join(define.partition('=')[::2])}\n" for define in args.defines)
    faults = [fault for path in args.files for fault in check(path, args.include_dirs, defines, not args.no_lint)]
    return 1 if faults else 0


def check(path: Path, include_dirs: list[Path], defines: str = "", with_lint: bool = True) -> list[str]:
    """Prints the contents of one file, and returns its faults."""
    try:
        text = defines + flatten(path, include_dirs)
        program = parse(text, path.name)
    except (MetalError, OSError, UnicodeDecodeError) as error:
        return _report(path, str(error).splitlines())
    print(f"{path}: {_count(len(program.kernels), 'kernel')}")
    for line in describe(program):
        print(f"  {line}")
    try:
        compile_host(text, path.name, checked=True)
        faults = []
    except (MetalError, CacheError) as error:
        faults = str(error).splitlines()
    if with_lint and shutil.which(CLANG):
        faults += lint(text, path.name, own=False)
    elif with_lint:
        print(f"  not type-checked: {CLANG} is not installed")
    return _report(path, faults)


def describe(program: Program) -> list[str]:
    """One line per kernel and function constant."""
    lines = [f"{c.type} {c.name}: function constant {c.index}" for c in program.constants]
    return lines + [_kernel(kernel) for kernel in program.kernels]


def _kernel(kernel: Kernel) -> str:
    arguments = [f"{p.index} {p.address_space or 'buffer'} {p.name}" for p in kernel.buffers]
    arguments += [f"threadgroup {p.index} {p.name}" for p in kernel.params if p.kind == "threadgroup"]
    limit = f", at most {kernel.max_threads} threads" if kernel.max_threads else ""
    return f"{kernel.name}({', '.join(arguments)}){limit}"


def _report(path: Path, faults: list[str]) -> list[str]:
    for fault in faults:
        print(fault)
    print(f"{path}: {_count(len(faults), 'fault') if faults else 'no faults'}")
    return faults


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
