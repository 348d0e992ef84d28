"""The arguments of a kernel function, and the indices of its buffers."""

from __future__ import annotations

import re
from dataclasses import replace

from .attributes import IGNORED, STAGES, at_attribute, read_attribute
from .declarations import ADDRESS_SPACES
from .expressions import integer
from .program import BUILTINS, MAX_BUFFERS, Parameter
from .source import Source

NUMBER = re.compile(r"(bool|half|bfloat|float|u?(char|short|int|long)|size_t|unsigned)[234]?|u?int(8|16|32|64)_t")


def arguments(source: Source, start: int, stop: int) -> tuple[Parameter, ...]:
    """The arguments in the parameter list between tokens start and stop."""
    parsed = [_argument(source, piece) for piece in source.split(start, stop)]
    for kind in ("buffer", "threadgroup"):
        parsed = _number(source, source.tokens[start].file, parsed, kind)
    return tuple(parsed)


def _number(source: Source, file: str, parsed: list[Parameter], kind: str) -> list[Parameter]:
    """Assigns free indices to arguments of this kind that have none."""
    explicit: set[int] = set()
    for p in parsed:
        if p.kind == kind and p.index in explicit and not p.condition:
            source.diagnostics.error(file, p.line, f"[[{kind}({p.index})]] is used twice")
        elif p.kind == kind and p.index >= 0:
            explicit.add(p.index)
    free = (index for index in range(MAX_BUFFERS + len(parsed)) if index not in explicit)
    numbered = [replace(p, index=next(free)) if p.kind == kind and p.index < 0 else p for p in parsed]
    for p in numbered:
        if p.kind == kind and p.index >= MAX_BUFFERS:
            message = f"{kind} index of '{p.name}' must be 0 to {MAX_BUFFERS - 1}, got {p.index}"
            source.diagnostics.error(file, p.line, message)
    return numbered


def _argument(source: Source, piece: range) -> Parameter:
    """One argument. A buffer without an index gets -1."""
    attributes: dict[str, str] = {}
    words = []  # outside attributes and template arguments
    i = piece.start
    while i < piece.stop:
        if at_attribute(source, i):
            found, i = read_attribute(source, i)
            attributes.update(found)
        elif source.tokens[i].text == "<":
            i = source.after_template_args(i)
        else:
            words.append(source.tokens[i].text)
            i += 1
    is_array = "[" in words
    name = words[words.index("[") - 1] if is_array else words[-1]
    is_pointer, is_reference = "*" in words or is_array, "&" in words
    kind, index, condition = "buffer", -1, ""
    for attribute, argument in attributes.items():
        if attribute in ("buffer", "threadgroup"):
            kind, value = attribute, integer(argument, source.known)
            if value is None:
                source.error(piece.start, f"{kind} index of '{name}' must be an integer, got '{argument}'")
            else:
                index = value
        elif attribute in BUILTINS:
            kind, index = "builtin", BUILTINS[attribute]
        elif attribute == "function_constant":
            condition = argument
        elif attribute in STAGES:
            source.error(piece.start, f"[[{attribute}]] is not supported: the emulator runs compute kernels")
        elif attribute not in IGNORED:
            source.error(piece.start, f"unknown attribute [[{attribute}]] of kernel argument '{name}'")
    address_space = next((word for word in words if word in ADDRESS_SPACES), "")
    if address_space == "threadgroup" and kind == "buffer":
        kind = "threadgroup"
    line = source.tokens[piece.start].line
    parameter = Parameter(name, kind, index, address_space, is_pointer, is_reference, line, condition)
    _check(source, piece.start, parameter, words, bool(attributes))
    return parameter


def _check(source: Source, i: int, p: Parameter, words: list[str], has_attributes: bool) -> None:
    if p.kind == "builtin":
        return
    refers = p.is_pointer or p.is_reference
    is_number = any(NUMBER.fullmatch(word) for word in words[:-1])
    if refers and p.address_space not in ("device", "constant", "threadgroup"):
        got = f", not {p.address_space}" if p.address_space else ""
        source.error(i, f"kernel argument '{p.name}' must point to device or constant memory{got}")
    elif is_number and not refers and not has_attributes:
        source.error(i, f"kernel argument '{p.name}' needs an attribute such as [[thread_position_in_grid]]")
    elif is_number and not refers:
        source.error(i, f"kernel argument '{p.name}' with [[{p.kind}]] must be a pointer or a reference")
