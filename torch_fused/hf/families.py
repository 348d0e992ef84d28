"""The supported model families, one row each: the names of their classes, and what they compute.

`described.py` compares each row with the classes that it names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .origin import path_of

PARTS = {
    "rms_norm": "RMSNorm",
    "rotary_embedding": "RotaryEmbedding",
    "attention": "Attention",
    "mlp": "MLP",
    "decoder_layer": "DecoderLayer",
    "model": "Model",
    "causal_lm": "ForCausalLM",
}
"""The classes of a family, and the endings of their names."""

EXPERT_PARTS = {"experts_block": "SparseMoeBlock", "router": "TopKRouter", "experts": "Experts"}
"""The additional classes of a family with mixtures of experts."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: the attribute with its epsilon, and the arguments of `rms_norm`."""

    eps: str = "variance_epsilon"
    casting_mode: str = "llama"
    weight_offset: float = 0.0


ROUNDED_ONCE = Norm(casting_mode="torch")
WEIGHT_PLUS_ONE = Norm("eps", "torch", 1.0)


@dataclass(frozen=True)
class Family:
    """The names of a family's classes, and their differences from Llama's.

    Args:
        package: the classes are in ``transformers.models.<package>.modeling_<package>``.
        prefix: the class names start with it.
        names: part -> class, for class names other than ``prefix`` plus the ending in `PARTS`.
        norm: its RMS norm.
        norms_before: a layer's norms before attention and before the feed-forward layers; None for none.
        norms_after: a layer's norms after them, before the residual addition.
        qkv: the joint projection to queries, keys and values; empty if there are three.
        qk_norm: "head" for norms of each query and key head, "row" for norms over all heads.
        gated: whether ``q_proj`` also gives a gate; its sigmoid multiplies the output of the heads.
        use_rotary: the attribute of an attention that says whether it uses rotary positions.
        scaled_queries: whether queries are scaled by position beyond the original context length.
        softcap: whether attention has a soft cap.
        window: where an attention takes its window from: its own ``sliding_window`` ("layer"), the configuration's
            ("config"), or no window ("").
        windows: the layers with a window: according to ``layer_types`` of the configuration ("layers"), all ("all"), or
            none ("").
        gate_up: the joint projection to gate and up; empty if there are two.
        activation: the attribute of the feed-forward layers with the activation.
        gelu: whether the family's models use gelu; only for documentation, the module decides.
        tables: "one" table of cosines and sines, one for each of the "layer types", or one from three "sections".
        float32_tables: whether tables and rotation are float32 for any dtype of the model.
        residual_scale: the attribute of a layer with the factor of the residual branches.
        dropouts: the dropouts after attention and after the feed-forward layers.
        embedding: the class of the embedding, if the family has its own with a scale.
        embedding_scale: the attribute of the model with the factor of the embeddings.
        logits_divisor: the setting that the logits are divided by.
        logits_softcap: the setting with the soft cap of the logits.
        linear_attention: the attribute of layers that have linear attention instead, which is left to transformers.
        linear_class: the class of this attribute.
        experts: for mixtures of experts: "routed", or "shared" if there is also a shared expert.
        text: the path of the text model in the causal language model.
        wrapper: the module and class of the causal language model, if it is one of `WRAPPERS`.
    """

    package: str
    prefix: str
    names: Mapping[str, str] = field(default_factory=dict)
    norm: Norm = Norm()
    norms_before: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str | None, str | None] = (None, None)
    qkv: str = ""
    qk_norm: str = ""
    gated: bool = False
    use_rotary: str = ""
    scaled_queries: bool = False
    softcap: bool = False
    window: str = ""
    windows: str = ""
    gate_up: str = ""
    activation: str = "act_fn"
    gelu: bool = False
    tables: str = "one"
    float32_tables: bool = False
    residual_scale: str = ""
    dropouts: tuple[str, str] | None = None
    embedding: str = ""
    embedding_scale: str = ""
    logits_divisor: str = ""
    logits_softcap: str = ""
    linear_attention: str = ""
    linear_class: str = ""
    experts: str = ""
    text: str = "model"
    wrapper: tuple[str, str] | None = None

    @property
    def home(self) -> str:
        return f"transformers.models.{self.package}.modeling_{self.package}"

    @property
    def has_step(self) -> bool:
        """Whether a model of the family can have a decode step."""
        return not (self.linear_attention or self.gated)

    @property
    def parts(self) -> Mapping[str, str]:
        return PARTS | EXPERT_PARTS if self.experts else PARTS

    @property
    def stays(self) -> dict[str, str]:
        """Classes that are left to transformers, and what they compute."""
        what = "selecting, multiplying and summing experts"
        experts = {self.name("experts_block"): what} if self.experts else {}
        return experts | ({self.linear_class: "linear attention"} if self.linear_class else {})

    def name(self, part: str) -> str:
        return self.names.get(part, self.prefix + self.parts[part])

    def path(self, part: str) -> tuple[str, str]:
        return self.wrapper if self.wrapper and part == "causal_lm" else (self.home, self.name(part))


AFTER: dict[str, Any] = {
    "norms_before": (None, None),
    "norms_after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
AROUND: dict[str, Any] = {
    "norms_before": ("input_layernorm", "pre_feedforward_layernorm"),
    "norms_after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
OWN_WINDOWS: dict[str, Any] = {"window": "layer", "windows": "layers"}
ONE_WINDOW: dict[str, Any] = {"window": "config", "windows": "all"}


def _vision(prefix: str, **names: str) -> dict[str, Any]:
    """The text side of a vision-language model."""
    names = {"model": f"{prefix}TextModel", "causal_lm": f"{prefix}ForConditionalGeneration", **names}
    return {"names": names, "tables": "sections", "text": "model.language_model"}


FAMILIES = (
    Family("llama", "Llama"),
    Family("qwen2", "Qwen2", **OWN_WINDOWS),
    Family("qwen3", "Qwen3", qk_norm="head", **OWN_WINDOWS),
    Family("mistral", "Mistral", **ONE_WINDOW),
    Family("ministral", "Ministral", **OWN_WINDOWS),
    Family("cwm", "Cwm", **OWN_WINDOWS),
    Family("ministral3", "Ministral3", scaled_queries=True, **ONE_WINDOW),
    Family("smollm3", "SmolLM3", use_rotary="use_rope", **OWN_WINDOWS),
    Family(
        "phi3",
        "Phi3",
        qkv="qkv_proj",
        gate_up="gate_up_proj",
        activation="activation_fn",
        dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
        **ONE_WINDOW,
    ),
    Family(
        "granite",
        "Granite",
        residual_scale="residual_multiplier",
        embedding_scale="embedding_multiplier",
        logits_divisor="logits_scaling",
    ),
    Family("olmo2", "Olmo2", norm=ROUNDED_ONCE, qk_norm="row", float32_tables=True, **AFTER),
    Family(
        "olmo3", "Olmo3", norm=ROUNDED_ONCE, qk_norm="row", float32_tables=True, tables="layer types",
        **AFTER, **OWN_WINDOWS,
    ),
    Family(
        "gemma2", "Gemma2", norm=WEIGHT_PLUS_ONE, gelu=True, softcap=True, embedding="Gemma2TextScaledWordEmbedding",
        logits_softcap="final_logit_softcapping", **AROUND, **OWN_WINDOWS,
    ),
    Family(
        "gemma3", "Gemma3", {"model": "Gemma3TextModel"}, norm=WEIGHT_PLUS_ONE, gelu=True, qk_norm="head",
        tables="layer types", embedding="Gemma3TextScaledWordEmbedding", logits_softcap="final_logit_softcapping",
        **AROUND, **OWN_WINDOWS,
    ),
    Family("qwen2_vl", "Qwen2VL", **_vision("Qwen2VL", mlp="Qwen2MLP"), **OWN_WINDOWS),
    Family("qwen2_5_vl", "Qwen2_5_VL", **_vision("Qwen2_5_VL", mlp="Qwen2MLP"), **OWN_WINDOWS),
    Family("qwen3_vl", "Qwen3VLText", **_vision("Qwen3VL"), qk_norm="head"),
    Family("qwen2_moe", "Qwen2Moe", windows="layers", experts="shared"),
    Family("qwen3_moe", "Qwen3Moe", qk_norm="head", window="layer", windows="all", experts="routed"),
    Family(
        "qwen3_next", "Qwen3Next", norm=WEIGHT_PLUS_ONE, qk_norm="head", gated=True, linear_attention="linear_attn",
        linear_class="Qwen3NextGatedDeltaNet", experts="shared",
    ),
    Family(
        "qwen3_5", "Qwen3_5", {"model": "Qwen3_5TextModel", "rotary_embedding": "Qwen3_5TextRotaryEmbedding"},
        norm=WEIGHT_PLUS_ONE, qk_norm="head", gated=True, tables="sections", linear_attention="linear_attn",
        linear_class="Qwen3_5GatedDeltaNet",
    ),
)  # fmt: skip

KNOWN = {family.path(part): (family, part) for family in FAMILIES for part in family.parts}
"""(module, class) -> the family and the part that this class is."""

WRAPPED_TEXT = "model.language_model"
WRAPPERS = {
    (f"transformers.models.{package}.modeling_{package}", name)
    for package, name in (
        ("gemma3", "Gemma3ForConditionalGeneration"),
        ("mistral3", "Mistral3ForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("internvl", "InternVLForConditionalGeneration"),
        ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    )
}
"""Vision-language models with a text model of any family; they add only a head to it."""

UNKNOWN = "{} is not one of the models listed in docs/generate.md"
"""To be formatted with the name of a class."""

_families: dict[type, Family] = {}


def family_of(module: Any) -> Family:
    """The family of a module with a known class."""
    family = _families.get(type(module))
    if family is None:
        family = _families[type(module)] = KNOWN[path_of(module)][0]
    return family


def has_family(module: Any) -> bool:
    return type(module) in _families or path_of(module) in KNOWN


def known(module: Any) -> tuple[Family, str] | tuple[None, str]:
    """The family and the part of a module's class; for a vision-language model, the family of its text model."""
    path = path_of(module)
    if path not in WRAPPERS:
        return KNOWN.get(path, (None, ""))
    family, part = KNOWN.get(path_of(module.get_submodule(WRAPPED_TEXT)), (None, ""))
    if family is None or part != "model":
        return None, ""
    return replace(family, wrapper=path, text=WRAPPED_TEXT, logits_divisor="", logits_softcap=""), "causal_lm"


def family_of_model(model: Any) -> Family | None:
    """The family of a causal language model; None if there is none."""
    family, part = known(model)
    return family if part == "causal_lm" else None
