"""The functions and constants that a source declares outside functions, with their scopes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .tokens import BRACKETS, Tokens

ADDRESS_SPACES = ("device", "constant", "threadgroup", "thread")
CLASSES = ("struct", "class", "union")


@dataclass(frozen=True)
class Declaration:
    """A declaration: tokens `start` to `stop`; the tokens up to `head` come before its body."""

    scope: tuple[str, ...]  # its namespaces and classes
    start: int
    head: int  # the index of the `{`, or `stop`
    stop: int

    @property
    def of_class(self) -> bool:
        return bool(self.scope) and bool(set(self.scope[-1].split()) & set(CLASSES))

    @property
    def has_body(self) -> bool:
        return self.head < self.stop


def declarations(source: Tokens) -> Iterator[Declaration]:
    """All declarations in namespaces and classes; function bodies are skipped."""
    yield from _scope(source, 0, len(source.tokens) - 1, ())


def _scope(source: Tokens, i: int, stop: int, scope: tuple[str, ...]) -> Iterator[Declaration]:
    start = i
    while i < stop:
        text = source.tokens[i].text
        if text == ";" or (text == ":" and source.tokens[i - 1].text in ("public", "private", "protected")):
            if i > start:
                yield Declaration(scope, start, i, i)
            start = i = i + 1
        elif text == "{":
            close = source.match(i)
            head = [source.tokens[j].text for j in _outside_brackets(source, start, i)]
            if "namespace" in head:
                name = "".join(head[head.index("namespace") + 1 :])
                yield from _scope(source, i + 1, close, (*scope, *name.split("::")) if name else scope)
                start = i = close + 1
            elif any(word in head for word in CLASSES) and "(" not in head and "=" not in head:
                if "<" in head:  # a specialisation, possibly for an address space
                    yield Declaration(scope, start, i, close + 1)
                yield from _scope(source, i + 1, close, (*scope, " ".join(source.words(range(start, i)))))
                i = close + 1  # everything up to the semicolon belongs to it
            elif "(" in head and ("=" not in head or "operator" in head) and head[0] != "enum":
                if source.tokens[i - 1].text in (",", ":"):  # of a constructor's initialisers
                    i = close + 1
                    continue
                yield Declaration(scope, start, i, close + 1)
                start = i = close + 1
            else:
                i = close + 1  # an initialiser or an enumeration
        elif text in BRACKETS:
            i = source.match(i) + 1
        else:
            i += 1


def _outside_brackets(source: Tokens, start: int, stop: int) -> Iterator[int]:
    """The tokens from start to stop outside brackets and template arguments, including opening brackets."""
    i = start
    while i < stop:
        yield i
        text = source.tokens[i].text
        if text in BRACKETS:
            i = source.match(i)
        elif text == "<" and source.tokens[i - 1].text == "template":
            i = source.after_template_args(i) - 1
        i += 1


def constants(source: Tokens, found: list[Declaration]) -> dict[str, str]:
    """{name: expression} of the constants and enumerators among declarations."""
    values: dict[str, str] = {}
    for declaration in found:
        words = source.words(range(declaration.start, declaration.stop))
        if "enum" in words[:2] and "{" in words:
            values |= _enumerators(source, declaration.start + words.index("{"))
        elif "=" in words and not declaration.has_body and {"constant", "constexpr", "const"} & set(words):
            equals = words.index("=")
            if "{" in words[:equals]:
                continue  # a class; its members come one by one
            values[words[equals - 1]] = " ".join(words[equals + 1 :])
    return values


def _enumerators(source: Tokens, opening: int) -> dict[str, str]:
    """The enumerators in the braces at token `opening`; one without a value continues from the previous one."""
    values: dict[str, str] = {}
    following = "0"
    for piece in source.split(opening + 1, source.match(opening)):
        name, *value = source.words(piece)
        values[name] = " ".join(value[1:]) if value[:1] == ["="] else following
        following = f"({values[name]}) + 1"
    return values


def erased(source: Tokens, span: range, attributes: set[int]) -> list[str]:
    """The words of a span without address spaces and attributes, as in C++."""
    words = []
    for i in span:
        text = source.tokens[i].text
        if i in attributes or text in ("device", "threadgroup", "thread"):
            continue
        if text == "constant":
            if "const" in (source.tokens[i - 1].text, source.tokens[i + 1].text):
                continue
            text = "const"
        words.append(text)
    return words


def overloads(source: Tokens, found: list[Declaration], attributes: set[int]) -> list[range]:
    """The definitions that differ from an earlier one only in address spaces: C++ has one function for them.

    Adds an error if their bodies differ.
    """
    first: dict[tuple[str, ...], Declaration] = {}
    repeated = []
    for declaration in found:
        words = source.words(range(declaration.start, declaration.head))
        defaulted = words[-2:] in (["=", "default"], ["=", "delete"])
        if not (declaration.has_body or defaulted) or "namespace" in words:
            continue
        key = (*declaration.scope, "::", *_signature(source, declaration, attributes))
        earlier = first.setdefault(key, declaration)
        same = [source.words(range(d.start, d.stop)) for d in (earlier, declaration)]
        if earlier is declaration or same[0] == same[1]:
            continue
        bodies = [erased(source, range(d.head, d.stop), attributes) for d in (earlier, declaration)]
        if bodies[0] != bodies[1]:
            name, line = _name(source, declaration), source.tokens[earlier.start].line
            source.error(
                declaration.start,
                f"'{name}' differs from the one in line {line} in address spaces only, and in what it does: "
                "such overloads are not supported",
            )
        repeated.append(range(declaration.start, declaration.stop))
    return repeated


def constructor_spaces(source: Tokens, declaration: Declaration) -> list[int]:
    """The address spaces after a constructor's parameters; C++ has one constructor for all."""
    if not declaration.of_class or not re.search(
        rf"\b(struct|class|union) {_name(source, declaration)}\b", declaration.scope[-1]
    ):
        return []
    return [
        i
        for i in _outside_brackets(source, declaration.start, declaration.head)
        if source.tokens[i].text in ADDRESS_SPACES and source.tokens[i - 1].text in (")", "const")
    ]


def _name(source: Tokens, declaration: Declaration) -> str:
    """The function's, or else the last one of the declaration's head."""
    names = [i for i in range(declaration.start, declaration.head) if source.tokens[i].kind == "name"]
    called = [i for i in names if source.tokens[i + 1].text == "(" and source.tokens[i].text != "__attribute__"]
    return source.tokens[(called or names)[0 if called else -1]].text


def _signature(source: Tokens, declaration: Declaration, attributes: set[int]) -> Iterator[str]:
    """What distinguishes a function from its overloads, apart from address spaces."""
    i = declaration.start
    while i < declaration.head:
        if source.tokens[i].text == "__attribute__":
            i = source.match(i + 1) + 1
        elif source.tokens[i].text == "(" and source.tokens[i - 1].kind == "name":
            close = source.match(i)
            yield "("
            for piece in source.split(i + 1, close):
                words = erased(source, piece, attributes)
                if "=" in words:
                    words = words[: words.index("=")]
                if len(words) > 1 and words[-1].isidentifier() and words[-2] != "const":
                    words = words[:-1]
                yield from sorted(set(words) & {"const"})
                yield from (word for word in words if word != "const")
                yield ","
            yield ")"
            i = close + 1
        else:
            yield from erased(source, range(i, i + 1), attributes)
            i += 1
