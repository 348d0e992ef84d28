"""Finds the kernels of a Metal source, their arguments and their threadgroup variables, without a Metal compiler."""

from __future__ import annotations

from .attributes import STAGES, at_attribute, check_specifiers, read_specifiers
from .declarations import constants, constructor_spaces, declarations, overloads
from .errors import Diagnostics
from .function_constants import read_function_constant
from .instances import resolve
from .kernels import Kernels
from .lexer import tokenize
from .preprocess import preprocess
from .program import FunctionConstant, Program, ThreadgroupVariable
from .rules import check_ascii, check_project_rules, check_words
from .source import Source
from .threadgroup_variables import read_threadgroup_variable, starts_threadgroup_variable


def parse(text: str, name: str = "shader.metal", own: bool = False) -> Program:
    """Preprocess and parse flattened Metal source.

    `name` numbers the lines that no #line directive names; `own` asks for this project's rules too. Raises MetalError
    naming everything that is wrong.
    """
    if own:
        diagnostics = Diagnostics()
        check_ascii(text, name, diagnostics)
        diagnostics.raise_if_any()
    source = Source(tokenize(preprocess(text, name)))
    check_words(source.tokens, source.diagnostics)
    if own:
        check_project_rules(source.tokens, source.diagnostics)
    source.diagnostics.raise_if_any()  # unsupported features are not parsed
    found = list(declarations(source))
    source.known = constants(source, found)
    for declaration in found:
        source.dropped.update(constructor_spaces(source, declaration))
    parser = _Parser(source)
    parser.run()
    kernels = resolve(source, parser.kernels.functions, parser.kernels.instances)
    repeated = overloads(source, found, source.dropped)
    source.diagnostics.raise_if_any()
    specialised = ["template", "<", ">"]
    return Program(
        name,
        source.tokens,
        kernels,
        parser.threadgroup_variables,
        source.dropped,
        parser.kernels.definitions,
        parser.kernels.instantiations,
        repeated,
        parser.function_constants,
        [d.start for d in found if d.of_class and source.words(range(d.start, d.start + 3)) == specialised],
    )


class _Parser:
    """Walks over the declarations of a source, including namespaces."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.kernels = Kernels(source)
        self.threadgroup_variables: list[ThreadgroupVariable] = []
        self.function_constants: list[FunctionConstant] = []
        self.scopes: list[tuple[str, int]] = []  # (namespace, the index of its closing brace)

    def run(self) -> None:
        position = 0
        while self.source.tokens[position].kind != "end":
            position = self.step(position)

    def step(self, i: int) -> int:
        """Parses the declaration at token i; returns the index after it."""
        before, token, after = (self.source.tokens[j] for j in (i - 1, i, i + 1))
        while self.scopes and i > self.scopes[-1][1]:
            self.scopes.pop()
        if token.text == "namespace" and before.text != "using":
            return self.namespace(i)
        if at_attribute(self.source, i) or (token.text == "kernel" and after.kind == "name"):
            return self.attributed(i)
        if token.text in STAGES[:2] and after.kind == "name" and before.text in ("", ";", "}", ">"):
            self.source.error(i, f"{token.text} functions are not supported: the emulator runs compute kernels")
        if token.text == "threadgroup" and starts_threadgroup_variable(self.source, i):
            return self.threadgroup_variable(i)
        return i + 1

    def namespace(self, i: int) -> int:
        opening = i + 1
        while self.source.tokens[opening].text not in ("{", ";", "=") and self.source.tokens[opening].kind != "end":
            opening += 1
        if self.source.tokens[opening].text == "{":
            name = "".join(self.source.words(range(i + 1, opening)))
            self.scopes.append((name, self.source.match(opening)))
        return opening + 1

    def attributed(self, start: int) -> int:
        """Parses `kernel` and attributes in any order, and the head of a kernel that follows."""
        attributes, i = read_specifiers(self.source, start)
        check_specifiers(self.source, start, attributes)
        if "kernel" in attributes:
            return self.kernels.read(start, i, attributes, [scope for scope, _ in self.scopes if scope])
        if "function_constant" in attributes:
            constant = read_function_constant(self.source, start, attributes["function_constant"])
            self.function_constants += [constant] if constant else []
        return i

    def threadgroup_variable(self, start: int) -> int:
        variable, i = read_threadgroup_variable(self.source, start)
        if variable:
            self.threadgroup_variables.append(variable)
            if start not in self.kernels.body:
                self.source.error(start, "threadgroup variables can only be declared in a kernel")
        return i
