"""Checks whether a class computes what its family's row says, from its code and a small trial.

A forward is compared by the names that it uses, in the order of their first use. A feature that a later version of
transformers adds, or that a row lacks, shows up as an unknown name. Rounding is compared on a few numbers.
"""

from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.rms_norm import rms_norm_reference
from ..ops.rope import apply_rotary_pos_emb_reference
from .families import WRAPPED_TEXT, Family, known
from .origin import class_name, class_of, home_of, innermost

Steps = list[set[str]]
"""Names in the order in which a forward uses them; names in one set may come in any order."""


def _words(text: str) -> set[str]:
    return set(text.split())


COMMON = _words("""
    config shape size view reshape transpose contiguous training attention_mask position_ids hidden_states
    position_embeddings cache cache_params past_key_values use_cache input_ids inputs_embeds labels kwargs dim
""")
"""Names that any forward may use without computing something different."""

PLUMBING = {
    "rotary_embedding": _words("""
        float inv_freq to device torch cat expand isinstance type str maybe_autocast enabled device_type mps cpu
        getattr _inv_freq _attention_scaling
    """),
    "attention": _words("""
        head_dim layer_idx get_interface _attn_implementation eager_attention_forward dropout torch
    """),
    "mlp": set(),
    "decoder_layer": _words("isinstance tuple full_attention"),
    "experts_block": {"F"},
    "router": _words("hidden_dim F torch nn functional float dtype keepdim"),
    "experts": _words("""
        zeros_like torch no_grad nn functional one_hot num_experts permute greater sum nonzero where linear chunk to
        dtype num_classes
    """),
    # Bidirectional attention is detected by `is_causal`; deepstack is for images.
    "model": _words("""
        ValueError DynamicCache get_seq_length torch arange device unsqueeze isinstance dict enumerate
        num_hidden_layers set jit is_tracing view expand ndim range len copy full_attention sliding_attention
        linear_attention create_recurrent_attention_mask has_sliding_layers last_hidden_state dtype tensor bool
        use_bidirectional_attention _bidirectional_window_overlay or_mask_function _deepstack_process
    """),
    "causal_lm": _words("""
        last_hidden_state slice_logits_to_keep isinstance int slice vocab_size attentions logits loss torch
        text_config image_outputs video_outputs pixel_values pixel_values_videos image_grid_thw video_grid_thw
        mm_token_type_ids mm_encoder_outputs second_per_grid_ts rope_deltas token_type_ids image_sizes return_dict
        vision_feature_layer vision_feature_select_strategy output_router_logits router_logits
        load_balancing_loss_func num_experts num_experts_per_tok router_aux_loss_coef aux_loss to device
        image_hidden_states
    """),
}
"""The same, per part."""


def mismatch(module: nn.Module) -> str:
    """Why a module does not match the row that names its class; empty if it does."""
    family, part = known(module)
    if family is None:
        return f"its text model, {class_name(module.get_submodule(WRAPPED_TEXT))}, is not of a supported family"
    return of_class(class_of(module), family, part) or _unknown_parts(module, family, part)


_found: dict[type, tuple[Any, str]] = {}
"""Class -> its forward, and the difference."""


def of_class(cls: type, family: Family, part: str) -> str:
    """The difference between a class and its row."""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    found = _found.get(cls)
    if found is None or found[0] is not forward:
        found = _found[cls] = forward, _differs(cls, family, part)
    return found[1]


def _differs(cls: type, family: Family, part: str) -> str:
    if part == "rms_norm":
        return "" if _norms_alike(cls, family) else f"its norm differs from the row of {family.prefix}"
    plumbing = PLUMBING[part] | COMMON | (_of_layers(family) if part == "model" else set())
    differs = compare(steps(family, part), plumbing, names_of(cls.forward))  # type: ignore[attr-defined]
    if differs:
        return f"{differs} the row of {family.prefix}"
    if part == "attention" and not _rotates_alike(home_of(cls), family):
        return "its apply_rotary_pos_emb gives different results"
    return ""


def compare(expected: Steps, plumbing: set[str], used: list[str]) -> str:
    """How the names that a forward uses differ from a row; empty if they are the same."""
    place = {name: i for i, names in enumerate(expected) for name in names}
    unknown = [name for name in used if name not in place and not _is_plumbing(name, plumbing)]
    if unknown:
        return f"its forward uses {', '.join(unknown)}, not in"
    missing = [name for name in place if name not in used]
    if missing:
        return f"its forward does not use {', '.join(missing)}, unlike"
    order = [place[name] for name in used if name in place and not _is_constant(name)]
    return "" if order == sorted(order) else "its forward has another order than"


def _is_plumbing(name: str, plumbing: set[str]) -> bool:
    keyword = _is_constant(name) and (name[1:-1] in plumbing or name == "'dtype'")
    return keyword or name in plumbing or name.endswith("OutputWithPast")


def _is_constant(name: str) -> bool:
    return name.startswith("'")


def names_of(forward: Any) -> list[str]:
    """The names that a function uses in the order of first use, then names in its constants, in quotes."""
    function = innermost(forward)
    if function is None:
        return ["code from outside transformers"]
    names = _names(function.__code__)
    return [name for name in names if name.strip("'") not in names or not _is_constant(name)]


def _names(code: CodeType) -> list[str]:
    used, constants = list(code.co_names), []
    documentation = code.co_consts[:1]
    for value in code.co_consts:
        if isinstance(value, CodeType):
            used += _names(value)
        elif isinstance(value, tuple | str) and (value,) != documentation:
            texts = value if isinstance(value, tuple) else (value,)
            constants += [repr(text) for text in texts if isinstance(text, str) and text.isidentifier()]
    return list(dict.fromkeys(used + constants))


# ---- the names that a row expects in each forward -------------------------------------------------------------------


def steps(family: Family, part: str) -> Steps:
    """The names that a forward must use to compute what the row says."""
    return [names for names in _STEPS[part](family) if names]


def _rotary(family: Family) -> Steps:
    scaling = "'_attention_scaling'" if family.tables == "layer types" else "attention_scaling"
    sections = {"recomposition_frequencies"} if family.tables == "sections" else set()
    return [{"cos", "sin", scaling}, sections, set() if family.float32_tables else {"dtype"}]  # the model's


def _attention(family: Family) -> Steps:
    if family.qkv:
        projections = {family.qkv, "num_attention_heads", "num_key_value_heads"}
    else:
        projections = {"q_proj", "k_proj", "v_proj"}
    if family.qk_norm:
        projections |= {"q_norm", "k_norm"}
    if family.gated:
        projections |= {"chunk"}
    scaled = {"get_llama_4_attn_scale", "rope_parameters", "get", "to", "dtype"}
    scaled |= {"'llama_4_scaling_beta'", "'original_max_position_embeddings'"}
    attend = {"ALL_ATTENTION_FUNCTIONS", "attention_dropout", "scaling"}
    attend |= {"layer": {"sliding_window"}, "config": {"getattr", "'sliding_window'"}, "": set()}[family.window]
    attend |= {"attn_logit_softcapping", "'softcap'"} if family.softcap else set()
    return [
        projections,
        _one(family.use_rotary),
        {"apply_rotary_pos_emb"},
        scaled if family.scaled_queries else set(),
        {"update"},
        attend,
        {"sigmoid"} if family.gated else set(),
        {"o_proj"},
    ]


def _mlp(family: Family) -> Steps:
    projections = {family.gate_up, "chunk"} if family.gate_up else {"gate_proj", "up_proj"}
    return [{"down_proj", family.activation, *projections}]


def _experts_block(family: Family) -> Steps:
    shared = {"shared_expert", "shared_expert_gate", "sigmoid"} if family.experts == "shared" else set()
    return [{"gate", "experts", *shared}]


def _router(family: Family) -> Steps:
    return [{"linear", "weight"}, {"softmax"}, {"topk", "top_k"}, {"norm_topk_prob", "sum"}, {"to"}]


def _experts(family: Family) -> Steps:
    return [{"gate_up_proj", "act_fn"}, {"down_proj"}, {"index_add_"}]


def _layer(family: Family) -> Steps:
    mixers = {"self_attn"}
    if family.linear_attention:
        mixers |= {family.linear_attention, "block_type", "'linear_attention'"}
    (before, before_mlp), (after, after_mlp) = family.norms_before, family.norms_after
    drop, drop_mlp = family.dropouts or ("", "")
    return [
        _one(before),
        mixers,
        _one(after),
        _one(drop),
        _one(family.residual_scale),
        _one(before_mlp),
        {"mlp"},
        _one(after_mlp),
        _one(drop_mlp),
    ]


def _model(family: Family) -> Steps:
    masks = {"create_causal_mask"}
    if family.windows:
        masks |= {"create_sliding_window_causal_mask"}
    return [{"embed_tokens"}, _one(family.embedding_scale), masks, {"rotary_emb"}, {"layers"}, {"norm"}]


def _of_layers(family: Family) -> set[str]:
    """The settings that distinguish a model's layers; they may be used anywhere."""
    types = {"layer_types"} if family.windows == "layers" or family.linear_attention else set()
    return types | ({"sliding_window"} if family.windows == "all" or family.tables == "layer types" else set())


def _causal_lm(family: Family) -> Steps:
    softcap = {family.logits_softcap, "tanh"} if family.logits_softcap else set()
    return [{"model"}, {"lm_head"}, _one(family.logits_divisor), softcap, {"loss_function"}]


_STEPS = {
    "rotary_embedding": _rotary,
    "attention": _attention,
    "mlp": _mlp,
    "decoder_layer": _layer,
    "experts_block": _experts_block,
    "router": _router,
    "experts": _experts,
    "model": _model,
    "causal_lm": _causal_lm,
}


def _one(name: str | None) -> set[str]:
    return {name} if name else set()


# ---- the contents of a module ---------------------------------------------------------------------------------------


def _unknown_parts(module: nn.Module, family: Family, part: str) -> str:
    """Parameters, buffers and modules that are not in the row."""
    known = {name for names in steps(family, part) for name in names} if part != "rms_norm" else {"weight"}
    held: Iterable[str] = (*module._parameters, *module._buffers, *module._modules)
    unknown = [name for name in held if name not in known and not name.endswith("inv_freq")]
    return f"it has {', '.join(unknown)}, not in the row of {family.prefix}" if unknown else ""


# ---- trials ---------------------------------------------------------------------------------------------------------


def _norms_alike(cls: type, family: Family) -> bool:
    """Whether a norm of the class gives the same bits as `rms_norm` for its row."""
    norm = family.norm
    try:
        with torch.device("cpu"), torch.no_grad():
            own = cls(8, 0.1).to(torch.bfloat16)
            own.weight.copy_(_numbers(8))
            x = _numbers(3, 8).to(torch.bfloat16)
            eps = getattr(own, norm.eps)
            options: Any = {"casting_mode": norm.casting_mode, "weight_offset": norm.weight_offset}
            return eps == 0.1 and torch.equal(own(x), rms_norm_reference(x, (8,), own.weight, eps, **options))
    except Exception:  # a different signature, or any other error of an unknown class
        return False


def _rotates_alike(home: Any, family: Family) -> bool:
    """Whether the rotation of a family gives the same bits as `apply_rotary_pos_emb`."""
    dtype = torch.float32 if family.float32_tables else torch.bfloat16
    try:
        with torch.device("cpu"), torch.no_grad():
            q, k = _numbers(1, 2, 3, 8).to(torch.bfloat16), _numbers(1, 1, 3, 8).to(torch.bfloat16)
            angles = _numbers(1, 3, 4)
            cos, sin = (torch.cat([table, table], -1).to(dtype) for table in (angles.cos(), angles.sin()))
            own = home.apply_rotary_pos_emb(q, k, cos, sin)
            ours = apply_rotary_pos_emb_reference(q.to(dtype), k.to(dtype), cos, sin, casting_mode="llama")
            return all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(own, ours, strict=True))
    except Exception:
        return False


def _numbers(*shape: int) -> Tensor:
    """Irregular numbers, made without a generator."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, dtype=torch.float32).mul(7.3).sin().mul(2).view(shape)
