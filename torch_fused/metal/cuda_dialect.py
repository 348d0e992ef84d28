"""CUDA C++."""

from __future__ import annotations

from .errors import MetalError
from .program import CUDA_BUILTINS, Kernel, Parameter, Program
from .rewrite import drop_repetitions, erase_address_spaces, header, line_directive, rewrite
from .swizzles import define_swizzles

HEADERS = (
    "vector.h",
    "primitives_cuda.h",
    "types.h",
    "half_cuda.h",
    "standard.h",
    "standard_cuda.h",
    "cuda.h",
)


def emit_cuda(program: Program) -> str:
    """Self-contained CUDA C++: kernel x is `extern "C" __global__ void x(...)`.

    Its parameters are the Metal function's buffers in increasing index: a pointer each, but a `constant T&` by value.
    It is launched in whole blocks, one a threadgroup. NVRTC needs --std=c++17 --device-as-default-execution-space.
    """
    _check(program)
    # Inlining a kernel into its entry lets the compiler see which memory every pointer is in.
    inlined = {i: "__forceinline__ " + program.tokens[i].text for i in program.definitions}
    body = rewrite(program, erase_address_spaces(program) | drop_repetitions(program) | inlined)
    return "".join(
        [
            define_swizzles(program),
            *map(header, HEADERS),
            "namespace metal {\n",
            body,
            "\nnamespace entry {\n",
            *(_entry(kernel) for kernel in program.kernels),
            "}  // namespace entry\n}  // namespace metal\n",
        ]
    )


def _check(program: Program) -> None:
    """Raises an error for features that the emulator supports and the translation does not."""
    for kernel in program.kernels:
        for p in kernel.params:
            if p.kind == "threadgroup" or p.condition or (p.kind == "builtin" and p.index >= CUDA_BUILTINS):
                raise MetalError(f"{kernel.file}:{p.line}: error: argument '{p.name}' is not supported on CUDA")


def _entry(kernel: Kernel) -> str:
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
        line_directive(kernel)
        + f'extern "C" __global__ void __launch_bounds__({kernel.max_threads or 1024}) {kernel.name}('
        + ", ".join(map(declare, kernel.buffers))
        + f") {{ {function}({', '.join(map(value, kernel.params))}); }}\n"
    )
