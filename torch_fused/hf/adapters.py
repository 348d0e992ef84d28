"""PEFT's LoRA adapters on packed linear layers."""

from typing import Any

from torch import nn

from ..nn import QuantizedLinear

LORA_CLASS = (__name__, "prepare_lora.<locals>.LoraQuantizedLinear")
"""Module and name of the class of PEFT's adapters on packed layers."""


def prepare_lora(config: Any) -> Any:
    """Lets PEFT add LoRA adapters to packed linear layers. Returns the same ``LoraConfig``.

    The packed matrices do not change; gradients pass through them. Adapters cannot be merged, because the sum would
    have to be quantised again: dequantise the model before adding adapters. List ``target_modules`` by name, because
    PEFT's ``"all-linear"`` does not include packed layers.

    Args:
        config: a ``peft.LoraConfig``, new or from ``LoraConfig.from_pretrained``.

    Returns:
        ``config``.

    Raises:
        TypeError: ``config`` is not a LoraConfig.

    Example:
        >>> import peft
        >>> config = prepare_lora(peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
        >>> trained = peft.get_peft_model(model, config)
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    if not isinstance(config, LoraConfig):
        raise TypeError(f"prepare_lora: config must be a peft.LoraConfig, got {type(config).__name__}")

    class LoraQuantizedLinear(Linear):
        def _get_in_out_features(self, module: nn.Module) -> Any:
            return module.in_features, module.out_features

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError(
                "merge: an adapter cannot be merged into a packed matrix, which would have to be quantised again. Keep "
                "the adapter, or dequantise the model before adding adapters."
            )

    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config
