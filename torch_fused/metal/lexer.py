"""Tokens of preprocessed Metal source, each with its file and line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

PATTERN = re.compile(
    r"""
    (?P<directive>^[ \t]*\#[^\n]*)
  | (?P<newline>\n)
  | (?P<blank>[ \t\r\f\v]+)
  | (?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<symbol>::|->|\+\+|--|<<=|>>=|<<|>>|[-+*/%&|^<>=!]=|&&|\|\||.)
    """,
    re.VERBOSE | re.MULTILINE,
)
LINE_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')
KEPT_PRAGMA = re.compile(r"\s*#\s*pragma\s+(?:unroll|nounroll)\b")
DECIMAL_LITERAL = re.compile(r"([\d'.]+(?:[eE][+-]?\d+)?)([A-Za-z]*)")
HEX_FLOAT_LITERAL = re.compile(r"(0[xX][\da-fA-F'.]+[pP][+-]?\d+)([A-Za-z]*)")


@dataclass(frozen=True)
class Token:
    kind: str  # "name", "number", "string", "symbol", or "end" for the one after the last
    text: str
    space: str  # what stands in front of it: blanks, newlines, #line and #pragma unroll
    file: str
    line: int

    def float_literal(self) -> tuple[str, str] | None:
        """(digits, suffix) of a floating-point literal, or of an integer with Metal's suffix h or bf."""
        if self.kind != "number":
            return None
        match = HEX_FLOAT_LITERAL.fullmatch(self.text)
        if match:
            return match[1], match[2].lower()
        match = DECIMAL_LITERAL.fullmatch(self.text)
        if not match:
            return None
        digits, suffix = match[1], match[2].lower()
        if any(c in digits for c in ".eE"):
            return digits, suffix
        return (digits + ".0", suffix) if suffix in ("h", "bf", "f") else None


def tokenize(text: str) -> list[Token]:
    """Splits the output of `c++ -E`. The last token has kind "end" and no text, so look-ahead needs no bounds check."""
    tokens = []
    file, line, space = "", 1, ""
    for match in PATTERN.finditer(text):
        kind, part = str(match.lastgroup), match.group()
        if kind == "newline":
            line += 1
            space += part
        elif kind == "blank":
            space += part
        elif kind == "directive":
            marker = LINE_MARKER.match(part)
            if marker and not marker[2].startswith("<"):
                file, line = os.path.basename(marker[2]), int(marker[1]) - 1
                space += f'#line {marker[1]} "{file}"'
            elif KEPT_PRAGMA.match(part):
                space += part
        else:
            tokens.append(Token(kind, part, space, file, line))
            space = ""
    tokens.append(Token("end", "", space, file, line))
    return tokens
