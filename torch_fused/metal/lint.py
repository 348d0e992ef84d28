"""Type-checks Metal kernels with clang-19 as C++ for OpenCL, and reports what Apple's compiler would reject.

python -m metal.lint FILE.metal...        with torch_fused/ on PYTHONPATH; needs no torch
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import Diagnostics, MetalError
from .flatten import flatten
from .lint_dialect import emit_lint
from .parser import parse
from .program import Program

CLANG = "clang-19"
OPTIONS = shlex.split(
    """-x clcpp -cl-std=clc++2021 -target x86_64-linux-gnu -cl-no-stdinc
    -Xclang -cl-ext=-cl_khr_fp64,-__opencl_c_fp64 -Xclang -ast-dump=json -fsyntax-only
    -fno-caret-diagnostics -fno-elide-type -ferror-limit=0 -Wno-everything -Werror=vla"""
)
MESSAGE = re.compile(r"(.*?):(\d+):\d+: (?:fatal )?error: (.*)")
SHIM = "lint.h"
ADDRESS_SPACE = re.compile(r"__(global|local|private|constant)\b")
METAL_NAMES = {"global": "device", "local": "threadgroup", "private": "thread", "constant": "constant"}
FUNCTION_NODES = {"FunctionDecl", "CXXMethodDecl"}
TYPED_NODES = FUNCTION_NODES | {"VarDecl", "ParmVarDecl", "FieldDecl", "TypeAliasDecl", "TypedefDecl"}
CAST_NODES = {"CStyleCastExpr", "CXXReinterpretCastExpr"}


def lint(text: str, name: str = "shader.metal", own: bool = True) -> list[str]:
    """The errors in flattened Metal source, each `file.metal:line: error: ...`; empty if there are none.

    `own` also checks this project's rules and clang's types; without it, only address spaces, recursion, lambda
    expressions and static variables are checked. Raises MetalError if clang-19 is missing.
    """
    try:
        program = parse(text, name, own=own)
    except MetalError as error:
        return str(error).splitlines()
    diagnostics = Diagnostics()
    if own:
        _check_literals(program, diagnostics)
    typed = diagnostics if own else Diagnostics()
    tree = _type_check(emit_lint(program), typed)
    if tree:
        _check_tree(tree, diagnostics)
    if not own:  # other code may use Metal that clang's dialect lacks: keep only errors about address spaces
        diagnostics.lines += [line for line in typed.lines if "address space" in line and "initialized" not in line]
    in_metal = (ADDRESS_SPACE.sub(lambda word: METAL_NAMES[word[1]], line) for line in diagnostics.lines)
    return list(dict.fromkeys(in_metal))


def _check_literals(program: Program, diagnostics: Diagnostics) -> None:
    """An unsuffixed literal is a float in Metal and a double in C++, which selects other overloads."""
    for token in program.tokens:
        literal = token.float_literal()
        if literal and not literal[1]:
            message = f"literal {token.text} has no suffix: write {token.text}f"
            diagnostics.error(token.file, token.line, message)


def _type_check(source: str, diagnostics: Diagnostics) -> dict[str, Any] | None:
    """Clang's syntax tree, as JSON."""
    command = [CLANG, *OPTIONS, "-"]
    try:
        result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MetalError(f"the lint needs {CLANG}: apt-get install {CLANG}") from None
    for match in map(MESSAGE.match, result.stderr.splitlines()):
        if match:
            diagnostics.error(os.path.basename(match[1]), int(match[2]), match[3].replace("msl_", ""))
    return json.loads(result.stdout) if result.stdout else None


# Rules that clang's dialect lacks, checked on its tree


def _check_tree(tree: dict[str, Any], diagnostics: Diagnostics) -> None:
    calls: dict[str, set[str]] = {}
    functions: dict[str, tuple[str, str, int]] = {}
    for node, function, file, line in _Walk().nodes(tree):
        if file == SHIM:
            continue
        if node["kind"] in FUNCTION_NODES:
            functions[node["id"]] = (node.get("name", ""), file, line)
        called = node.get("referencedDecl", {}).get("id") or node.get("referencedMemberDecl")
        if function and called:
            calls.setdefault(function, set()).add(called)
        if not node.get("isImplicit"):
            message = _wrong_type(node)
            if message:
                diagnostics.error(file, line, message)
    for identifier, (name, file, line) in functions.items():
        if identifier in _reachable(calls, identifier):
            diagnostics.error(file, line, f"recursive call of '{name}' is not supported in Metal")


def _wrong_type(node: dict[str, Any]) -> str | None:
    kind, name, type_name = node["kind"], node.get("name", "cast"), node.get("type", {}).get("qualType", "")
    if kind == "LambdaExpr":
        return "lambda expressions are not supported in Metal 3.1"
    if kind == "VarDecl" and re.match("(const |volatile )*__global ", type_name) and not re.search("[*&]", type_name):
        return f"program-scope or static variable '{name}' must be in the constant address space"
    declared = type_name.split("(")[0] if kind in FUNCTION_NODES else type_name
    if kind in TYPED_NODES | CAST_NODES and _lacks_address_space(declared):
        return f"pointer or reference without an address space: {name} '{type_name}'"
    return None


def _lacks_address_space(type_name: str) -> bool:
    """In `__global float *__private`, the words before each * or & name the space that it points to."""
    without_arguments = type_name
    while "<" in without_arguments:
        shorter = re.sub(r"<[^<>]*>", "", without_arguments)
        if shorter == without_arguments:
            break
        without_arguments = shorter
    pointed = re.split(r"[*&]+", re.sub(r"\[[^\]]*\]", "", without_arguments))[:-1]
    return any(not ADDRESS_SPACE.search(part) for part in pointed)


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for called in calls.get(todo.pop(), ()):
            if called not in found:
                found.add(called)
                todo.append(called)
    return found


class _Walk:
    """The nodes of clang's tree with their locations. Clang writes a file or line only if it changes."""

    def __init__(self) -> None:
        self.file, self.line = "", 0

    def nodes(
        self, node: dict[str, Any], function: str | None = None, written: bool = True
    ) -> Iterator[tuple[dict[str, Any], str | None, str, int]]:
        """(node, id of its function, file, line) of explicit nodes, depth first."""
        place = self.locate(node)
        kind = node.get("kind", "")
        written = written and not (node.get("isImplicit") and kind.startswith("CXX"))
        if written and kind:
            yield node, function, *place
        if kind in FUNCTION_NODES:
            function = node["id"]
        for child in node.get("inner", ()):
            yield from self.nodes(child, function, written)

    def locate(self, node: dict[str, Any]) -> tuple[str, int]:
        span = node.get("range", {})
        places = [self.update(place) for place in (node.get("loc"), span.get("begin"), span.get("end")) if place]
        return places[0] if places else (self.file, self.line)

    def update(self, place: dict[str, Any]) -> tuple[str, int]:
        for part in (place["spellingLoc"], place["expansionLoc"]) if "expansionLoc" in place else (place,):
            self.file = os.path.basename(part.get("presumedFile") or part.get("file") or self.file)
            self.line = part.get("presumedLine") or part.get("line") or self.line
        return self.file, self.line


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="metal.lint", description="Check Metal kernels without a Mac.")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE.metal")
    command.add_argument("-I", dest="include_dirs", action="append", type=Path, default=[], help="where headers are")
    options = command.parse_args(arguments)
    errors = []
    for path in options.files:
        try:
            errors += lint(flatten(path, [*options.include_dirs, path.parent.parent]), path.name)
        except (MetalError, OSError) as error:
            errors.append(str(error))
    print("\n".join(errors) or f"{len(options.files)} Metal files are clean")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
