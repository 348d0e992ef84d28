"""The Metal front end and emulator: parse and check kernels, and run them on any machine with a C++ compiler."""

from typing import Any

__all__ = ["MetalError", "compile_shader", "emulate"]


def __getattr__(name: str) -> Any:
    # On demand: setup.py uses the front end before torch_fused itself can be imported.
    if name == "MetalError":
        from .errors import MetalError

        return MetalError
    if name == "compile_shader":
        from .shader import compile_shader

        return compile_shader
    if name == "emulate":
        from .emulation import emulate

        return emulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
