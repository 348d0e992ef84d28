"""Finds the kernels of a Metal source, their arguments and their threadgroup variables, without a Metal compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import Diagnostics, MetalError
from .lexer import Token, tokenize
from .preprocess import preprocess
from .program import BUILTINS, MAX_BUFFERS, Kernel, Parameter, Program, ThreadgroupVariable, token_text
from .rules import check_words

ADDRESS_SPACES = ("device", "constant", "threadgroup", "thread")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
IGNORED_ATTRIBUTES = ("likely", "unlikely", "maybe_unused", "nodiscard", "fallthrough")


def parse(text: str, name: str = "shader.metal") -> Program:
    """Preprocess and parse flattened Metal source.

    `name` numbers the lines that no #line directive names. Raises MetalError naming everything that is wrong.
    """
    return _Parser(name, tokenize(preprocess(text, name))).parse()


@dataclass(frozen=True)
class _Function:
    params: tuple[Parameter, ...]
    max_threads: int | None


class _Parser:
    def __init__(self, name: str, tokens: list[Token]) -> None:
        self.name = name
        self.tokens = tokens
        self.diagnostics = Diagnostics()
        self.functions: dict[str, _Function] = {}
        self.instances: list[Kernel] = []  # without params until every function is known
        self.threadgroup_variables: list[ThreadgroupVariable] = []
        self.attribute_tokens: set[int] = set()
        self.definitions: list[int] = []
        self.instantiations: list[range] = []
        self.kernel_body = range(0)

    def parse(self) -> Program:
        check_words(self.tokens, self.diagnostics)
        position = 0
        while self.tokens[position].kind != "end":
            position = self.step(position)
        kernels = self.resolve_instances()
        self.diagnostics.raise_if_any()
        return Program(
            self.name,
            self.tokens,
            kernels,
            self.threadgroup_variables,
            self.attribute_tokens,
            self.definitions,
            self.instantiations,
        )

    def step(self, i: int) -> int:
        """Parse what starts at token i; returns where to go on."""
        if self.at_attribute(i) or self.tokens[i].text == "kernel":
            return self.attributed_declaration(i)
        if self.tokens[i].text == "threadgroup" and self.tokens[i - 1].text in ("{", "}", ";", ""):
            return self.threadgroup_declaration(i)
        return i + 1

    def error(self, i: int, message: str) -> None:
        self.diagnostics.error(self.tokens[i].file, self.tokens[i].line, message)

    # Brackets

    def match(self, i: int) -> int:
        """Index of the bracket that closes the one at token i."""
        opening = self.tokens[i].text
        closing = BRACKETS[opening]
        depth = 0
        for j in range(i, len(self.tokens)):
            if self.tokens[j].text == opening:
                depth += 1
            elif self.tokens[j].text == closing:
                depth -= 1
                if depth == 0:
                    return j
        self.error(i, f"'{opening}' is never closed")
        raise MetalError("\n".join(self.diagnostics.lines))

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

    # Attributes

    def at_attribute(self, i: int) -> bool:
        return self.tokens[i].text == "[" and self.tokens[i + 1].text == "["

    def attribute(self, i: int) -> tuple[dict[str, str], int]:
        """({name: argument}, index after it) of the [[...]] at token i, which no dialect keeps."""
        close = self.match(i)
        self.attribute_tokens.update(range(i, close + 1))
        found = {}
        for piece in self.split(i + 2, close - 1):
            argument = self.text(piece.start + 2, piece.stop - 1)
            found[self.tokens[piece.start].text] = argument.replace('" "', "").replace('""', "").strip('"')
        return found, close + 1

    def attributed_declaration(self, start: int) -> int:
        """`kernel` and attributes in any order; if they make a kernel, its head too."""
        attributes: dict[str, str] = {}
        i = start
        while True:
            if self.tokens[i].text == "kernel":
                attributes["kernel"] = ""
                self.attribute_tokens.add(i)
                i += 1
            elif self.at_attribute(i):
                found, i = self.attribute(i)
                attributes.update(found)
            else:
                break
        is_kernel = "kernel" in attributes
        known = ("kernel", "host_name", "max_total_threads_per_threadgroup") if is_kernel else IGNORED_ATTRIBUTES
        for name in attributes:
            if name == "function_constant":
                self.error(start, "function constants are not supported: use a template or a parameter")
            elif name not in known:
                self.error(start, f"unknown attribute [[{name}]]")
        return self.kernel(start, i, attributes) if is_kernel else i

    # Kernels

    def kernel(self, start: int, i: int, attributes: dict[str, str]) -> int:
        """A kernel's definition or explicit instantiation, whose return type is token i."""
        return_type = i
        if self.tokens[i].text == "decltype":  # template [[kernel]] decltype(f<float>) f<float>;
            i = self.match(i + 1)
        elif self.tokens[i].text != "void":
            self.error(i, "a kernel must return void")
            return i + 1
        function = self.tokens[i + 1].text
        i += 2
        template_args = ""
        if self.tokens[i].text == "<":
            stop = self.after_template_args(i)
            template_args = self.text(i, stop)
            i = stop
        end = self.match(i) + 1 if self.tokens[i].text == "(" else i
        instance = Kernel(
            name=attributes.get("host_name", function),
            function=function,
            template_args=template_args,
            params=(),
            max_threads=self.max_threads(start, attributes),
            file=self.tokens[start].file,
            line=self.tokens[start].line,
        )
        if self.tokens[end].text == ";":
            if self.tokens[start - 1].text != "template":
                self.error(start, f"kernel '{function}' is declared without a body")
                return end + 1
            self.instances.append(instance)
            self.instantiations.append(range(start - 1, end + 1))
        elif self.tokens[end].text == "{":
            if function in self.functions:
                self.error(return_type, f"kernel '{function}' is defined twice")
            self.functions[function] = _Function(self.parameters(i + 1, end - 1), instance.max_threads)
            self.definitions.append(return_type)
            self.kernel_body = range(end, self.match(end))
            if self.tokens[start - 1].text != ">":  # not a template
                self.instances.append(instance)
        else:
            self.error(i, f"expected the body of kernel '{function}'")
        return end + 1

    def max_threads(self, i: int, attributes: dict[str, str]) -> int | None:
        argument = attributes.get("max_total_threads_per_threadgroup")
        if argument is None:
            return None
        if not argument.isdecimal() or not 1 <= int(argument) <= 1024:
            self.error(i, f"max_total_threads_per_threadgroup takes an integer from 1 to 1024, got '{argument}'")
            return None
        return int(argument)

    def resolve_instances(self) -> list[Kernel]:
        kernels: dict[str, Kernel] = {}
        for instance in self.instances:
            function = self.functions.get(instance.function)
            if function is None:
                message = f"instantiation of unknown kernel '{instance.function}'"
                self.diagnostics.error(instance.file, instance.line, message)
            elif instance.name in kernels:
                self.diagnostics.error(instance.file, instance.line, f"two kernels are named '{instance.name}'")
            else:
                max_threads = instance.max_threads or function.max_threads
                kernels[instance.name] = replace(instance, params=function.params, max_threads=max_threads)
        return list(kernels.values())

    # Kernel arguments

    def parameters(self, start: int, stop: int) -> tuple[Parameter, ...]:
        parsed = [self.parameter(piece) for piece in self.split(start, stop)]
        explicit: set[int] = set()
        for p in parsed:
            if p.kind == "buffer" and p.index in explicit:
                self.diagnostics.error(self.tokens[start].file, p.line, f"[[buffer({p.index})]] is used twice")
            elif p.kind == "buffer" and p.index >= 0:
                explicit.add(p.index)
        free = (index for index in range(MAX_BUFFERS + len(parsed)) if index not in explicit)
        numbered = [p if p.index >= 0 else replace(p, index=next(free)) for p in parsed]
        for p in numbered:
            if p.kind == "buffer" and p.index >= MAX_BUFFERS:
                message = f"buffer index {p.index} of '{p.name}': Metal has 0 to {MAX_BUFFERS - 1}"
                self.diagnostics.error(self.tokens[start].file, p.line, message)
        return tuple(numbered)

    def parameter(self, piece: range) -> Parameter:
        """One argument. A buffer without an index gets -1."""
        attributes: dict[str, str] = {}
        declaration = []  # indices of the tokens outside attributes and template arguments
        i = piece.start
        while i < piece.stop:
            if self.at_attribute(i):
                found, i = self.attribute(i)
                attributes.update(found)
            elif self.tokens[i].text == "<":
                i = self.after_template_args(i)
            else:
                declaration.append(i)
                i += 1
        words = [self.tokens[i].text for i in declaration]
        name = words[-1]
        is_pointer, is_reference = "*" in words, "&" in words
        kind, index, address_space = "buffer", -1, ""
        for attribute, argument in attributes.items():
            if attribute == "buffer":
                if argument.isdecimal():
                    index = int(argument)
                else:
                    self.error(piece.start, f"buffer index of '{name}' must be an integer, got '{argument}'")
            elif attribute in BUILTINS:
                kind, index = "builtin", BUILTINS[attribute]
            elif attribute == "threadgroup":
                self.error(piece.start, f"'{name}': declare threadgroup memory in the kernel, not as an argument")
            elif attribute not in IGNORED_ATTRIBUTES:
                self.error(piece.start, f"unknown attribute [[{attribute}]] of kernel argument '{name}'")
        if is_pointer or is_reference:
            address_space = next((word for word in words if word in ADDRESS_SPACES), "")
            if address_space not in ("device", "constant"):
                got = f", not {address_space}" if address_space else ""
                self.error(piece.start, f"kernel argument '{name}' must point to device or constant memory{got}")
        elif kind == "buffer":
            kind = "builtin"
            if not attributes:
                message = f"kernel argument '{name}' needs an attribute such as [[thread_position_in_grid]]"
                self.error(piece.start, message)
        line = self.tokens[piece.start].line
        return Parameter(name, kind, index, address_space, is_pointer, is_reference, line)

    # Threadgroup memory

    def threadgroup_declaration(self, start: int) -> int:
        """`threadgroup T a[n], b;`. A pointer into threadgroup memory is left as it is."""
        i = start + 1
        while self.tokens[i + 1].text not in ("[", ",", ";", "=", "{", "("):
            if self.tokens[i].text in ("*", "&") or self.tokens[i + 1].kind == "end":
                return i + 1
            i = self.after_template_args(i + 1) if self.tokens[i + 1].text == "<" else i + 1
        if start not in self.kernel_body:
            self.error(start, "threadgroup variables can only be declared in a kernel")
        type_name = self.text(start + 1, i)
        declarators = []
        while True:
            name = self.tokens[i].text
            dimensions = i + 1
            i += 1
            while self.tokens[i].text == "[":
                i = self.match(i) + 1
            declarators.append((name, self.text(dimensions, i)))
            if self.tokens[i].text != ",":
                break
            i += 1
        if self.tokens[i].text != ";":
            self.error(start, f"threadgroup variable '{name}' cannot have an initialiser")
        self.threadgroup_variables.append(ThreadgroupVariable(start, i, type_name, tuple(declarators)))
        return i
