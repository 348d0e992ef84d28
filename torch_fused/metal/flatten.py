"""Inlines the headers that a Metal file includes; the result is embedded and passed to compilers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)')
METAL_HEADER = re.compile(r"metal(_\w+)?|simd/simd\.h")
PRAGMA_ONCE = re.compile(r"[ \t]*#[ \t]*pragma[ \t]+once\b")


def flatten(path: str | Path, include_dirs: Sequence[str | Path] = ()) -> str:
    """The text of `path` with every #include "x.metal.h" resolved, next to the including file or in `include_dirs`.

    Each header is taken once, as if it said #pragma once; <metal_stdlib> is left to Apple's compiler. #line directives
    keep base names, so any compiler's message names the original file and line. A header that is not found becomes an
    #error, for a compiler that gets there.
    """
    path = Path(path)
    return expand(
        path.read_text(encoding="utf-8"), path.name, [path.parent, *map(Path, include_dirs)], {path.resolve()}
    )


def expand(text: str, name: str, include_dirs: Sequence[Path] = (), seen: set[Path] | None = None) -> str:
    """`text` with its headers, searched in `include_dirs` and, for c10/metal, in torch's include folder."""
    seen = set() if seen is None else seen
    out = [f'#line 1 "{name}"\n']
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        include = INCLUDE.match(line)
        if include and not METAL_HEADER.fullmatch(include[1] or include[2]):
            header = _find(include[1] or include[2], include_dirs)
            if header is None and include[2]:
                out.append(line + "\n")  # a system header
                continue
            if header is None:
                out.append(f'#error no file "{include[1] or include[2]}" to include\n')
                continue
            if header.resolve() not in seen:
                seen.add(header.resolve())
                dirs = [header.parent, *include_dirs[bool(include_dirs) :]]
                out.append(expand(header.read_text(encoding="utf-8"), header.name, dirs, seen))
            out.append(f'#line {number + 1} "{name}"\n')
        elif PRAGMA_ONCE.match(line):
            out.append("\n")
        else:
            out.append(line + "\n")
    return "".join(out)


def _find(header: str, include_dirs: Sequence[Path]) -> Path | None:
    found = next((folder / header for folder in include_dirs if (folder / header).is_file()), None)
    if found is None and header.startswith("c10/metal/"):
        torch = importlib.util.find_spec("torch")
        path = Path(torch.origin).parent / "include" / header if torch and torch.origin else None
        found = path if path and path.is_file() else None
    return found
