"""The families of models that are known, a row each: the names of their classes, and what these compute.

A row is not taken on trust: `described.py` compares it with the classes that it names.
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
"""The classes of a family, and how their names end."""

EXPERT_PARTS = {"experts_block": "SparseMoeBlock", "router": "TopKRouter", "experts": "Experts"}
"""Those of a family with mixtures of experts."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: the attribute with its epsilon, and its roundings and offset as `rms_norm` takes them."""

    eps: str = "variance_epsilon"
    casting_mode: str = "llama"
    weight_offset: float = 0.0


ROUNDED_ONCE = Norm(casting_mode="torch")
WEIGHT_PLUS_ONE = Norm("eps", "torch", 1.0)


@dataclass(frozen=True)
class Family:
    """What a family's classes are called, and how they differ from Llama's.

    Args:
        package: they are in ``transformers.models.<package>.modeling_<package>``.
        prefix: their names begin with it.
        names: part -> class, for those whose name is another than ``prefix`` and the ending in `PARTS`.
        norm: what its RMS norms compute.
        norms_before: the layer's norms of what attention and the feed-forward layers are given; None for none.
        norms_after: of what they give, before it is added.
        qkv: the one projection to queries, keys and values; empty if they are three.
        qk_norm: "head" for norms of each query and key head, "row" for norms of all heads as one.
        gated: whether ``q_proj`` also gives a gate, whose sigmoid multiplies what the heads attended.
        use_rotary: the attribute of an attention that says whether it has positions.
        scaled_queries: whether queries are scaled by their position, past the length of the first training.
        softcap: whether attention has a soft cap.
        window: where an attention has its window from: its own ``sliding_window`` ("layer"), the configuration's
            ("config"), or it hands none on ("").
        windows: which layers have one: those that the configuration's ``layer_types`` say ("layers"), all ("all"), or
            none ("").
        gate_up: the one projection to gate and up; empty if they are two.
        activation: the attribute of the feed-forward layers that holds it.
        gelu: whether the family's models have gelu; what counts is the module.
        tables: "one" table of cosines and sines, one for each of the "layer types", or one from three "sections".
        float32_tables: whether they are float32, whatever the model's dtype, and so is the rotation.
        residual_scale: the attribute of a layer with the factor of what it adds.
        dropouts: those of what attention and the feed-forward layers give.
        embedding: the class of the embedding, if it is one of the family's, with a scale.
        embedding_scale: the attribute of the model with a factor of the embeddings.
        logits_divisor: the setting that the logits are divided by.
        logits_softcap: the setting with a soft cap of the logits.
        linear_attention: the attribute of a layer with linear attention instead, which stays with transformers.
        linear_class: its class.
        experts: whether feed-forward layers may be mixtures of experts: "routed" ones, "shared" if there is also one
            for all tokens.
        text: where the text model is in the causal language model.
        wrapper: the module and the class of that one, if it is one of `WRAPPERS`.
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
        """Classes that stay with transformers in the patch, and what they are."""
        what = "the choice of experts, their products and their sum"
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
    """The text side of a model that sees."""
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
"""Models that see, and whose text model may be of any family: what they add to it is a head alone."""

UNKNOWN = "{} is none of the models that docs/generate.md lists"
"""Of the name of a class."""

_families: dict[type, Family] = {}


def family_of(module: Any) -> Family:
    """The family of a module of a class that is known."""
    family = _families.get(type(module))
    if family is None:
        family = _families[type(module)] = KNOWN[path_of(module)][0]
    return family


def known(module: Any) -> tuple[Family, str] | tuple[None, str]:
    """The family and the part that a module's class is; of a model that sees, the family of the text model in it."""
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
