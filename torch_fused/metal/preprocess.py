"""Runs the C preprocessor, and nothing else of a compiler, over Metal source."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from .errors import Diagnostics, MetalError

METAL_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>.*$", re.MULTILINE)
DEFINES = ("-D__METAL__=1", "-D__METAL_VERSION__=310", "-D__HAVE_BFLOAT__=1")
LINE = re.compile(r'#line (\d+) "(.*)"')
MESSAGE = re.compile(r"(.*?):(\d+):(?:\d+:)? (?:fatal )?error: (.*)")


def compiler() -> list[str]:
    """The host's C++ compiler: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def reject_non_ascii(text: str, name: str) -> None:
    """Apple's compiler takes any bytes in a comment, but the build embeds the text in C++: pure ASCII only."""
    diagnostics = Diagnostics()
    number = 0
    for line in text.split("\n"):
        number += 1
        if place := LINE.match(line):
            number, name = int(place[1]) - 1, place[2]
        elif not line.isascii():
            diagnostics.error(name, number, "non-ASCII character " + ascii(next(c for c in line if not c.isascii())))
    diagnostics.raise_if_any()


def preprocess(text: str, name: str) -> str:
    """Expand macros and conditionals of `text`, whose includes are flattened but for <metal_stdlib>.

    `name` is the file that lines are numbered in until a #line directive says otherwise. The shims stand in for Metal's
    own headers later, so those includes are dropped here.
    """
    reject_non_ascii(text, name)
    command = [*compiler(), "-E", "-x", "c++", "-undef", "-nostdinc", *DEFINES, "-"]
    source = f'#line 1 "{name}"\n' + METAL_INCLUDE.sub("", text)
    try:
        result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MetalError(f"{name}: error: no C++ compiler to preprocess with: {error}") from None
    if result.returncode:
        diagnostics = Diagnostics()
        for match in map(MESSAGE.match, result.stderr.splitlines()):
            if match:
                diagnostics.error(os.path.basename(match[1]), int(match[2]), match[3])
        diagnostics.raise_if_any()
        raise MetalError(f"{name}: error: {result.stderr.strip()}")
    return result.stdout
