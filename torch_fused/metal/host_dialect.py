"""C++17 for the emulator."""

from __future__ import annotations

from collections.abc import Mapping

from .program import Kernel, Program
from .rewrite import drop_repetitions, erase_address_spaces, line_directive, rewrite, set_function_constants
from .shift_counts import define_shifts
from .swizzles import define_swizzles

ARGUMENT_CODES = {"buffer": 0, "builtin": 1000, "threadgroup": 2000}  # added to the index


def emit_host(program: Program, values: Mapping[int, object] | None = None) -> str:
    """C++17 for the emulator's metal_stdlib: kernel x is run by `extern "C" void msl_k_x(const msl_args*)`.

    `values` are those of the function constants, by index; one without has the value 0.
    """
    replaced = erase_address_spaces(program) | define_shifts(program) | set_function_constants(program, values or {})
    body = rewrite(program, replaced | drop_repetitions(program))
    entries = "".join(_entry(kernel) for kernel in program.kernels)
    return define_swizzles(program) + '#include "metal_stdlib"\n' + body + entries


def _entry(kernel: Kernel) -> str:
    codes = ", ".join(str(p.index + ARGUMENT_CODES[p.kind]) for p in kernel.params)
    function = f"&{kernel.function}{kernel.template_args}"
    if kernel.types is not None:
        function = f"static_cast<void (*)({', '.join(kernel.types)})>({function})"
    conditions = ", ".join(f"bool({p.condition})" if p.condition else "true" for p in kernel.params)
    absent = f"static const bool present[] = {{{conditions}}}; " if any(p.condition for p in kernel.params) else ""
    return (
        line_directive(kernel)
        + f'extern "C" __attribute__((visibility("default"))) void msl_k_{kernel.symbol}(const msl_args* a) '
        + f"{{ {absent}msl_bind::call<{codes}>({function}, *a{', present' if absent else ''}); }}\n"
    )
