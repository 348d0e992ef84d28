"""Whose code runs: transformers' and torch's own, ours, or somebody else's."""

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
"""Where decorators come from that are part of what they decorate: transformers, and the one file of `torch.no_grad`."""

_found: dict[Any, Any] = {}
"""Class -> (forward, its module), and module -> its functions that rotate, once found to be as they were written."""


class Bound(partial):
    """A function bound to a model like a method: accelerate looks for what a method has.

    Like a partial, which is bound to the modules inside, and unlike a method, it can be pickled with the model.
    """

    @property
    def __func__(self) -> Any:
        return self.func

    @property
    def __self__(self) -> Any:
        return self.args[0]


def function_of(method: Any) -> Any:
    """The function that is bound, as a method or by us; None if it is neither."""
    return getattr(method, "func", None) or getattr(method, "__func__", None)


def is_ours(method: Any, module: nn.Module) -> bool:
    """Whether `method` is a function of ours bound to `module`, by us or anew by somebody like accelerate."""
    if not _file(function_of(method)).startswith(_OURS):
        return False
    return (method.args[0] if isinstance(method, partial) else method.__self__) is module


def class_of(module: Any) -> Any:
    """The class of a module; the one that FSDP made its own of, if it did."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def path_of(module: Any) -> tuple[str, str]:
    """The module and the name of `class_of`."""
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
            has_own_rotation(found[1])  # found now, for a compiler too
    return found[1]


def has_own_rotation(home: Any) -> bool:
    """Whether a modeling module of transformers still rotates queries and keys as it was written to."""
    functions = home.apply_rotary_pos_emb, home.rotate_half
    if _found.get(home.__name__) != functions:
        if not all(is_own(function, home.__name__) for function in functions):
            return False
        if not any(isinstance(function, nn.Module) for function in functions):  # those load kernels at any time
            _found[home.__name__] = functions
    return True


def is_own(function: Any, *modules: str) -> bool:
    """Whether a function is as transformers defines it, in one of `modules` if any are given."""
    plain = _function_of_kernel(function)
    own = innermost(plain)
    return own is not None and own.__qualname__ == own.__name__ and (not modules or own.__module__ in modules)


def innermost(function: Any) -> FunctionType | None:
    """What transformers' decorators hold, if a module of transformers, torch or ours defines it; else None."""
    while hasattr(function, "__wrapped__"):
        if not _file(function).startswith(_DECORATORS):
            return None
        function = function.__wrapped__
    home = sys.modules.get(getattr(function, "__module__", None) or "")
    if home is None or home.__name__.partition(".")[0] not in ("transformers", "torch", "torch_fused"):
        return None
    return function if _file(function) == home.__file__ else None


def describe(method: Callable | None) -> str:
    """A name for somebody's function, in reports."""
    if method is None:
        return "the class's own"
    function = getattr(method, "__func__", method)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"


def _file(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_filename


def _function_of_kernel(function: Any) -> Any:
    """What the package ``kernels`` has put in a module, while it still calls that."""
    if isinstance(function, nn.Module) and type(function).__module__.startswith("kernels."):
        if "forward" in function.__dict__:
            return None
        return inspect.getclosurevars(type(function).forward).nonlocals.get("func")
    return function
