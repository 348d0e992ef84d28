"""Navigation in a list of tokens: brackets, template arguments, comma-separated pieces."""

from __future__ import annotations

from .errors import Diagnostics, MetalError
from .lexer import Token

BRACKETS = {"(": ")", "[": "]", "{": "}"}


def token_text(tokens: list[Token]) -> str:
    """The tokens on one line, spaced as in the source."""
    return "".join((" " if t.space and i else "") + t.text for i, t in enumerate(tokens))


class Tokens:
    """A source's tokens. The last one has kind "end", so look-ahead needs no bounds check."""

    def __init__(self, tokens: list[Token], diagnostics: Diagnostics) -> None:
        self.tokens = tokens
        self.diagnostics = diagnostics
        self.closing = self.match_all()

    def error(self, i: int, message: str) -> None:
        self.diagnostics.error(self.tokens[i].file, self.tokens[i].line, message)

    def match_all(self) -> dict[int, int]:
        """{index of each opening bracket: index of the one that closes it}."""
        closing, opened = {}, []
        for i, token in enumerate(self.tokens):
            if token.text in BRACKETS and token.kind == "symbol":
                opened.append(i)
            elif opened and token.text == BRACKETS[self.tokens[opened[-1]].text]:
                closing[opened.pop()] = i
        if opened:
            self.error(opened[0], f"'{self.tokens[opened[0]].text}' is never closed")
            raise MetalError("\n".join(self.diagnostics.lines))
        return closing

    def match(self, i: int) -> int:
        """Index of the bracket that closes the one at token i."""
        return self.closing[i]

    def after_template_args(self, i: int) -> int:
        """Index after the `>` that closes the `<` at token i."""
        depth = 0
        while self.tokens[i].kind != "end":
            text = self.tokens[i].text
            if text in BRACKETS:
                i = self.match(i)
            depth += {"<": 1, ">": -1, ">>": -2}.get(text, 0)
            i += 1
            if depth <= 0:
                break
        return i

    def after_name(self, i: int) -> int:
        """Index after the qualified name at token i, `a::b`."""
        while self.tokens[i + 1].text == "::":
            i += 2
        return i + 1

    def split(self, start: int, stop: int) -> list[range]:
        """The comma-separated, non-empty pieces of tokens start to stop."""
        pieces, begin, i = [], start, start
        while i < stop:
            text = self.tokens[i].text
            if text == ",":
                pieces.append(range(begin, i))
                begin = i + 1
            if text in BRACKETS:
                i = self.match(i) + 1
            elif text == "<":
                i = self.after_template_args(i)
            else:
                i += 1
        pieces.append(range(begin, stop))
        return [piece for piece in pieces if piece]

    def text(self, start: int, stop: int) -> str:
        return token_text(self.tokens[start:stop])

    def words(self, span: range) -> list[str]:
        return [self.tokens[i].text for i in span]
