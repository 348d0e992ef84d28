"""The dialect that clang type-checks."""

from __future__ import annotations

from .lexer import Token
from .program import ELEMENTS, Program
from .rewrite import header, rewrite, set_function_constants

VECTOR_TYPES = {f"{element}{width}" for element in ELEMENTS for width in (2, 3, 4)} | {"vec"}


def emit_lint(program: Program) -> str:
    """C++ for OpenCL, which has Metal's address spaces under other names; only for type checks."""
    return header("lint.h") + rewrite(program, _make_vectors(program) | set_function_constants(program, {}))


def _make_vectors(program: Program) -> dict[int, str]:
    """float4(a, b) becomes metal::msl_make<float4>(a, b): clang's native vectors have no constructors."""
    tokens = program.tokens
    names = set(VECTOR_TYPES)
    replaced = {}
    for i, token in enumerate(tokens):
        if token.text not in names or token.kind != "name":
            continue
        first = i - 2 if tokens[i - 1].text == "::" else i  # metal::float4
        if tokens[first - 1].text == "=" and tokens[first - 3].text == "using":
            names.add(tokens[first - 2].text)
        last, closes_outer = _end_of_template_name(tokens, i)
        if tokens[last + 1].text == "(" and not closes_outer:
            replaced[first] = f"metal::msl_make<{tokens[first].text}"
            replaced[last] = replaced.get(last, tokens[last].text) + ">"
    return replaced


def _end_of_template_name(tokens: list[Token], i: int) -> tuple[int, bool]:
    """Index of the last token of `name` or `name<...>` at token i; whether a `>>` ends an outer template with it."""
    if tokens[i + 1].text != "<":
        return i, False
    depth = 0
    for j in range(i + 1, len(tokens) - 1):
        depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[j].text, 0)
        if depth <= 0:
            return j, depth < 0
    return i, False
