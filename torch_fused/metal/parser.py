"""Finds the kernels of a Metal source, their arguments and their threadgroup variables, without a Metal compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .declarations import ADDRESS_SPACES, constants, constructor_spaces, declarations, overloads
from .errors import Diagnostics
from .expressions import integer
from .lexer import Token, tokenize
from .preprocess import preprocess
from .program import BUILTINS, MAX_BUFFERS, FunctionConstant, Kernel, Parameter, Program, ThreadgroupVariable
from .rules import check_ascii, check_project_rules, check_words
from .tokens import BRACKETS, Tokens

IGNORED_ATTRIBUTES = ("likely", "unlikely", "maybe_unused", "nodiscard", "fallthrough", "clang", "gnu", "unroll")
STAGES = ("vertex", "fragment", "object", "mesh", "visible", "intersection", "stage_in", "stitchable", "patch")
SPECIFIERS = ("constant", "const", "constexpr", "static", "inline")
NUMBER = re.compile(r"(bool|half|bfloat|float|u?(char|short|int|long)|size_t|unsigned)[234]?|u?int(8|16|32|64)_t")


def parse(text: str, name: str = "shader.metal", own: bool = False) -> Program:
    """Preprocess and parse flattened Metal source.

    `name` numbers the lines that no #line directive names; `own` asks for this project's rules too. Raises MetalError
    naming everything that is wrong.
    """
    if own:
        diagnostics = Diagnostics()
        check_ascii(text, name, diagnostics)
        diagnostics.raise_if_any()
    return _Parser(name, tokenize(preprocess(text, name)), own).parse()


@dataclass(frozen=True)
class _Function:
    """A kernel function's definition."""

    params: tuple[Parameter, ...]
    types: tuple[str, ...]
    template_params: tuple[tuple[str, str], ...]  # (name, default)
    max_threads: str | None
    start: int


@dataclass(frozen=True)
class _Instance:
    """A kernel whose function may still be to come."""

    kernel: Kernel
    names: tuple[str, ...]  # the functions it may mean, the nearest first
    types: tuple[str, ...] | None  # of its parameters, if they are written
    max_threads: str | None
    token: int


class _Parser(Tokens):
    def __init__(self, name: str, tokens: list[Token], own: bool) -> None:
        super().__init__(tokens, Diagnostics())
        self.name = name
        self.own = own
        self.functions: dict[str, list[_Function]] = {}
        self.instances: list[_Instance] = []
        self.threadgroup_variables: list[ThreadgroupVariable] = []
        self.attribute_tokens: set[int] = set()
        self.definitions: list[int] = []
        self.instantiations: list[range] = []
        self.function_constants: list[FunctionConstant] = []
        self.kernel_body = range(0)
        self.scopes: list[tuple[str, int]] = []  # (namespace, the index of its closing brace)
        self.known: dict[str, str] = {}  # the values of constants

    def parse(self) -> Program:
        check_words(self.tokens, self.diagnostics)
        if self.own:
            check_project_rules(self.tokens, self.diagnostics)
        self.diagnostics.raise_if_any()  # what is not there is not parsed either
        found = list(declarations(self))
        self.known = constants(self, found)
        for declaration in found:
            self.attribute_tokens.update(constructor_spaces(self, declaration))
        position = 0
        while self.tokens[position].kind != "end":
            position = self.step(position)
        kernels = self.resolve_instances()
        repeated = overloads(self, found, self.attribute_tokens)
        self.diagnostics.raise_if_any()
        return Program(
            self.name,
            self.tokens,
            kernels,
            self.threadgroup_variables,
            self.attribute_tokens,
            self.definitions,
            self.instantiations,
            repeated,
            self.function_constants,
            [
                d.start
                for d in found
                if d.of_class and self.words(range(d.start, d.start + 3)) == ["template", "<", ">"]
            ],
        )

    def step(self, i: int) -> int:
        """Parse what starts at token i; returns where to go on."""
        text = self.tokens[i].text
        while self.scopes and i > self.scopes[-1][1]:
            self.scopes.pop()
        if text == "namespace" and self.tokens[i - 1].text != "using":
            return self.namespace(i)
        if self.at_attribute(i) or (text == "kernel" and self.tokens[i + 1].kind == "name"):
            return self.attributed_declaration(i)
        if text in STAGES[:2] and self.tokens[i + 1].kind == "name" and self.tokens[i - 1].text in ("", ";", "}", ">"):
            self.error(i, f"{text} functions are not supported: the emulator runs compute kernels")
        if text == "threadgroup" and (self.tokens[i - 1].text in ("{", "}", ";", "") or self.aligned(i)):
            return self.threadgroup_declaration(i)
        return i + 1

    def namespace(self, i: int) -> int:
        opening = i + 1
        while self.tokens[opening].text not in ("{", ";", "=") and self.tokens[opening].kind != "end":
            opening += 1
        if self.tokens[opening].text == "{":
            self.scopes.append(("".join(self.words(range(i + 1, opening))), self.match(opening)))
        return opening + 1

    def qualified(self, name: str) -> str:
        return "::".join([*(scope for scope, _ in self.scopes if scope), name])

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
            elif self.tokens[i].text in ("static", "inline") and "kernel" in attributes:
                self.attribute_tokens.add(i)
                i += 1
            else:
                break
        is_kernel = "kernel" in attributes
        for name in attributes:
            if name == "function_constant" and not is_kernel:
                self.function_constant(start, attributes[name])
            elif name in STAGES:
                self.error(start, f"[[{name}]] is not supported: the emulator runs compute kernels")
            elif name == "id":
                self.error(start, "argument buffers, with [[id]], are not supported: bind every buffer")
            elif not self.is_known(name, is_kernel):
                self.error(start, f"unknown attribute [[{name}]]")
        return self.kernel(start, i, attributes) if is_kernel else i

    def is_known(self, name: str, of_kernel: bool) -> bool:
        """Whether an attribute may stand there. Those of arguments say nothing on a helper function's."""
        if of_kernel:
            return name in ("kernel", "host_name", "max_total_threads_per_threadgroup", *IGNORED_ATTRIBUTES)
        return name in (*IGNORED_ATTRIBUTES, *BUILTINS, "buffer", "threadgroup", "function_constant", "host_name")

    def function_constant(self, attribute: int, argument: str) -> None:
        """`constant T name [[function_constant(n)]];` but not the attribute of an argument."""
        name = attribute - 1
        index = integer(argument, self.known)
        start = name
        while self.tokens[start - 1].text not in (";", "}", "{", "") and self.tokens[start].text != "constant":
            start -= 1
        if self.tokens[start].text != "constant" or self.tokens[attribute - 1].kind != "name":
            return
        if index is None:
            return self.error(attribute, f"function_constant takes an integer, got '{argument}'")
        asked = any(
            self.tokens[i].text == "is_function_constant_defined" and self.tokens[i + 2].text == self.tokens[name].text
            for i in range(len(self.tokens) - 2)
        )
        type_name = " ".join(word for word in self.words(range(start, name)) if word not in SPECIFIERS)
        self.function_constants.append(FunctionConstant(self.tokens[name].text, type_name, index, name, asked))

    # Kernels

    def kernel(self, start: int, i: int, attributes: dict[str, str]) -> int:
        """A kernel's definition or explicit instantiation, whose return type is token i."""
        return_type = i
        if self.tokens[i].text == "decltype":  # template [[kernel]] decltype(f<float>) f<float>;
            i = self.match(i + 1)
        elif self.tokens[i].text != "void" and self.tokens[start - 1].text != "template":
            self.error(i, "a kernel must return void")
            return i + 1
        elif self.tokens[i].text != "void":  # template [[kernel]] f_type f<float>;
            while self.tokens[i + 1].text == "::":
                i += 2
        i += 1
        while self.at_attribute(i):
            found, i = self.attribute(i)
            attributes.update(found)
        function = self.tokens[i].text
        while self.tokens[i + 1].text == "::":
            function += "::" + self.tokens[i + 2].text
            i += 2
        i += 1
        template_args = ""
        if self.tokens[i].text == "<":
            stop = self.after_template_args(i)
            template_args = self.text(i, stop)
            i = stop
        params = range(i + 1, self.match(i)) if self.tokens[i].text == "(" else None
        end = i if params is None else params.stop + 1
        while self.at_attribute(end):
            found, end = self.attribute(end)
            attributes.update(found)
        kernel = Kernel(
            name=attributes.get("host_name", self.qualified(function)),
            function=function,
            template_args=template_args,
            params=(),
            max_threads=None,
            file=self.tokens[start].file,
            line=self.tokens[start].line,
        )
        names = [self.qualified(function), function]
        for depth in range(1, len(self.scopes)):
            names.insert(depth, "::".join([*(s for s, _ in self.scopes[:-depth] if s), function]))
        types = None
        if params is not None:
            types = tuple(self.type_of(piece) for piece in self.split(params.start, params.stop))
        max_threads = attributes.get("max_total_threads_per_threadgroup")
        instance = _Instance(kernel, tuple(names), types, max_threads, start)
        if self.tokens[end].text == ";":
            if self.tokens[start - 1].text not in ("template", ">", ">>"):
                self.error(start, f"kernel '{function}' is declared without a body")
            elif self.tokens[start - 1].text == "template":
                self.instances.append(instance)
                self.instantiations.append(range(start - 1, end + 1))
            return end + 1
        if self.tokens[end].text != "{" or params is None:
            self.error(i, f"expected the body of kernel '{function}'")
            return end + 1
        known = self.functions.setdefault(self.qualified(function), [])
        if any(other.types == types for other in known):
            self.error(return_type, f"kernel '{function}' is defined twice")
        is_template = self.tokens[start - 1].text in (">", ">>")
        definition = _Function(
            self.parameters(params.start, params.stop),
            types or (),
            self.template_params(start - 1) if is_template else (),
            max_threads,
            start,
        )
        known.append(definition)
        self.definitions.append(return_type)
        self.kernel_body = range(end, self.match(end))
        if not is_template:
            self.instances.append(instance)
        return end

    def template_params(self, closing: int) -> tuple[tuple[str, str], ...]:
        """(name, default) of the parameters of the `template <...>` whose `>` is token `closing`."""
        i = closing
        while self.tokens[i].text != "template":
            i -= 1
        found = []
        for piece in self.split(i + 2, closing):
            words = self.words(piece)
            equals = words.index("=") if "=" in words else len(words)
            found.append((words[equals - 1], " ".join(words[equals + 1 :])))
        return tuple(found)

    def type_of(self, piece: range) -> str:
        """The type of a parameter, without its name and as C++ sees it."""
        stop = next((i for i in piece if self.at_attribute(i) or self.tokens[i].text == "="), piece.stop)
        words = [self.tokens[i].text for i in range(piece.start, stop)]
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

    def resolve_instances(self) -> list[Kernel]:
        kernels: dict[str, Kernel] = {}
        for instance in self.instances:
            kernel = instance.kernel
            name = next((name for name in instance.names if name in self.functions), None)
            if name is None:
                name = next((name for name in self.functions if name.endswith("::" + kernel.function)), None)
            if name is None:
                self.diagnostics.error(kernel.file, kernel.line, f"instantiation of unknown kernel '{kernel.function}'")
            elif kernel.name in kernels:
                self.diagnostics.error(kernel.file, kernel.line, f"two kernels are named '{kernel.name}'")
            else:
                definition = self.overload(instance, self.functions[name])
                deduced = bool(definition.template_params) and not kernel.template_args
                overloaded = len(self.functions[name]) > 1 or deduced
                kernels[kernel.name] = replace(
                    kernel,
                    function=name,
                    params=definition.params,
                    max_threads=self.max_threads(instance, definition),
                    types=instance.types if overloaded else None,
                )
        return list(kernels.values())

    def overload(self, instance: _Instance, functions: list[_Function]) -> _Function:
        """The definition that an instance means: its own, else the one with as many and such parameters."""

        def likeness(function: _Function) -> tuple[bool, bool, int]:
            types = instance.types or ()
            shapes = [[[c for c in t if c in "*&"] for t in side] for side in (types, function.types)]
            equal = sum(a == b for a, b in zip(types, function.types, strict=False))
            return len(types) == len(function.types), shapes[0] == shapes[1], equal

        own = [function for function in functions if function.start == instance.token]
        return own[0] if own else max(functions, key=likeness)

    def max_threads(self, instance: _Instance, definition: _Function) -> int | None:
        expression = instance.max_threads or definition.max_threads
        if expression is None:
            return None
        args = instance.kernel.template_args.strip("<> ").split(",")
        params = definition.template_params
        names = self.known | dict(params) | {name: arg for (name, _), arg in zip(params, args, strict=False)}
        value = integer(expression, names)
        if value is None or not 1 <= value <= 1024:
            message = f"max_total_threads_per_threadgroup takes an integer from 1 to 1024, got '{expression}'"
            self.error(instance.token, message)
        return value

    # Kernel arguments

    def parameters(self, start: int, stop: int) -> tuple[Parameter, ...]:
        parsed = [self.parameter(piece) for piece in self.split(start, stop)]
        numbered = self.number(start, self.number(start, parsed, "buffer"), "threadgroup")
        return tuple(numbered)

    def number(self, start: int, parsed: list[Parameter], kind: str) -> list[Parameter]:
        """Gives those arguments of a kind that have no index the free ones."""
        file = self.tokens[start].file
        explicit: set[int] = set()
        for p in parsed:
            if p.kind == kind and p.index in explicit and not p.condition:
                self.diagnostics.error(file, p.line, f"[[{kind}({p.index})]] is used twice")
            elif p.kind == kind and p.index >= 0:
                explicit.add(p.index)
        free = (index for index in range(MAX_BUFFERS + len(parsed)) if index not in explicit)
        numbered = [replace(p, index=next(free)) if p.kind == kind and p.index < 0 else p for p in parsed]
        for p in numbered:
            if p.kind == kind and p.index >= MAX_BUFFERS:
                message = f"{kind} index {p.index} of '{p.name}': Metal has 0 to {MAX_BUFFERS - 1}"
                self.diagnostics.error(file, p.line, message)
        return numbered

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
        is_array = "[" in words
        name = words[words.index("[") - 1] if is_array else words[-1]
        is_pointer, is_reference = "*" in words or is_array, "&" in words
        kind, index, condition = "buffer", -1, ""
        for attribute, argument in attributes.items():
            if attribute in ("buffer", "threadgroup"):
                kind, value = attribute, integer(argument, self.known)
                if value is None:
                    self.error(piece.start, f"{kind} index of '{name}' must be an integer, got '{argument}'")
                else:
                    index = value
            elif attribute in BUILTINS:
                kind, index = "builtin", BUILTINS[attribute]
            elif attribute == "function_constant":
                condition = argument
            elif attribute in STAGES:
                self.error(piece.start, f"[[{attribute}]] is not supported: the emulator runs compute kernels")
            elif attribute not in IGNORED_ATTRIBUTES:
                self.error(piece.start, f"unknown attribute [[{attribute}]] of kernel argument '{name}'")
        address_space = next((word for word in words if word in ADDRESS_SPACES), "")
        if address_space == "threadgroup" and kind == "buffer":
            kind = "threadgroup"
        self.check_parameter(piece.start, words, name, kind, address_space, attributes, is_pointer or is_reference)
        line = self.tokens[piece.start].line
        return Parameter(name, kind, index, address_space, is_pointer, is_reference, line, condition)

    def check_parameter(
        self, i: int, words: list[str], name: str, kind: str, space: str, attributes: dict[str, str], refers: bool
    ) -> None:
        if kind == "builtin":
            return
        is_number = any(NUMBER.fullmatch(word) for word in words[:-1])
        if refers and space not in ("device", "constant", "threadgroup"):
            got = f", not {space}" if space else ""
            self.error(i, f"kernel argument '{name}' must point to device or constant memory{got}")
        elif not refers and (is_number or not attributes):
            if attributes:
                self.error(i, f"kernel argument '{name}' with [[{kind}]] must be a pointer or a reference")
            else:
                self.error(i, f"kernel argument '{name}' needs an attribute such as [[thread_position_in_grid]]")

    # Threadgroup memory

    def aligned(self, i: int) -> bool:
        """Whether `alignas(...)` stands before token i; the emulator aligns enough, so it is dropped."""
        if self.tokens[i - 1].text != ")":
            return False
        opening = next((a for a, b in self.closing.items() if b == i - 1), 0)
        if self.tokens[opening - 1].text != "alignas":
            return False
        self.attribute_tokens.update(range(opening - 1, i))
        return True

    def threadgroup_declaration(self, start: int) -> int:
        """`threadgroup T a[n], b;`. A pointer into threadgroup memory is left as it is."""
        i = start + 1
        while self.tokens[i + 1].text not in ("[", ",", ";", "=", "{", "("):
            if self.tokens[i].text in ("*", "&") or self.tokens[i + 1].kind == "end":
                return i + 1
            i = self.after_template_args(i + 1) if self.tokens[i + 1].text == "<" else i + 1
        if self.tokens[i].text in ("*", "&") or self.tokens[i + 1].text == "(":
            return i + 1
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
            while self.tokens[i].text not in (",", ";") and self.tokens[i].kind != "end":  # an initialiser sets nothing
                i = self.match(i) + 1 if self.tokens[i].text in BRACKETS else i + 1
            if self.tokens[i].text != ",":
                break
            i += 1
        self.threadgroup_variables.append(ThreadgroupVariable(start, i, type_name, tuple(declarators)))
        return i
