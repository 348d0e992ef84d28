"""Function constants: declarations with a value that is set when a kernel is created."""

from __future__ import annotations

from .expressions import integer
from .program import FunctionConstant
from .source import Source

SPECIFIERS = ("constant", "const", "constexpr", "static", "inline")


def read_function_constant(source: Source, attribute: int, argument: str) -> FunctionConstant | None:
    """`constant T name [[function_constant(n)]];` with its attribute at token `attribute`; None for an argument."""
    name = attribute - 1
    start = name
    while source.tokens[start - 1].text not in (";", "}", "{", "") and source.tokens[start].text != "constant":
        start -= 1
    if source.tokens[start].text != "constant" or source.tokens[name].kind != "name":
        return None
    index = integer(argument, source.known)
    if index is None:
        source.error(attribute, f"function_constant must be an integer, got '{argument}'")
        return None
    asked = any(
        token.text == "is_function_constant_defined" and source.tokens[i + 2].text == source.tokens[name].text
        for i, token in enumerate(source.tokens)
    )
    type_name = " ".join(word for word in source.words(range(start, name)) if word not in SPECIFIERS)
    return FunctionConstant(source.tokens[name].text, type_name, index, name, asked)
