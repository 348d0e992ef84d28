"""Finds out whose code runs: transformers', torch's, ours, or foreign code."""

import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import nn

_OURS = os.path.join(os.path.dirname(__file__), "")
_DECORATORS = (os.path.join(os.path.dirname(transformers.__file__), ""), torch.no_grad.__call__.__code__.co_filename)
"""Files of decorators that count as part of the function: those of transformers, and that of `torch.no_grad`."""

_found: dict[Any, Any] = {}
"""Class -> (forward, its module), and module -> its rotation functions, cached once they were found unmodified."""


class Bound(partial):
    """A function bound to a model, with the attributes of a method, which accelerate needs.

    Unlike a method, it can be pickled with the model.
    """

    @property
    def __func__(self) -> Any:
        return self.func

    @property
    def __self__(self) -> Any:
        return self.args[0]


def function_of(method: Any) -> Any:
    """The function of a method or of one of our partials; None for anything else."""
    return getattr(method, "func", None) or getattr(method, "__func__", None)


def is_ours(method: Any, module: nn.Module) -> bool:
    """Whether `method` is one of our functions bound to `module`, by us or by code like accelerate's."""
    if not _file(function_of(method)).startswith(_OURS):
        return False
    return (method.args[0] if isinstance(method, partial) else method.__self__) is module


def class_of(module: Any) -> Any:
    """The class of a module; for FSDP's subclass, the original class."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def path_of(module: Any) -> tuple[str, str]:
    """The module and name of `class_of`."""
    cls = class_of(module)
    return cls.__module__, cls.__qualname__


def class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def home_of(cls: type) -> ModuleType | None:
    """The Python module that defines the forward of a class of transformers or torch; None if it was replaced."""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    found = _found.get(cls)
    if found is None or found[0] is not forward:
        own = innermost(forward)
        path = None if own is None else (own.__module__, own.__qualname__)
        if own is None or path not in [(base.__module__, f"{base.__qualname__}.forward") for base in cls.__mro__]:
            return None
        found = _found[cls] = forward, sys.modules[own.__module__]
        if hasattr(found[1], "rotate_half"):
            has_own_rotation(found[1])  # cached now, for a compiler
    return found[1]


def has_own_rotation(home: Any) -> bool:
    """Whether the rotation functions of a modeling module of transformers are unmodified."""
    functions = home.apply_rotary_pos_emb, home.rotate_half
    if _found.get(home.__name__) != functions:
        if not all(is_own(function, home.__name__) for function in functions):
            return False
        if not any(isinstance(function, nn.Module) for function in functions):  # these may load kernels later
            _found[home.__name__] = functions
    return True


def is_own(function: Any, *modules: str) -> bool:
    """Whether a function is transformers' original, defined in one of `modules` if any are given."""
    plain = _function_of_kernel(function)
    own = innermost(plain)
    return own is not None and own.__qualname__ == own.__name__ and (not modules or own.__module__ in modules)


def innermost(function: Any) -> FunctionType | None:
    """The function inside transformers' decorators if transformers, torch or we define it; else None."""
    while hasattr(function, "__wrapped__"):
        if not _file(function).startswith(_DECORATORS):
            return None
        function = function.__wrapped__
    home = sys.modules.get(getattr(function, "__module__", None) or "")
    if home is None or home.__name__.partition(".")[0] not in ("transformers", "torch", "torch_fused"):
        return None
    return function if _file(function) == home.__file__ else None


def describe(method: Callable | None) -> str:
    """The name of a function, for reports."""
    if method is None:
        return "the class's own"
    function = getattr(method, "__func__", method)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"


def _file(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_filename


def _function_of_kernel(function: Any) -> Any:
    """The original function inside a module that the package ``kernels`` put in its place."""
    if isinstance(function, nn.Module) and type(function).__module__.startswith("kernels."):
        if "forward" in function.__dict__:
            return None
        return inspect.getclosurevars(type(function).forward).nonlocals.get("func")
    return function
