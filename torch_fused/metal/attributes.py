"""Attributes, [[...]]: their names, and where they are allowed."""

from __future__ import annotations

from .program import BUILTINS
from .source import Source

IGNORED = ("likely", "unlikely", "maybe_unused", "nodiscard", "fallthrough", "clang", "gnu", "unroll")
STAGES = ("vertex", "fragment", "object", "mesh", "visible", "intersection", "stage_in", "stitchable", "patch")
OF_KERNELS = ("kernel", "host_name", "max_total_threads_per_threadgroup", *IGNORED)
# Attributes of arguments have no effect on a helper function.
OF_OTHERS = (*IGNORED, *BUILTINS, "buffer", "threadgroup", "function_constant", "host_name")


def at_attribute(source: Source, i: int) -> bool:
    return source.tokens[i].text == "[" and source.tokens[i + 1].text == "["


def read_attribute(source: Source, i: int) -> tuple[dict[str, str], int]:
    """({name: argument}, index after it) of the [[...]] at token i, which is removed in every dialect."""
    close = source.match(i)
    source.dropped.update(range(i, close + 1))
    found = {}
    for piece in source.split(i + 2, close - 1):
        argument = source.text(piece.start + 2, piece.stop - 1)
        found[source.tokens[piece.start].text] = argument.replace('" "', "").replace('""', "").strip('"')
    return found, close + 1


def read_attributes(source: Source, i: int) -> tuple[dict[str, str], int]:
    """The same for all attributes from token i on."""
    attributes: dict[str, str] = {}
    while at_attribute(source, i):
        found, i = read_attribute(source, i)
        attributes.update(found)
    return attributes, i


def read_specifiers(source: Source, i: int) -> tuple[dict[str, str], int]:
    """Attributes from token i on, with `kernel` anywhere among them."""
    attributes: dict[str, str] = {}
    while True:
        if source.tokens[i].text == "kernel":
            attributes["kernel"] = ""
            source.dropped.add(i)
            i += 1
        elif at_attribute(source, i):
            found, i = read_attribute(source, i)
            attributes.update(found)
        elif source.tokens[i].text in ("static", "inline") and "kernel" in attributes:
            source.dropped.add(i)
            i += 1
        else:
            return attributes, i


def check_specifiers(source: Source, i: int, attributes: dict[str, str]) -> None:
    """Adds an error for each attribute that is not allowed in the declaration at token i."""
    known = OF_KERNELS if "kernel" in attributes else OF_OTHERS
    for name in attributes:
        if name in STAGES:
            source.error(i, f"[[{name}]] is not supported: the emulator runs compute kernels")
        elif name == "id":
            source.error(i, "argument buffers ([[id]]) are not supported: bind every buffer")
        elif name not in known:
            source.error(i, f"unknown attribute [[{name}]]")
