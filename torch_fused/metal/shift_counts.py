"""Shifts by at least the width of the number, which are undefined in C++ but not in Metal."""

from __future__ import annotations

from .lexer import Token
from .program import Program

SHIFTS = {
    "<<": "<< ::metal::msl_shl <<",
    ">>": ">> ::metal::msl_shr >>",
    "<<=": "<< ::metal::msl_shl_to =",
    ">>=": ">> ::metal::msl_shr_to =",
}


def define_shifts(program: Program) -> dict[int, str]:
    """Lets shifts.h handle the counts. A `>>` after two `<` may close templates, and is kept."""
    tokens = program.tokens
    replaced: dict[int, str] = {}
    opened = [0]  # unclosed `<` in each enclosing bracket
    for i, token in enumerate(tokens):
        if token.kind != "symbol":
            continue
        if token.text in ("(", "[", "{"):
            opened.append(0)
        elif token.text in (")", "]", "}") and len(opened) > 1:
            opened.pop()
        elif token.text == ";":
            opened[-1] = 0
        elif token.text == "<":
            opened[-1] += 1
        elif token.text == ">":
            opened[-1] = max(0, opened[-1] - 1)
        elif token.text == ">>" and opened[-1] >= 2:
            opened[-1] -= 2
        elif token.text in SHIFTS and tokens[i - 1].text != "operator" and not _is_small(tokens, i + 1):
            replaced[i] = SHIFTS[token.text]
    return replaced


def _is_small(tokens: list[Token], i: int) -> bool:
    """Whether the operand at token i is a literal below 32."""
    digits = tokens[i].text.rstrip("uU")
    return digits.isdecimal() and int(digits) < 32 and tokens[i + 1].text not in ("+", "-", "*", "/", "%")
