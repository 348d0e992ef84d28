"""Checks whether a model still has the same modules, tensors and functions, fast enough to run for every token."""

from operator import is_not
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .lora import settings_of
from .origin import home_of
from .transformers_private import APPLY_GATE, IDLE_HOOK

GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
FUNCTIONS = (
    "apply_rotary_pos_emb",
    "rotate_half",
    "repeat_kv",
    "eager_attention_forward",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "slice_logits_to_keep",
)
"""Functions that the classes of a family call by name in their module."""

_NUMBERS = {
    *("variance_epsilon", "eps", "scaling", "attention_scaling", "rope_type", "attention_dropout", "is_causal", "p"),
    *("use_rope", "attn_logit_softcapping", "residual_multiplier", "embedding_multiplier", "head_dim", "approximate"),
    *("top_k", "norm_topk_prob", "layer_idx"),
}
"""Attributes of modules that a decode step depends on."""

_SETTINGS = ("sliding_window", "logits_scaling", "final_logit_softcapping")
"""Settings of a configuration that a decode step depends on."""


class Watch:
    """A snapshot of a model's structure; in-place changes of values do not matter."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._classes = list(map(type, self._modules))
        self._hooks: list[dict] = list(GLOBAL_HOOKS)
        self._lookups: list[tuple[Any, str]] = []  # (a dict's get, key)
        for module in self._modules:
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for owned in (module._modules, module._parameters, module._buffers):
                self._lookups += [(owned.get, name) for name in owned]
            self._lookups += settings_of(module)
            if isinstance(module, PreTrainedModel):
                self._lookups += [(module.__dict__.get, "config")]
                self._lookups += [(vars(module.config).get, name) for name in _SETTINGS]
            numbers = [
                name for name in list(module.__dict__) if name in _NUMBERS or name.endswith("_attention_scaling")
            ]
            names = ["forward", *([APPLY_GATE] if hasattr(type(module), APPLY_GATE) else []), *numbers]
            self._lookups += [(module.__dict__.get, name) for name in names]
        for cls in set(self._classes):
            self._lookups += [(vars(cls).get, name) for name in ("forward", APPLY_GATE) if hasattr(cls, name)]
        homes: dict[str, Any] = {home.__name__: home for home in map(home_of, set(self._classes)) if home is not None}
        for home in homes.values():
            functions = [(name, vars(home)[name]) for name in FUNCTIONS if name in vars(home)]
            self._lookups += [(vars(home).get, name) for name, _ in functions]
            # Functions that can be replaced by kernels are modules.
            self._lookups += [(vars(f).get, "forward") for _, f in functions if isinstance(f, nn.Module)]
        self._found = [get(name) for get, name in self._lookups]
        self._hooked = list(map(len, self._hooks))
        self._parameter = next(model.parameters(), None)
        self._kind = self._present_kind()

    def _present_kind(self) -> Any:
        """The dtype and device, which ``model.to()`` changes while it keeps the parameters."""
        return None if self._parameter is None else (self._parameter.dtype, self._parameter.device)

    def holds(self) -> bool:
        found = [get(name) for get, name in self._lookups]
        return not (
            any(map(is_not, found, self._found))
            or any(map(is_not, map(type, self._modules), self._classes))
            or any(map(is_not, map(len, self._hooks), self._hooked))
            or self._present_kind() != self._kind
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module's forward has hooks that may change anything."""
    return bool(module._forward_pre_hooks) or not all(map(_is_idle, module._forward_hooks.values()))


def _is_idle(hook: Any) -> bool:
    """Whether a hook has no effect on a call without gradients that returns only logits."""
    code = getattr(hook, "__code__", None)
    return code is not None and (hook.__module__, code.co_name) in _IDLE


_IDLE = {
    # Present after the first call that asks for hidden states or attentions.
    IDLE_HOOK,
    # From enable_input_require_grads, and the equivalents of adapter trainers.
    ("transformers.modeling_utils", "make_inputs_require_grads"),
    ("peft.peft_model", "make_inputs_require_grad"),
    ("peft.utils.other", "make_inputs_require_grad"),
    ("trl.experimental.utils", "make_inputs_require_grad"),
}
