"""A source while it is parsed: its tokens, and what the parser has found so far."""

from __future__ import annotations

from .errors import Diagnostics
from .lexer import Token
from .tokens import Tokens


class Source(Tokens):
    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens, Diagnostics())
        self.dropped: set[int] = set()  # indices of tokens that every dialect drops, such as attributes
        self.known: dict[str, str] = {}  # {name: expression} of constants
