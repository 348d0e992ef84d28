"""Decoders with random weights in the shapes of published ones."""

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from torch_fused.hf import quantize_

GROUP_SIZE = 64  # of packed weights
MODELS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())


def config(name: str, **changes: int) -> Any:
    common = {"tie_word_embeddings": True, "max_position_embeddings": 65536}
    return AutoConfig.for_model(**common | MODELS[name] | changes)


def made(name: str, dtype: torch.dtype, device: str = "cpu", bits: int = 0, **changes: int) -> Any:
    """A model of these sizes; dense for 0 bits."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config(name, **changes)).to(dtype).eval()
    if bits:
        quantize_(model, bits=bits, group_size=GROUP_SIZE)
    return model


def adapted(model: Any, targets: str | list[str] = "all-linear", rank: int = 16, mixed: bool = False) -> Any:
    """With LoRA, by default on every matrix of the layers, in the model's dtype or, as PEFT has it, in float32."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return model if mixed else model.to(dtype)
