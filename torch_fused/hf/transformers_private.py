"""All uses of transformers' private interface, checked with 5.17 and 5.24.

If a later version removes or renames something, fix it here.
"""

import functools
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.distributed.fsdp import is_fsdp_managed_module
from transformers.generation.utils import ALL_CACHE_NAMES, DeferredStopCheck
from transformers.integrations import moe
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

CACHE = "cache"
"""Transformers' name for the cache in arguments and outputs; before 5.24 it was ``past_key_values``."""
if CACHE not in signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE = "past_key_values"

KWARGS_REACH_CACHE = CACHE == "cache"
"""Whether attention passes its other arguments on to the cache, as from 5.24 on."""

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method with which `generate` creates its cache, or takes the user's."""

IDLE_HOOK = ("transformers.utils.output_capturing", "output_capturing_hook")
"""The hook that stays on layers after a call for hidden states or attentions; it does nothing in other calls."""


def kept_in_float32(module: Any) -> list[str]:
    """Names of modules that the class keeps in float32 for any dtype of the model."""
    return list(getattr(module, "_keep_in_fp32_modules", None) or ())


def attention_of(config: Any) -> str:
    """The name of a model's attention function."""
    return config._attn_implementation


def mask_function_of(attention: str) -> Any:
    """The function that makes the masks for an attention function."""
    return ALL_MASK_ATTENTION_FUNCTIONS[attention]


def experts_function_of(config: Any) -> Any:
    """The function that computes the experts; None if the class's own forward does."""
    return moe.ALL_EXPERTS_FUNCTIONS.get(getattr(config, "_experts_implementation", None) or "eager", None)


APPLY_GATE = "_apply_gate"
"""The method of experts between their projections, in all implementations except "eager"."""


def has_own_gate(cls: Any) -> bool:
    """Whether a class has transformers' own method: the activation of one half times the other."""
    own = getattr(moe, "_default_apply_gate", None)
    return own is not None and getattr(cls, APPLY_GATE, None) is own


@functools.cache
def cache_argument(cls: Any) -> str:
    """The name of the cache argument of a linear attention class, which used to differ from `CACHE`."""
    return CACHE if CACHE in signature(cls.forward).parameters else "cache_params"


# ---- generate -------------------------------------------------------------------------------------------------------


def prepare_cache(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any], *more: Any) -> None:
    """Calls the class's own method."""
    getattr(type(model), PREPARE_CACHE)(model, config, model_kwargs, *more)


def is_in_step_with_others(model: Any) -> bool:
    """Whether all processes must call the model equally often, because it is sharded."""
    return is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)


def pad_token(config: Any, device: torch.device) -> Tensor:
    return config._pad_token_tensor.to(device)


def prefill(model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """The outputs for the prompt, which may be processed in chunks."""
    return model._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)


def after(model: Any, outputs: Any, model_kwargs: dict[str, Any], tokens: int = 1) -> dict[str, Any]:
    """The arguments of the model's next call, after a call that `tokens` new tokens followed."""
    return model._update_model_kwargs_for_generation(outputs, model_kwargs, num_new_tokens=tokens)


def cache_in(model_kwargs: dict[str, Any]) -> Any:
    return next((model_kwargs[name] for name in ALL_CACHE_NAMES if model_kwargs.get(name) is not None), None)


def compiled_call(model: Any, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """The function that `generate` calls for a new token: the compiled model for a static cache on a GPU."""
    if model._valid_auto_compile_criteria(model_kwargs, config):
        return model.get_compiled_call(config.compile_config)
    return model


def optimized_for_decode(model: Any) -> Any:
    """The context in which `generate` calls a model for new tokens."""
    return model._optimize_model_for_decode()


def forward_may_be_early(input_ids: Tensor, config: GenerationConfig, cache: Any) -> bool:
    """Whether `generate` calls the model before it knows whether the previous token was the last."""
    return DeferredStopCheck.is_supported(input_ids.device, cache, True, is_assistant=config.is_assistant)
