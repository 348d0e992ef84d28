"""Runs only the C preprocessor on Metal source."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

from .errors import Diagnostics, MetalError

METAL_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<(metal(_\w+)?|simd/simd\.h)>.*$", re.MULTILINE)
UNSUPPORTED_INCLUDE = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]*(<(?:metal_logging|metal_raytracing|metal_tensor|MetalPerformancePrimitives/.*)>).*$",
    re.MULTILINE,
)
DEFINES = {
    "__METAL__": "1",
    "__METAL_VERSION__": "310",
    "__HAVE_BFLOAT__": "1",
    "METAL_FUNC": "inline __attribute__((__always_inline__))",
    "__METAL_MAYBE_FAST_MATH__": "0",
    "__METAL_FAST_MATH__": "1",
    "__METAL_PRECISE_MATH__": "0",
}
LINE_MARKER = re.compile(r'# (\d+) "([^"]*)"')
NON_ASCII = re.compile(r"(\\[uU][\da-f]{4,8})|[^\x00-\x7f]")  # as printed by the preprocessor
MESSAGE = re.compile(r"(.*?):(\d+):(?:\d+:)? (?:fatal )?error: (?:#error )?(.*)")


def compiler() -> list[str]:
    """The host's C++ compiler: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def preprocess(text: str, name: str) -> str:
    """Expands macros and conditionals of `text`, which has its includes inlined except <metal_stdlib>.

    `name` is the file that lines are numbered in until a #line directive says otherwise. The shims stand in for Metal's
    own headers later, so those includes are dropped here.
    """
    macros = [f"-D{macro}={value}" for macro, value in DEFINES.items()]
    command = [*compiler(), "-E", "-x", "c++", "-undef", "-nostdinc", *macros, "-"]
    text = UNSUPPORTED_INCLUDE.sub(r"#error \1 is not supported", text)
    source = f'#line 1 "{name}"\n' + METAL_INCLUDE.sub("", text)
    try:
        result = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    except OSError as error:
        raise MetalError(f"{name}: error: no C++ compiler found to preprocess it: {error}") from None
    messages = result.stderr.decode(errors="replace")
    diagnostics = Diagnostics()
    if result.returncode:
        for match in map(MESSAGE.match, messages.splitlines()):
            if match:
                diagnostics.error(os.path.basename(match[1]), int(match[2]), match[3])
        diagnostics.raise_if_any()
        raise MetalError(f"{name}: error: {messages.strip()}")
    output = result.stdout.decode(errors="replace")
    _reject_non_ascii(output, name, diagnostics)
    diagnostics.raise_if_any()
    return output


def _reject_non_ascii(output: str, name: str, diagnostics: Diagnostics) -> None:
    """Metal allows only ASCII outside comments, which are already removed."""
    number = 0
    for line in output.split("\n"):
        number += 1
        if place := LINE_MARKER.match(line):
            number, name = int(place[1]) - 1, os.path.basename(place[2])
        elif found := NON_ASCII.search(line):
            diagnostics.error(name, number, "non-ASCII character " + (found[1] or ascii(found[0])))
