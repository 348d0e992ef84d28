"""LoRA adapters of PEFT on packed linear layers."""

from typing import Any

from torch import nn

from ..nn import QuantizedLinear

LORA_CLASS = (__name__, "prepare_lora.<locals>.LoraQuantizedLinear")
"""Where the class is that PEFT's adapters on packed layers have."""


def prepare_lora(config: Any) -> Any:
    """Lets PEFT put its adapters on packed linear layers: the same ``LoraConfig``, to be used as always.

    The packed matrices do not change; they pass gradients on to the adapters before them. Adapters cannot be merged,
    as the sum would have to be rounded to the codes again: dequantise the model first. Give ``target_modules`` by
    name, as PEFT's ``"all-linear"`` knows its own classes alone.

    Args:
        config: a ``peft.LoraConfig``, new or from ``LoraConfig.from_pretrained``.

    Returns:
        ``config``.

    Raises:
        TypeError: ``config`` is no LoraConfig.

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
                "merge: the matrix is packed, and adding the adapter would round it again: keep the adapter, or "
                "dequantise the model before adapters are added to it"
            )

    config._register_custom_module({QuantizedLinear: LoraQuantizedLinear})
    return config
