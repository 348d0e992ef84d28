"""The Metal front end and emulator: parse and check kernels, and run them on any machine with a C++ compiler."""

import importlib
from typing import Any

_MODULES = {"MetalError": ".errors", "compile_shader": ".shader", "emulate": ".emulation"}
__all__ = ["MetalError", "compile_shader", "emulate"]


def __getattr__(name: str) -> Any:
    # On demand: setup.py uses the front end before torch_fused itself can be imported.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
