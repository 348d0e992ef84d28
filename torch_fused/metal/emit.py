"""Writes a parsed Metal program as C++ for the emulator, as CUDA C++, or as the dialect that clang type-checks.

Every dialect keeps the program's text, line for line, with #line directives: what a compiler, debugger or profiler says
of it names the .metal file. Only what the target cannot express is rewritten, token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import MetalError
from .lexer import Token
from .program import CUDA_BUILTINS, Kernel, Parameter, Program, ThreadgroupVariable

INCLUDE = Path(__file__).parent / "include"
ERASED_ADDRESS_SPACES = {"device": "", "thread": "", "threadgroup": "", "constant": "const"}
CUDA_HEADERS = (
    "vector.h",
    "primitives_cuda.h",
    "types.h",
    "half_cuda.h",
    "standard.h",
    "standard_cuda.h",
    "cuda.h",
)
ARGUMENT_CODES = {"buffer": 0, "builtin": 1000, "threadgroup": 2000}  # added to the index, for the emulator


def emit_host(program: Program, values: Mapping[int, object] | None = None) -> str:
    """C++17 for the emulator's metal_stdlib: kernel x is run by `extern "C" void msl_k_x(const msl_args*)`.

    `values` are those of the function constants, by index; one without has the value 0.
    """
    replaced = _erase_address_spaces(program) | _shifts(program) | _function_constants(program, values or {})
    body = _rewrite(program, replaced | _drop_repetitions(program))
    return (
        _swizzles(program)
        + '#include "metal_stdlib"\n'
        + body
        + "".join(_host_entry(kernel) for kernel in program.kernels)
    )


def emit_cuda(program: Program) -> str:
    """Self-contained CUDA C++: kernel x is `extern "C" __global__ void x(...)`.

    Its parameters are the Metal function's buffers in increasing index: a pointer each, but a `constant T&` by value.
    It is launched in whole blocks, one a threadgroup. NVRTC needs --std=c++17 --device-as-default-execution-space.
    """
    _check_for_cuda(program)
    # Inlining a kernel into its entry lets the compiler see which memory every pointer is in.
    inlined = {i: "__forceinline__ " + program.tokens[i].text for i in program.definitions}
    body = _rewrite(program, _erase_address_spaces(program) | _drop_repetitions(program) | inlined)
    return "".join(
        [
            _swizzles(program),
            *map(_header, CUDA_HEADERS),
            "namespace metal {\n",
            body,
            "\nnamespace entry {\n",
            *(_cuda_entry(kernel) for kernel in program.kernels),
            "}  // namespace entry\n}  // namespace metal\n",
        ]
    )


def emit_lint(program: Program) -> str:
    """C++ for OpenCL, whose address spaces are Metal's under other names: for type-checking only."""
    return _header("lint.h") + _rewrite(program, _make_vectors(program) | _function_constants(program, {}))


def _header(name: str) -> str:
    text = (INCLUDE / name).read_text(encoding="ascii")
    kept = (line for line in text.splitlines() if line != "#pragma once" and not line.startswith('#include "'))
    return f'#line 1 "{name}"\n' + "\n".join(kept) + "\n"


def _swizzles(program: Program) -> str:
    """Definitions of vector.h's swizzles, those of every source being too many to compile."""
    used = {token.text for i, token in enumerate(program.tokens) if program.tokens[i - 1].text in (".", "->")}
    lines = []
    for width in (2, 3, 4):
        members = []
        for names in ("xyzw", "rgba"):
            letters = names[:width]
            for swizzle in sorted(used):
                if 2 <= len(swizzle) <= 4 and set(swizzle) <= set(letters):
                    places = ", ".join(str(letters.index(letter)) for letter in swizzle)
                    members.append(f"swz<T, {width}, {places}> {swizzle};")
        lines.append(f"#define MSL_SWIZZLES_{width} {' '.join(members)}\n")
    return "".join(lines)


# Rewriting: {token index: text that replaces it}


def _rewrite(program: Program, replaced: dict[int, str]) -> str:
    replaced = (
        _literals(program)
        | _lists(program)
        | _members(program)
        | replaced
        | dict.fromkeys(program.attributes, "")
        | _threadgroup_variables(program)
    )
    return "".join(token.space + replaced.get(i, token.text) for i, token in enumerate(program.tokens))


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
    """A member's `template <>` goes: it is as good an overload, and not every compiler has it in a class."""
    return {i: "" for start in program.member_specialisations for i in range(start, start + 3)}


def _lists(program: Program) -> dict[int, str]:
    """Initialisers that C++ does not have: `uint4 v = {a, b}` leaves zeros, `T a[n] = {[0 ... n - 1] = x}` fills."""
    return _short_lists(program) | _filled_arrays(program)


def _short_lists(program: Program) -> dict[int, str]:
    tokens = program.tokens
    replaced: dict[int, str] = {}
    for i in range(len(tokens) - 4):
        if tokens[i].text[:-1] not in ELEMENTS or [t.text for t in tokens[i + 2 : i + 4]] != ["=", "{"]:
            continue
        depth, elements, j = 0, 1, i + 3
        while True:
            depth += {"{": 1, "(": 1, "[": 1, "}": -1, ")": -1, "]": -1}.get(tokens[j].text, 0)
            elements += tokens[j].text == "," and depth == 1
            if depth == 0:
                break
            j += 1
        width = int(tokens[i].text[-1])
        if 1 < elements < width and not any(t.text[:-1] in ELEMENTS for t in tokens[i + 4 : j]):
            replaced[j] = ", 0" * (width - elements) + "}"
    return replaced


def _filled_arrays(program: Program) -> dict[int, str]:
    """`T a[n] = {[0 ... n - 1] = x};` becomes `T a[n]; msl_fill(a, x);`."""
    tokens = program.tokens
    replaced: dict[int, str] = {}
    for i in range(len(tokens) - 6):
        if [token.text for token in tokens[i : i + 4]] != ["=", "{", "[", "0"] or tokens[i + 4].text != ".":
            continue
        name, equals, close = i - 1, i + 4, i + 4
        while tokens[name].text == "]":
            while tokens[name].text != "[":
                name -= 1
            name -= 1
        while tokens[equals].text != "=":
            equals += 1
        while tokens[close].text != "}":
            close += 1
        replaced |= dict.fromkeys(range(i, equals + 1), "")
        replaced[i] = f"; msl_fill({tokens[name].text},"
        replaced[close] = ")"
    return replaced


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
    if "," in type_name:  # a macro would take vec<float, 4> for two arguments
        type_name = f"msl_type_{number}"
        declarations.append(f"using {type_name} = {variable.type}")
    for offset, (name, dimensions) in enumerate(variable.declarators):
        declarations.append(f"MSL_TG_VAR({number + offset}, {line}, {name}, {type_name}, {dimensions})")
    return "; ".join(declarations)


def _erase_address_spaces(program: Program) -> dict[int, str]:
    replaced = {}
    tokens = program.tokens
    for i, token in enumerate(tokens):
        if token.text in ERASED_ADDRESS_SPACES and token.kind == "name":
            replaced[i] = ERASED_ADDRESS_SPACES[token.text]
            if replaced[i] and _is_const(tokens, i):  # C++ takes no second const
                replaced[i] = ""
    return replaced


SPECIFIERS = ("static", "constexpr", "inline", "volatile", "const", "constant")


def _is_const(tokens: list[Token], i: int) -> bool:
    """Whether `const` stands among the specifiers around token i."""
    for step in (-1, 1):
        j = i + step
        while tokens[j].text in SPECIFIERS:
            if tokens[j].text == "const":
                return True
            j += step
    return tokens[i + 2].text == "const" and tokens[i + 1].kind == "name"


SHIFTS = {
    "<<": "<< ::metal::msl_shl <<",
    ">>": ">> ::metal::msl_shr >>",
    "<<=": "<< ::metal::msl_shl_to =",
    ">>=": ">> ::metal::msl_shr_to =",
}


def _shifts(program: Program) -> dict[int, str]:
    """Shifts whose count may be as large as the number: C++ leaves those undefined, Metal does not.

    A `>>` behind two `<` may close templates, and stays.
    """
    tokens = program.tokens
    replaced: dict[int, str] = {}
    opened = [0]  # `<` not closed, in each of the brackets around
    for i, token in enumerate(tokens):
        if token.kind != "symbol":
            continue
        if token.text in ("(", "[", "{"):
            opened.append(0)
        elif token.text in (")", "]", "}") and len(opened) > 1:
            opened.pop()
        elif token.text == ";":
            opened[-1] = 0
        elif token.text == "<":
            opened[-1] += 1
        elif token.text == ">":
            opened[-1] = max(0, opened[-1] - 1)
        elif token.text == ">>" and opened[-1] >= 2:
            opened[-1] -= 2
        elif token.text in SHIFTS and tokens[i - 1].text != "operator" and not _is_small(tokens, i + 1):
            replaced[i] = SHIFTS[token.text]
    return replaced


def _is_small(tokens: list[Token], i: int) -> bool:
    """Whether the operand at token i is a literal below 32."""
    digits = tokens[i].text.rstrip("uU")
    return digits.isdecimal() and int(digits) < 32 and tokens[i + 1].text not in ("+", "-", "*", "/", "%")


def _drop_repetitions(program: Program) -> dict[int, str]:
    """The entries instantiate what they call; of overloads that C++ cannot tell apart the first is enough."""
    return {i: "" for span in [*program.instantiations, *program.overloads] for i in span}


def _function_constants(program: Program, values: Mapping[int, object]) -> dict[int, str]:
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


def _check_for_cuda(program: Program) -> None:
    """Refuses what the emulator has and the translation does not."""
    for kernel in program.kernels:
        for p in kernel.params:
            if p.kind == "threadgroup" or p.condition or (p.kind == "builtin" and p.index >= CUDA_BUILTINS):
                raise MetalError(f"{kernel.file}:{p.line}: error: argument '{p.name}' is not supported on CUDA")


ELEMENTS = ("float", "half", "bfloat", "int", "uint", "short", "ushort", "char", "uchar", "long", "ulong", "bool")
VECTOR_TYPES = {f"{element}{width}" for element in ELEMENTS for width in (2, 3, 4)} | {"vec"}


def _make_vectors(program: Program) -> dict[int, str]:
    """float4(a, b) becomes metal::msl_make<float4>(a, b): clang's native vectors have no constructors."""
    tokens = program.tokens
    names = set(VECTOR_TYPES)
    replaced = {}
    for i, token in enumerate(tokens):
        if token.text not in names or token.kind != "name":
            continue
        first = i - 2 if tokens[i - 1].text == "::" else i  # metal::float4
        if tokens[first - 1].text == "=" and tokens[first - 3].text == "using":
            names.add(tokens[first - 2].text)
        last, closes_outer = _end_of_template_name(tokens, i)
        if tokens[last + 1].text == "(" and not closes_outer:
            replaced[first] = f"metal::msl_make<{tokens[first].text}"
            replaced[last] = replaced.get(last, tokens[last].text) + ">"
    return replaced


def _end_of_template_name(tokens: list[Token], i: int) -> tuple[int, bool]:
    """Index of the last token of `name` or `name<...>` at token i; whether a `>>` ends an outer template with it."""
    if tokens[i + 1].text != "<":
        return i, False
    depth = 0
    for j in range(i + 1, len(tokens) - 1):
        depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[j].text, 0)
        if depth <= 0:
            return j, depth < 0
    return i, False


# Entries


def _line(kernel: Kernel) -> str:
    return f'\n#line {kernel.line} "{kernel.file}"\n'


def _host_entry(kernel: Kernel) -> str:
    codes = ", ".join(str(p.index + ARGUMENT_CODES[p.kind]) for p in kernel.params)
    function = f"&{kernel.function}{kernel.template_args}"
    if kernel.types is not None:
        function = f"static_cast<void (*)({', '.join(kernel.types)})>({function})"
    conditions = ", ".join(f"bool({p.condition})" if p.condition else "true" for p in kernel.params)
    absent = f"static const bool present[] = {{{conditions}}}; " if any(p.condition for p in kernel.params) else ""
    return (
        _line(kernel)
        + f'extern "C" __attribute__((visibility("default"))) void msl_k_{kernel.symbol}(const msl_args* a) '
        + f"{{ {absent}msl_bind::call<{codes}>({function}, *a{', present' if absent else ''}); }}\n"
    )


def _cuda_entry(kernel: Kernel) -> str:
    function = f"metal::{kernel.function}{kernel.template_args}"

    def cuda_type(alias: str, param: Parameter) -> str:
        return f"msl_cuda::{alias}<decltype(&{function}), {kernel.params.index(param)}>"

    def declare(param: Parameter) -> str:
        if param.is_pointer:
            return f"{cuda_type('argument', param)} b{param.index}"
        if param.address_space == "device":
            return f"{cuda_type('referred', param)}* b{param.index}"
        return f"const __grid_constant__ {cuda_type('referred', param)} b{param.index}"

    def value(param: Parameter) -> str:
        if param.kind == "builtin":
            return f"msl_cuda::builtin<{param.index}, {cuda_type('argument', param)}>()"
        is_pointer_to_reference = not param.is_pointer and param.address_space == "device"
        return f"{'*' if is_pointer_to_reference else ''}b{param.index}"

    return (
        _line(kernel)
        + f'extern "C" __global__ void __launch_bounds__({kernel.max_threads or 1024}) {kernel.name}('
        + ", ".join(map(declare, kernel.buffers))
        + f") {{ {function}({', '.join(map(value, kernel.params))}); }}\n"
    )
