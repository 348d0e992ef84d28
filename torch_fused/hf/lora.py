"""PEFT's LoRA adapters on linear layers, for the decode step."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import LORA_CLASS

MERGE = "merge the adapter with peft's merge_and_unload()"


@dataclass(frozen=True)
class Low:
    """An active adapter, which adds ``scale * b(a(dropout(x)))`` to a layer."""

    a: nn.Linear
    b: nn.Linear
    scale: float
    dropout: nn.Module


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a linear layer with PEFT's LoRA, with PEFT's original code."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module).__module__ not in (layers.__name__, LORA_CLASS[0]):
        return False
    linear: Any = layers.Linear
    ours = (type(module).__module__, type(module).__qualname__) == LORA_CLASS
    forward = type(module).forward
    return (type(module) is linear or ours) and forward is linear.forward and _is_peft(forward, layers)


def _is_peft(function: Any, module: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == module.__file__


def lora_of(module: Any) -> tuple[list[Low], str]:
    """The active adapters of a layer for which `is_lora` holds, or why they are not supported."""
    if module.disable_adapters and module.merged:  # PEFT unmerges it in the next call
        return [], "a merged adapter is disabled; call the model once to unmerge it"
    if module.disable_adapters or module.merged:
        return [], ""
    found: list[Low] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if name in module.lora_variant:
            return [], f"adapter {name!r} is a {type(module.lora_variant[name]).__name__}, not plain LoRA: {MERGE}"
        if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None or b.bias is not None:
            return [], f"adapter {name!r} has matrices other than plain linear layers without biases: {MERGE}"
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return [], f"adapter {name!r} has a {type(dropout).__name__}: {MERGE}"
        found.append(Low(a, b, float(module.scaling[name]), dropout))
    return found, ""


def settings_of(module: Any) -> list[tuple[Callable[[Any], Any], Any]]:
    """Functions and arguments with results that change when the adapters of a layer change."""
    if not is_lora(module):
        return []
    own = module.__dict__.get
    lookups = [(own, name) for name in ("_active_adapter", "_disable_adapters", "cast_input_dtype_enabled")]
    lookups += [(module.scaling.get, name) for name in module.scaling]
    return [*lookups, (len, module.merged_adapters), (len, module.lora_A._modules), (len, module.lora_variant)]
