"""Evaluates the integer expression of an attribute, as far as possible without a compiler."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

TOKEN = re.compile(
    r"\s*(?:(0[xX][\da-fA-F]+|\d+)[uUlL]*|([A-Za-z_]\w*)|(<<|>>|<=|>=|==|!=|&&|\|\||::|[-+*/%&|^~!<>?:(),]))"
)
# In increasing precedence; division by zero and other operators have no value.
OPERATORS: list[dict[str, Callable[[int, int], int]]] = [
    {"||": lambda a, b: int(bool(a) or bool(b))},
    {"&&": lambda a, b: int(bool(a) and bool(b))},
    {"|": operator.or_},
    {"^": operator.xor},
    {"&": operator.and_},
    {"==": operator.eq, "!=": operator.ne},
    {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge},
    {"<<": operator.lshift, ">>": operator.rshift},
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": lambda a, b: quotient(a, b), "%": lambda a, b: a - b * quotient(a, b)},
]
UNARY: dict[str, Callable[[int], int]] = {
    "-": operator.neg, "+": operator.pos, "~": operator.invert, "!": lambda a: int(not a),
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., int]] = {"min": min, "max": max}
BYTES = {
    "bool": 1, "char": 1, "uchar": 1, "int8_t": 1, "uint8_t": 1, "half": 2, "bfloat": 2, "short": 2, "ushort": 2,
    "int16_t": 2, "uint16_t": 2, "int": 4, "uint": 4, "unsigned": 4, "float": 4, "int32_t": 4, "uint32_t": 4, "long": 8,
    "ulong": 8, "size_t": 8, "ptrdiff_t": 8, "int64_t": 8, "uint64_t": 8,
}  # fmt: skip
MAX_DEPTH = 8  # of names defined by other names


def integer(expression: str, names: Mapping[str, str]) -> int | None:
    """The value of `expression`, where `names` are defined by other expressions, or None."""
    try:
        return _Expression(expression, names, 0).value()
    except (ValueError, ArithmeticError, IndexError):
        return None


def size_of(type_name: str) -> int | None:
    """The size in bytes of a scalar or vector type, or None."""
    if type_name in BYTES:
        return BYTES[type_name]
    element, width = type_name[:-1], type_name[-1:]
    return BYTES[element] * {"2": 2, "3": 4, "4": 4}[width] if element in BYTES and width in ("2", "3", "4") else None


def quotient(a: int, b: int) -> int:
    """Division towards zero, as in C++."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


class _Expression:
    """A recursive descent over C++'s operator precedences. Raises ValueError if there is no value."""

    def __init__(self, text: str, names: Mapping[str, str], depth: int) -> None:
        self.tokens: list[str] = []
        self.names, self.depth = names, depth
        self.at = start = 0
        while text[start:].strip():
            match = TOKEN.match(text, start)
            if not match:
                raise ValueError(text)
            self.tokens.append(match[1] or match[2] or match[3])
            start = match.end()
        self.tokens.append("")

    def take(self, *texts: str) -> str:
        """The next token, if it is one of `texts`, else ""."""
        token = self.tokens[self.at]
        if token not in texts:
            return ""
        self.at += 1
        return token

    def expect(self, text: str) -> None:
        if not self.take(text):
            raise ValueError(text)

    def value(self) -> int:
        result = self.choice()
        if self.tokens[self.at]:
            raise ValueError(self.tokens[self.at])
        return result

    def choice(self) -> int:
        condition = self.binary(0)
        if not self.take("?"):
            return condition
        first = self.choice()
        self.expect(":")
        second = self.choice()
        return first if condition else second

    def binary(self, strength: int) -> int:
        if strength == len(OPERATORS):
            return self.unary()
        left = self.binary(strength + 1)
        while sign := self.take(*OPERATORS[strength]):
            left = int(OPERATORS[strength][sign](left, self.binary(strength + 1)))
        return left

    def unary(self) -> int:
        if sign := self.take(*UNARY):
            return UNARY[sign](self.unary())
        if self.take("sizeof"):
            return self.size()
        if self.take("("):
            inside = self.at
            if self.type_name() and self.take(")"):
                return self.unary()  # a cast
            self.at = inside
            result = self.choice()
            self.expect(")")
            return result
        if self.type_name():  # int(x)
            self.expect("(")
            result = self.choice()
            self.expect(")")
            return result
        return self.operand()

    def type_name(self) -> str:
        """The type at the next token, or ""."""
        words = []
        while word := self.take("const", "unsigned", "signed", *BYTES):
            words.append(word)
        return words[-1] if words else ""

    def size(self) -> int:
        self.expect("(")
        name = self.tokens[self.at]
        self.at += 1
        self.expect(")")
        bytes_ = size_of(self.names.get(name, name).strip())
        if bytes_ is None:
            raise ValueError(name)
        return bytes_

    def operand(self) -> int:
        token = self.tokens[self.at]
        self.at += 1
        if token[:1].isdigit():
            return int(token, 16 if token[:2] in ("0x", "0X") else 8 if token[0] == "0" else 10)
        while self.take("::"):
            token = self.tokens[self.at]
            self.at += 1
        if token in FUNCTIONS and self.take("("):
            arguments = [self.choice()]
            while self.take(","):
                arguments.append(self.choice())
            self.expect(")")
            return int(FUNCTIONS[token](*arguments))
        if token in ("true", "false"):
            return int(token == "true")
        if token not in self.names or self.depth == MAX_DEPTH:
            raise ValueError(token)
        return _Expression(self.names[token], self.names, self.depth + 1).value()
