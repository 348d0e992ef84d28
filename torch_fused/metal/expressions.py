"""The value of an integer expression that an attribute holds, as far as it can be told without a compiler."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

INTEGER = re.compile(r"\b(0[xX][\da-fA-F]+|\d+)[uUlL]*\b")
CAST = re.compile(r"\(\s*(?:unsigned |const )?(?:u?int|unsigned|u?short|u?long|size_t)\s*\)|\bu?int\s*(?=\()")
OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.LShift: lambda a, b: a << b,
    ast.RShift: lambda a, b: a >> b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitAnd: lambda a, b: a & b,
}


def integer(expression: str, names: Mapping[str, str]) -> int | None:
    """The value of `expression`, in which `names` stand for other expressions, or None."""
    return _value(expression, dict(names), 0)


def _value(expression: str, names: dict[str, str], depth: int) -> int | None:
    try:
        text = CAST.sub("", INTEGER.sub(lambda match: str(_literal(match[1])), expression)).strip()
        return _node(ast.parse(text, mode="eval").body, names, depth)
    except (SyntaxError, ValueError, ArithmeticError):
        return None


def _literal(text: str) -> int:
    return int(text, 16 if text[:2] in ("0x", "0X") else 8 if text[0] == "0" else 10)


def _node(node: ast.expr, names: dict[str, str], depth: int) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name) and node.id in names and depth < 8:
        value = _value(names[node.id], names, depth + 1)
        if value is not None:
            return value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_node(node.left, names, depth), _node(node.right, names, depth))
    raise ValueError
