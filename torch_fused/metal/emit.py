"""Writes a parsed Metal program as C++ for the emulator, as CUDA C++, or as the dialect that clang type-checks.

Every dialect keeps the program's text, line for line, with #line directives: what a compiler, debugger or profiler says
of it names the .metal file. Only what the target cannot express is rewritten, token by token.
"""

from __future__ import annotations

from pathlib import Path

from .lexer import Token
from .program import Kernel, Parameter, Program, ThreadgroupVariable

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
BUILTIN_CODE = 1000  # argument codes of the emulator below this are buffer indices


def emit_host(program: Program) -> str:
    """C++17 for the emulator's metal_stdlib: kernel x is run by `extern "C" void msl_k_x(const msl_args*)`."""
    body = _rewrite(program, _erase_address_spaces(program) | _drop_instantiations(program))
    return _swizzles(program) + '#include "metal_stdlib"\n' + body + "".join(_host_entry(kernel) for kernel in program.kernels)


def emit_cuda(program: Program) -> str:
    """Self-contained CUDA C++: kernel x is `extern "C" __global__ void x(...)`.

    Its parameters are the Metal function's buffers in increasing index: a pointer each, but a `constant T&` by value.
    It is launched in whole blocks, one a threadgroup. NVRTC needs --std=c++17 --device-as-default-execution-space.
    """
    # Inlining a kernel into its entry lets the compiler see which memory every pointer is in.
    inlined = {i: "__forceinline__ " + program.tokens[i].text for i in program.definitions}
    body = _rewrite(program, _erase_address_spaces(program) | _drop_instantiations(program) | inlined)
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
    return _header("lint.h") + _rewrite(program, _make_vectors(program))


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
    replaced = _literals(program) | replaced | dict.fromkeys(program.attributes, "") | _threadgroup_variables(program)
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
        if token.text in ERASED_ADDRESS_SPACES:
            replaced[i] = ERASED_ADDRESS_SPACES[token.text]
            if "const" in (tokens[i - 1].text, tokens[i + 1].text):  # C++ takes no second const
                replaced[i] = ""
    return replaced


def _drop_instantiations(program: Program) -> dict[int, str]:
    """The entries instantiate what they call."""
    return {i: "" for instantiation in program.instantiations for i in instantiation}


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
    codes = ", ".join(str(p.index + (BUILTIN_CODE if p.kind == "builtin" else 0)) for p in kernel.params)
    return (
        _line(kernel)
        + f'extern "C" __attribute__((visibility("default"))) void msl_k_{kernel.name}(const msl_args* a) '
        + f"{{ msl_bind::call<{codes}>(&{kernel.function}{kernel.template_args}, *a); }}\n"
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
