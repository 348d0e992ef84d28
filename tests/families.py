"""A small random model of each family."""

import importlib
from typing import Any

import torch

from torch_fused.hf.families import FAMILIES

VOCABULARY = 128
WINDOW = 6
ROWS = {family.package: family for family in FAMILIES}
SLIDING = ["sliding_attention", "full_attention"]
LINEAR = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LINEAR_HEADS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING},
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "cwm": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 64},
    },
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"sliding_window": WINDOW, "resid_pdrop": 0.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "olmo3": {"sliding_window": WINDOW, "layer_types": SLIDING},
    "gemma2": {
        "sliding_window": WINDOW,
        "layer_types": SLIDING,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 12},
    "qwen2_vl": SECTIONS,
    "qwen2_5_vl": SECTIONS,
    "qwen3_vl": SECTIONS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**EXPERTS, **LINEAR_HEADS, "shared_expert_intermediate_size": 48, "layer_types": LINEAR},
    "qwen3_5": {**LINEAR_HEADS, "layer_types": LINEAR, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
}
"""Settings that show a family's traits, in addition to the common shape."""

VISION = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}


def make_config(package: str, **changes: Any) -> Any:
    """The configuration of a small model."""
    family = ROWS[package]
    config_of = importlib.import_module(family.home.replace("modeling", "configuration"))
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.15,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **SETTINGS.get(package, {}),
        **changes,
    }
    if family.text == "model":
        text = getattr(config_of, class_of_config(family.name("model")))
        return text(**settings)
    whole = getattr(config_of, family.name("causal_lm").removesuffix("ForConditionalGeneration") + "Config")
    return whole(text_config=settings, vision_config=VISION)


WRAPPED = {"Gemma3": "gemma3", "Mistral3": "mistral", "Llava": "llama", "InternVL": "qwen2"}
"""Models that see, by how their classes begin, and the family that a small one of them has for its text."""
IMAGE_TOKENS = {"Gemma3": 4, "Mistral3": 2, "Llava": 4, "InternVL": 1}
"""Tokens that stand for the image of a small model of them."""
IMAGE_TOKEN = VOCABULARY - 1


def image_prompt(prefix: str) -> dict[str, torch.Tensor]:
    """A few tokens, an image and a few more."""
    image = torch.full((1, IMAGE_TOKENS[prefix]), IMAGE_TOKEN)
    ids = torch.cat([prompt(1, 3) % IMAGE_TOKEN, image, prompt(1, 4, seed=1) % IMAGE_TOKEN], 1)
    size = (16, 32) if prefix == "Mistral3" else (16, 16)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))}
    inputs |= {"token_type_ids": (ids == IMAGE_TOKEN).long()} if prefix == "Gemma3" else {}
    return inputs | ({"image_sizes": torch.tensor([size])} if prefix == "Mistral3" else {})


def make_wrapped(prefix: str) -> Any:
    package = prefix.lower()
    config_of = importlib.import_module(f"transformers.models.{package}.configuration_{package}")
    models = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    kinds = {"Gemma3": "siglip_vision_model", "Mistral3": "pixtral", "Llava": "clip_vision_model"}
    size = 32 if prefix == "Mistral3" else 16
    vision = {"image_size": size, "patch_size": 8, **sizes, "model_type": kinds.get(prefix, "internvl_vision")}
    image = {"image_token_id" if prefix == "InternVL" else "image_token_index": IMAGE_TOKEN}
    image |= {"mm_tokens_per_image": 4} if prefix == "Gemma3" else {}
    text = make_config(WRAPPED[prefix])
    config = getattr(config_of, f"{prefix}Config")(text_config=text, vision_config=vision, **image)
    torch.manual_seed(0)
    model = getattr(models, f"{prefix}ForConditionalGeneration")(config).eval()
    if prefix == "Gemma3":  # it is initialised to zeros, so an image would change nothing
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model


def class_of_config(model: str) -> str:
    return model.removesuffix("Model") + "Config"


def make_model(package: str, kind: str = "causal_lm", *, seed: int = 0, dtype=torch.float32, **changes: Any) -> Any:
    """A model with random weights; `kind` may be a class's ending, such as "ForSequenceClassification"."""
    family = ROWS[package]
    name = family.name("causal_lm") if kind == "causal_lm" else family.prefix + kind
    config = make_config(package, **changes)
    torch.manual_seed(seed)
    model = getattr(importlib.import_module(family.home), name)(config).eval()
    for path, weight in model.named_parameters():
        if "norm" in path and weight.dim() == 1:
            offset = family.norm.weight_offset  # ones would hide how the weight is applied
            torch.nn.init.uniform_(weight, 0.5 - offset, 1.5 - offset)
        elif path.endswith("bias"):
            torch.nn.init.uniform_(weight, -0.2, 0.2)
    return model.to(dtype)


def prompt(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
