"""Makes one text of a Metal file and the headers it includes: the text that is embedded and given to compilers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import Diagnostics
from .preprocess import reject_non_ascii

INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*"([^"]+)"')
PRAGMA_ONCE = re.compile(r"[ \t]*#[ \t]*pragma[ \t]+once\b")


def flatten(path: str | Path, include_dirs: Sequence[str | Path] = ()) -> str:
    """The text of `path` with every #include "x.metal.h" resolved, beside the including file or in `include_dirs`.

    Each header is taken once, as if it said #pragma once; <metal_stdlib> is left to Apple's compiler. #line directives
    keep base names, so any compiler's message names the original file and line. Raises MetalError.
    """
    diagnostics = Diagnostics()
    text = _flatten(Path(path), [Path(d) for d in include_dirs], set(), diagnostics)
    diagnostics.raise_if_any()
    return text


def _flatten(path: Path, include_dirs: list[Path], seen: set[Path], diagnostics: Diagnostics) -> str:
    seen.add(path.resolve())
    text = path.read_text(encoding="utf-8")
    reject_non_ascii(text, path.name)
    out = [f'#line 1 "{path.name}"\n']
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        include = INCLUDE.match(line)
        if include:
            header = next((d / include[1] for d in [path.parent, *include_dirs] if (d / include[1]).is_file()), None)
            if header is None:
                diagnostics.error(path.name, number, f'no file "{include[1]}" to include')
            elif header.resolve() not in seen:
                out.append(_flatten(header, include_dirs, seen, diagnostics))
            out.append(f'#line {number + 1} "{path.name}"\n')
        elif PRAGMA_ONCE.match(line):
            out.append("\n")
        else:
            out.append(line + "\n")
    return "".join(out)
