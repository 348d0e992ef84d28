"""Initialisers that C++ lacks: `uint4 v = {a, b}` leaves zeros, `T a[n] = {[0 ... n - 1] = x}` fills."""

from __future__ import annotations

from .program import ELEMENTS, Program


def complete_initialisers(program: Program) -> dict[int, str]:
    return _short_lists(program) | _filled_arrays(program)


def _short_lists(program: Program) -> dict[int, str]:
    tokens = program.tokens
    replaced: dict[int, str] = {}
    for i in range(len(tokens) - 4):
        if tokens[i].text[:-1] not in ELEMENTS or [t.text for t in tokens[i + 2 : i + 4]] != ["=", "{"]:
            continue
        depth, elements, j = 0, 1, i + 3
        while True:
            depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(tokens[j].text, 0)
            elements += tokens[j].text == "," and depth == 1
            if depth == 0:
                break
            j += 1
        width = int(tokens[i].text[-1])
        if 1 < elements < width and not any(t.text[:-1] in ELEMENTS for t in tokens[i + 4 : j]):
            replaced[j] = ", 0" * (width - elements) + "}"
    return replaced


def _filled_arrays(program: Program) -> dict[int, str]:
    """`T a[n] = {[0 ... n - 1] = x};` becomes `T a[n]; msl_fill(a, x);`."""
    tokens = program.tokens
    replaced: dict[int, str] = {}
    for i in range(len(tokens) - 6):
        if [token.text for token in tokens[i : i + 4]] != ["=", "{", "[", "0"] or tokens[i + 4].text != ".":
            continue
        name, equals, close = i - 1, i + 4, i + 4
        while tokens[name].text == "]":
            while tokens[name].text != "[":
                name -= 1
            name -= 1
        while tokens[equals].text != "=":
            equals += 1
        while tokens[close].text != "}":
            close += 1
        replaced |= dict.fromkeys(range(i, equals + 1), "")
        replaced[i] = f"; msl_fill({tokens[name].text},"
        replaced[close] = ")"
    return replaced
