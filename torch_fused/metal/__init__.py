"""Metal kernels on any machine: a front end that translates and checks them, and an emulator that runs them."""

import importlib
from typing import Any

_MODULES = {"MetalError": ".errors", "compile_shader": ".shader", "emulate": ".emulation"}
__all__ = ["MetalError", "compile_shader", "emulate"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the build uses the front end before there is a torch_fused to import.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
