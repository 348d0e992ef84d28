"""Kernel functions: their definitions, and the explicit instantiations of templates."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .arguments import NUMBER, arguments
from .attributes import at_attribute, read_attributes
from .declarations import ADDRESS_SPACES
from .program import Kernel, Parameter
from .source import Source


@dataclass(frozen=True)
class Definition:
    """A kernel function with its body."""

    params: tuple[Parameter, ...]
    types: tuple[str, ...]
    template_params: tuple[tuple[str, str], ...]  # (name, default)
    max_threads: str | None
    start: int


@dataclass(frozen=True)
class Instance:
    """A kernel; its function may be defined later."""

    kernel: Kernel
    names: tuple[str, ...]  # the functions it may refer to, the nearest first
    types: tuple[str, ...] | None  # of its parameters, if they are written
    max_threads: str | None
    token: int


@dataclass
class Kernels:
    """The kernels found so far."""

    source: Source
    functions: dict[str, list[Definition]] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    definitions: list[int] = field(default_factory=list)  # the index of each one's return type
    instantiations: list[range] = field(default_factory=list)
    body: range = range(0)  # of the last definition

    def read(self, start: int, i: int, attributes: dict[str, str], scopes: list[str]) -> int:
        """Parses a kernel with attributes from token `start` and return type at token i; returns the index after it."""
        source = self.source
        before = source.tokens[start - 1].text
        return_type = i
        if source.tokens[i].text == "void":
            i += 1
        elif source.tokens[i].text == "decltype":  # template [[kernel]] decltype(f<float>) f<float>;
            i = source.match(i + 1) + 1
        elif before == "template":  # template [[kernel]] f_type f<float>;
            i = source.after_name(i)
        else:
            source.error(i, "a kernel must return void")
            return i + 1
        found, i = read_attributes(source, i)
        head = attributes | found
        name_end = source.after_name(i)
        function = "".join(source.words(range(i, name_end)))
        i = name_end
        template_args = ""
        if source.tokens[i].text == "<":
            stop = source.after_template_args(i)
            template_args = source.text(i, stop)
            i = stop
        params = range(i + 1, source.match(i)) if source.tokens[i].text == "(" else None
        found, end = read_attributes(source, i if params is None else params.stop + 1)
        head |= found
        qualified = "::".join([*scopes, function])
        file, line = source.tokens[start].file, source.tokens[start].line
        kernel = Kernel(head.get("host_name", qualified), function, template_args, (), None, file, line)
        types = None if params is None else tuple(_type(source, p) for p in source.split(params.start, params.stop))
        names = tuple("::".join([*scopes[:depth], function]) for depth in range(len(scopes), -1, -1))
        instance = Instance(kernel, names, types, head.get("max_total_threads_per_threadgroup"), start)
        if source.tokens[end].text == ";":
            if before == "template":
                self.instances.append(instance)
                self.instantiations.append(range(start - 1, end + 1))
            elif before not in (">", ">>"):
                source.error(start, f"kernel '{function}' is declared without a body")
            return end + 1
        if source.tokens[end].text != "{" or params is None:
            source.error(i, f"expected the body of kernel '{function}'")
            return end + 1
        self._define(instance, qualified, params, before in (">", ">>"), return_type)
        self.body = range(end, source.match(end))
        return end

    def _define(self, instance: Instance, name: str, params: range, is_template: bool, return_type: int) -> None:
        known = self.functions.setdefault(name, [])
        if any(other.types == instance.types for other in known):
            self.source.error(return_type, f"kernel '{instance.kernel.function}' is defined twice")
        definition = Definition(
            arguments(self.source, params.start, params.stop),
            instance.types or (),
            _template_params(self.source, instance.token - 1) if is_template else (),
            instance.max_threads,
            instance.token,
        )
        known.append(definition)
        self.definitions.append(return_type)
        if not is_template:
            self.instances.append(instance)


def _template_params(source: Source, closing: int) -> tuple[tuple[str, str], ...]:
    """(name, default) of the parameters of the `template <...>` whose `>` is token `closing`."""
    i = closing
    while source.tokens[i].text != "template":
        i -= 1
    found = []
    for piece in source.split(i + 2, closing):
        words = source.words(piece)
        equals = words.index("=") if "=" in words else len(words)
        found.append((words[equals - 1], " ".join(words[equals + 1 :])))
    return tuple(found)


def _type(source: Source, piece: range) -> str:
    """The type of a parameter in C++, without its name."""
    stop = next((i for i in piece if at_attribute(source, i) or source.tokens[i].text == "="), piece.stop)
    words = [source.tokens[i].text for i in range(piece.start, stop)]
    last = len(words) - 1
    array = "[" in words
    if array:
        last = words.index("[") - 1
    before = words[last - 1] if last > 0 else "const"
    named = words[last].isidentifier() and (before in ("*", "&", ">") or before.isidentifier())
    if named and before not in (*ADDRESS_SPACES, "const", "volatile") and not NUMBER.fullmatch(words[last]):
        del words[last:]
    text = " ".join("const" if word == "constant" else word for word in words if word not in ADDRESS_SPACES[:1])
    text = re.sub(r"\b(threadgroup|thread)\b", "", text)
    return re.sub(r"\bconst const\b|\bconst(?= \w+ const\b)", "const", text).strip() + (" *" if array else "")
