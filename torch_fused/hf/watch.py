"""Whether a model is still made of the same modules and tensors, cheap enough to ask with every token."""

from operator import is_not
from typing import Any

from torch import nn

GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
_NUMBERS = ("variance_epsilon", "scaling")


class Watch:
    """A model as it was when this was made; changes of values in place do not matter."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        self._hooks: list[dict] = list(GLOBAL_HOOKS)
        self._lookups: list[tuple[Any, str]] = []  # (a dict's get, key)
        for module in self._modules:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for owned in (module._modules, module._parameters, module._buffers):
                self._lookups += [(owned.get, name) for name in owned]
            names = ["forward", *(name for name in _NUMBERS if name in module.__dict__)]
            self._lookups += [(module.__dict__.get, name) for name in names]
        self._found = [get(name) for get, name in self._lookups]
        self._hooked = list(map(bool, self._hooks))
        self._parameter = next(model.parameters(), None)
        self._kind = self._present_kind()

    def _present_kind(self) -> Any:
        """What ``model.to()`` changes, which keeps the parameters themselves."""
        return None if self._parameter is None else (self._parameter.dtype, self._parameter.device)

    def holds(self) -> bool:
        found = [get(name) for get, name in self._lookups]
        return not (
            any(map(is_not, found, self._found))
            or any(map(is_not, map(type, self._modules), self._classes))
            or any(map(is_not, map(bool, self._hooks), self._hooked))
            or self._present_kind() != self._kind
        )
