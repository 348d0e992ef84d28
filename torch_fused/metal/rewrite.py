"""The text of a program with some tokens replaced; shared by all dialects.

A dialect keeps the program's text, line for line, with #line directives: what a compiler, debugger or profiler says of
it names the .metal file. Only what the target cannot express is rewritten, token by token: {token index: text}.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .initialisers import complete_initialisers
from .lexer import Token
from .program import Kernel, Program, ThreadgroupVariable
from .swizzles import join_swizzles

INCLUDE = Path(__file__).parent / "include"
ERASED_ADDRESS_SPACES = {"device": "", "thread": "", "threadgroup": "", "constant": "const"}
SPECIFIERS = ("static", "constexpr", "inline", "volatile", "const", "constant")


def rewrite(program: Program, replaced: dict[int, str]) -> str:
    """`replaced` has this dialect's replacements in addition to the common ones."""
    replaced = (
        _literals(program)
        | complete_initialisers(program)
        | join_swizzles(program)
        | _members(program)
        | replaced
        | dict.fromkeys(program.attributes, "")
        | _threadgroup_variables(program)
    )
    return "".join(token.space + replaced.get(i, token.text) for i, token in enumerate(program.tokens))


def line_directive(kernel: Kernel) -> str:
    return f'\n#line {kernel.line} "{kernel.file}"\n'


def header(name: str) -> str:
    """The text of one of our headers, after the headers that it includes."""
    text = (INCLUDE / name).read_text(encoding="ascii")
    kept = (line for line in text.splitlines() if line != "#pragma once" and not line.startswith('#include "'))
    return f'#line 1 "{name}"\n' + "\n".join(kept) + "\n"


def _literals(program: Program) -> dict[int, str]:
    """Metal's unsuffixed floating-point literal is a float; h and bf make a half and a bfloat."""
    replaced = {}
    for i, token in enumerate(program.tokens):
        literal = token.float_literal()
        if literal:
            digits, suffix = literal
            replaced[i] = {"h": f"half({digits}f)", "bf": f"bfloat({digits}f)"}.get(suffix, digits + "f")
    return replaced


def _members(program: Program) -> dict[int, str]:
    """Removes a member's `template <>`: an overload does the same, and not every compiler allows it in a class."""
    return {i: "" for start in program.member_specialisations for i in range(start, start + 3)}


def _threadgroup_variables(program: Program) -> dict[int, str]:
    replaced: dict[int, str] = {}
    number = 0
    for variable in program.threadgroup_variables:
        replaced |= dict.fromkeys(range(variable.start, variable.stop), "")
        replaced[variable.start] = _threadgroup_variable(variable, number, program.tokens[variable.start].line)
        number += len(variable.declarators)
    return replaced


def _threadgroup_variable(variable: ThreadgroupVariable, number: int, line: int) -> str:
    """MSL_TG_VAR(number, line, name, type, dimensions) for each name; the semicolon stays in the text."""
    declarations = []
    type_name = variable.type
    if "," in type_name:  # a macro would split vec<float, 4> into two arguments
        type_name = f"msl_type_{number}"
        declarations.append(f"using {type_name} = {variable.type}")
    for offset, (name, dimensions) in enumerate(variable.declarators):
        declarations.append(f"MSL_TG_VAR({number + offset}, {line}, {name}, {type_name}, {dimensions})")
    return "; ".join(declarations)


def erase_address_spaces(program: Program) -> dict[int, str]:
    replaced = {}
    tokens = program.tokens
    for i, token in enumerate(tokens):
        if token.text in ERASED_ADDRESS_SPACES and token.kind == "name":
            replaced[i] = ERASED_ADDRESS_SPACES[token.text]
            if replaced[i] and _is_const(tokens, i):  # C++ does not allow const twice
                replaced[i] = ""
    return replaced


def _is_const(tokens: list[Token], i: int) -> bool:
    """Whether `const` is among the specifiers around token i."""
    for step in (-1, 1):
        j = i + step
        while tokens[j].text in SPECIFIERS:
            if tokens[j].text == "const":
                return True
            j += step
    return tokens[i + 2].text == "const" and tokens[i + 1].kind == "name"


def drop_repetitions(program: Program) -> dict[int, str]:
    """Entries instantiate the functions they call; of overloads that C++ cannot distinguish, the first is kept."""
    return {i: "" for span in [*program.instantiations, *program.overloads] for i in span}


def set_function_constants(program: Program, values: Mapping[int, object]) -> dict[int, str]:
    replaced = {}
    for constant in program.constants:
        value = values.get(constant.index)
        text = str(value).lower() if isinstance(value, bool) else f"{constant.type}({value or 0})"
        replaced[constant.token] = f"{constant.name} = {text}"
    defined = {constant.name for constant in program.constants if constant.index in values}
    for i, token in enumerate(program.tokens):
        if token.text == "is_function_constant_defined":
            replaced |= dict.fromkeys(range(i, i + 4), "")
            replaced[i] = "true" if program.tokens[i + 2].text in defined else "false"
    return replaced
