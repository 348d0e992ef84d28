"""Variables in threadgroup memory, which the threads of a threadgroup share."""

from __future__ import annotations

from .program import ThreadgroupVariable
from .source import Source
from .tokens import BRACKETS


def starts_threadgroup_variable(source: Source, i: int) -> bool:
    """Whether the `threadgroup` at token i begins a declaration."""
    return source.tokens[i - 1].text in ("{", "}", ";", "") or _is_aligned(source, i)


def _is_aligned(source: Source, i: int) -> bool:
    """Whether `alignas(...)` comes before token i; the emulator aligns enough, so it is dropped."""
    if source.tokens[i - 1].text != ")":
        return False
    opening = next((a for a, b in source.closing.items() if b == i - 1), 0)
    if source.tokens[opening - 1].text != "alignas":
        return False
    source.dropped.update(range(opening - 1, i))
    return True


def read_threadgroup_variable(source: Source, start: int) -> tuple[ThreadgroupVariable | None, int]:
    """`threadgroup T a[n], b;` and the index after it. For a pointer into threadgroup memory, None."""
    i = start + 1
    while source.tokens[i + 1].text not in ("[", ",", ";", "=", "{", "("):
        if source.tokens[i].text in ("*", "&") or source.tokens[i + 1].kind == "end":
            return None, i + 1
        i = source.after_template_args(i + 1) if source.tokens[i + 1].text == "<" else i + 1
    if source.tokens[i].text in ("*", "&") or source.tokens[i + 1].text == "(":
        return None, i + 1
    type_name = source.text(start + 1, i)
    declarators = []
    while True:
        name = source.tokens[i].text
        dimensions = i + 1
        i += 1
        while source.tokens[i].text == "[":
            i = source.match(i) + 1
        declarators.append((name, source.text(dimensions, i)))
        while source.tokens[i].text not in (",", ";") and source.tokens[i].kind != "end":  # without effect
            i = source.match(i) + 1 if source.tokens[i].text in BRACKETS else i + 1
        if source.tokens[i].text != ",":
            return ThreadgroupVariable(start, i, type_name, tuple(declarators)), i
        i += 1
