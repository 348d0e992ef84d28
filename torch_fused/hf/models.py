"""The forwards that replace transformers' own in the models of `families.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from ..functional import add_rms_norm, apply_rotary_pos_emb, gelu_mul, rms_norm, silu_mul
from .families import FAMILIES, family_of, has_family
from .origin import function_of, has_own_rotation, home_of
from .transformers_private import APPLY_GATE, CACHE, KWARGS_REACH_CACHE, attention_of, cache_argument, has_own_gate


def activation_of(module: Any) -> str:
    """The activation of a transformers or torch module: "silu", "gelu", "gelu_tanh", or "" for anything else."""
    if type(module) in (nn.SiLU, SiLUActivation):
        return "silu"
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    act = getattr(module, "act", None)
    if type(module) is GELUActivation and act is nn.functional.gelu:
        return "gelu"
    if type(module) is GELUTanh and getattr(act, "func", None) is nn.functional.gelu:
        return "gelu_tanh"
    return ""


# Each forward runs only if its class's forward is transformers' original; otherwise it calls the class's forward.


def _is_left(module: nn.Module) -> bool:
    """Whether to call the class's forward: the module got another one, or a compiler traces it, which fuses better."""
    return not has_family(module) or home_of(type(module)) is None or torch.compiler.is_compiling()


def rms_norm_forward(self, hidden_states: Tensor) -> Tensor:
    if _is_left(self) or not is_plain(hidden_states, weight := self.weight):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, weight.shape, weight, **_norm_options(self))


def _norm_options(norm: Any) -> dict[str, Any]:
    kind = family_of(norm).norm
    eps = getattr(norm, kind.eps)
    return {"eps": eps, "casting_mode": kind.casting_mode, "weight_offset": kind.weight_offset}


def rotary_embedding_forward(
    self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """The tables of cosines and sines, computed in float32 with fewer ops."""
    of_type = () if layer_type is None else (layer_type,)
    prefix = "" if layer_type is None else f"{layer_type}_"
    rope_type = self.rope_type if layer_type is None else self.rope_type[layer_type]
    inv_freq = getattr(self, f"{prefix}inv_freq")
    if is_by_length(rope_type) or inv_freq.requires_grad or _is_left(self):
        return type(self).forward(self, x, position_ids, *of_type)
    family = family_of(self)
    if family.tables == "sections":
        position_ids = position_ids.expand(3, -1, -1)
    angles = position_ids[..., None] * inv_freq.to(device=x.device, dtype=torch.float32)
    angles = self.recomposition_frequencies(angles) if family.tables == "sections" else torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()
    scaling = getattr(self, f"{prefix}attention_scaling")
    if scaling != 1.0:
        cos, sin = cos * scaling, sin * scaling
    return (cos, sin) if family.float32_tables else (cos.to(x.dtype), sin.to(x.dtype))


def is_by_length(rope_type: str) -> bool:
    """Whether the frequencies depend on the length of the sequence."""
    return "dynamic" in rope_type or rope_type == "longrope"


def attention_forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Attention that rotates queries and keys in one kernel."""
    if args or "position_embeddings" not in kwargs or _is_left(self):  # the argument order differs by family
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _attention_forward(self, hidden_states, **kwargs)


def _attention_forward(
    self, hidden_states: Tensor, *, position_embeddings: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    family = family_of(self)
    home: Any = home_of(type(self))
    held = take_cache(kwargs)
    rows = hidden_states.shape[:-1]
    heads = (*rows, -1, self.head_dim)
    modules = self._modules  # its attributes take longer
    layers = [modules[name] for name in ((family.qkv,) if family.qkv else ("q_proj", "k_proj", "v_proj"))]
    output: Any = modules["o_proj"]
    matrices = matrices_of(hidden_states, *layers, output)
    products = products_of(hidden_states, layers, matrices)
    if family.qkv:
        sizes = [n * self.head_dim for n in (self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2)]
        q, k, v = products[0].split(sizes, -1)
    else:
        q, k, v = products
    gate = None
    if family.gated:
        q, gate = q.view(*rows, -1, 2 * self.head_dim).chunk(2, -1)
    if family.qk_norm == "row":
        q, k = self.q_norm(q.view(*rows, -1)), self.k_norm(k.view(*rows, -1))
    q, k, v = q.view(heads), k.view(heads), v.view(heads)
    if family.qk_norm == "head":
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not family.use_rotary or getattr(self, family.use_rotary):
        q, k = _rotated(home, q, k, position_embeddings, family.float32_tables)
    if family.scaled_queries:
        rope = self.config.rope_parameters
        beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        q = q * home.get_llama_4_attn_scale(kwargs["position_ids"], beta, length).to(q.dtype)
    if held is not None:
        handed = {"kwargs": kwargs} if KWARGS_REACH_CACHE else {}  # the cache may change them
        k, v = held.update(k, v, self.layer_idx, **handed)
    options: dict[str, Any] = {}
    if family.window:
        owner = self if family.window == "layer" else self.config
        options["sliding_window"] = getattr(owner, "sliding_window", None)
    if family.softcap:
        options["softcap"] = self.attn_logit_softcapping
    attend = home.ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), home.eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    attended, weights = attend(
        self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **options, **kwargs
    )
    shape = (rows.numel(), -1) if matrices else (*rows, -1)
    attended = attended.reshape(shape)
    if gate is not None:
        attended = attended * torch.sigmoid(gate.reshape(shape))
    return F.linear(attended, *matrices[-1]).view(*rows, -1) if matrices else output(attended), weights


Matrices = list[tuple[Any, Any]]
"""The weights and biases of linear layers."""


def matrices_of(x: Any, *layers: Any) -> Matrices:
    """Those of all the layers, if calling them with x does nothing but `F.linear`; else of none.

    A call of a module takes about as long as starting a product.
    """
    if type(x) is not Tensor or x.dim() < 2 or home_of(nn.Linear) is None:
        return []
    if _has_any_global_hook() or torch._C._get_tracing_state():
        return []
    found = []
    for layer in layers:
        if (
            type(layer) is not nn.Linear
            or "forward" in layer.__dict__
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            or layer._compiled_call_impl is not None
        ):
            return []
        parameters = layer._parameters
        if "weight" not in parameters or "bias" not in parameters:  # they are elsewhere, as in FSDP1
            return []
        found.append((parameters["weight"], parameters["bias"]))
    return found


def products_of(x: Tensor, layers: list[Any], matrices: Matrices) -> list[Tensor]:
    """What each layer makes of x: rows, if there are matrices, as autograd takes two more steps for other shapes."""
    if not matrices:
        return [layer(x) for layer in layers]
    rows = x.flatten(0, -2)
    return [F.linear(rows, weight, bias) for weight, bias in matrices[: len(layers)]]


def _rotated(home: Any, q: Tensor, k: Tensor, tables: Any, float32: bool) -> tuple[Tensor, Tensor]:
    if not has_own_rotation(home) or not is_plain(q, k, *tables):
        return home.apply_rotary_pos_emb(q, k, *tables)
    dtypes = q.dtype, k.dtype
    q, k = apply_rotary_pos_emb(q, k, *tables, casting_mode="llama")
    return (q.to(dtypes[0]), k.to(dtypes[1])) if float32 else (q, k)


GATED: dict[str, Callable[..., Tensor]] = {
    "silu": partial(silu_mul, casting_mode="llama"),
    "gelu": partial(gelu_mul, casting_mode="llama"),
    "gelu_tanh": partial(gelu_mul, approximate="tanh", casting_mode="llama"),
}
"""Activation -> the op that computes it and multiplies by the up projection."""


def gated_op_of(activation: Any) -> Callable[..., Tensor] | None:
    """The op for an activation; None if there is none, or the activation is hooked or replaced."""
    if home_of(type(activation)) is None or "forward" in activation.__dict__ or is_hooked(activation):
        return None
    return GATED.get(activation_of(activation))


def mlp_forward(self, x: Tensor) -> Tensor:
    if _is_left(self):
        return type(self).forward(self, x)
    family, modules = family_of(self), self._modules
    activation = getattr(self, family.activation)
    gated = gated_op_of(activation)
    if gated is None:
        return type(self).forward(self, x)
    layers = [modules[name] for name in ((family.gate_up,) if family.gate_up else ("gate_proj", "up_proj"))]
    down: Any = modules["down_proj"]
    matrices = matrices_of(x, *layers, down)
    products = products_of(x, layers, matrices)
    gate, up = products[0].chunk(2, -1) if family.gate_up else products
    fed = gated(gate, up) if is_plain(gate, up) else activation(gate) * up
    if not matrices:
        return down(fed)
    fed = F.linear(fed, *matrices[-1])
    return fed.view(*x.shape[:-1], fed.shape[-1])


def apply_gate(self, gate_up: Tensor) -> Tensor:
    """The activation between the projections of an expert, for the rows of its tokens."""
    left = _is_left(self) or not has_own_gate(type(self)) or not is_plain(gate_up)
    gated = None if left else gated_op_of(self.act_fn)
    if gated is None:
        return getattr(type(self), APPLY_GATE)(self, gate_up)
    return gated(*gate_up.chunk(2, -1))


NO_CACHE = {"use_cache": False, CACHE: None, "past_key_values": None}


def decoder_layer_forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    if args or _is_left(self):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if self.gradient_checkpointing and self.training and torch.is_grad_enabled() and _checkpoints_forward(type(self)):
        # A layer that is recomputed in backward must not append to a cache again.
        kwargs |= {name: value for name, value in NO_CACHE.items() if kwargs.get(name) is not None}
        return self._gradient_checkpointing_func(partial(_decoder_layer_forward, self, **kwargs), hidden_states)
    return _decoder_layer_forward(self, hidden_states, **kwargs)


def _checkpoints_forward(cls: Any) -> bool:
    """Whether transformers checkpoints inside a layer's forward, which ours replaces, and not in its `__call__`."""
    return "_gradient_checkpointing_func" in getattr(cls.forward, "__code__", _decoder_layer_forward.__code__).co_names


def _decoder_layer_forward(
    self,
    hidden_states: Tensor,
    *,
    attention_mask: Any = None,
    position_ids: Any = None,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """A layer's forward, with the first addition and the following norm fused."""
    family = family_of(self)
    before, before_mlp = family.norms_before
    after, after_mlp = family.norms_after
    scale = getattr(self, family.residual_scale) if family.residual_scale else None
    drop, drop_mlp = family.dropouts or (None, None)

    held = take_cache(kwargs)
    modules = self._modules  # its attributes take longer
    residual = hidden_states
    if before is not None:
        hidden_states = _normed(modules[before], hidden_states)
    given = {"hidden_states": hidden_states, "attention_mask": attention_mask, **kwargs}
    if family.linear_attention and family.linear_attention in modules:
        mixer = modules[family.linear_attention]
        cls: Any = type(mixer)
        attended = mixer(**{cache_argument(cls): held}, **given)
    else:
        places = {"position_ids": position_ids, "position_embeddings": position_embeddings}
        attended, _ = modules["self_attn"](**{CACHE: held}, **places, **given)
    attended = _through(self, attended, after, drop)
    if scale is not None:
        attended = attended * scale
    norm = modules[before_mlp] if before_mlp else None
    if norm is not None and _can_join(norm, attended, residual):
        normed, residual = add_rms_norm(attended, residual, norm.weight, **_norm_options(norm))
    else:
        residual = residual + attended
        normed = residual if norm is None else norm(residual)
    fed = modules["mlp"](normed)
    if isinstance(fed, tuple):  # of a mixture of experts
        fed = fed[0]
    fed = _through(self, fed, after_mlp, drop_mlp)
    return residual + (fed if scale is None else fed * scale)


def _through(layer: Any, states: Tensor, *names: str | None) -> Tensor:
    """Applies the layer's modules with these names, one after the other."""
    for name in names:
        if name is not None:
            states = layer._modules[name](states)
    return states


def _only_norms(norm: nn.Module) -> bool:
    """Whether `norm` only calls `rms_norm`."""
    own = function_of(norm.__dict__.get("forward")) is rms_norm_forward
    return own and _is_bare(norm) and has_family(norm) and home_of(type(norm)) is not None


def _normed(norm: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm_forward(norm, hidden_states) if _only_norms(norm) else norm(hidden_states)


def _can_join(norm: Any, hidden_states: Tensor, residual: Tensor) -> bool:
    """Whether `norm` only calls `rms_norm`, and `add_rms_norm` supports the tensors."""
    if not _only_norms(norm):
        return False
    weight = norm.weight
    # Autocast, or a norm kept in float32, mixes dtypes; a split model has tensors on several devices.
    alike = (
        hidden_states.dtype == residual.dtype == weight.dtype
        and hidden_states.device == residual.device == weight.device
    )
    return alike and is_plain(hidden_states, residual, weight)


def is_plain(*tensors: Any) -> bool:
    """Whether these are plain tensors; our ops do not support DTensors, for example."""
    for tensor in tensors:  # noqa: SIM110 (twice as fast as all())
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return True


def take_cache(kwargs: dict[str, Any], cache: Any = None) -> Any:
    """The cache passed by position, by its name or by its former name."""
    for name in (CACHE, "past_key_values"):
        named = kwargs.pop(name, None)
        cache = named if cache is None else cache
    return cache


def is_hooked(module: nn.Module) -> bool:
    """Whether calling a module runs more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module runs its forward and nothing else, and the call is not recorded."""
    return module._compiled_call_impl is None and not is_hooked(module) and not torch._C._get_tracing_state()


def is_transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward mode goes through them, which an `autograd.Function` of ours does not serve."""
    active = torch._C._are_functorch_transforms_active()
    return active or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


Forwards = dict[tuple[str, str], Callable]
"""(module, class) -> the forward bound to instances of exactly this class."""

RMS_NORMS: Forwards = {family.path("rms_norm"): rms_norm_forward for family in FAMILIES}
ROTARY: Forwards = {
    **{family.path("rotary_embedding"): rotary_embedding_forward for family in FAMILIES},
    **{family.path("attention"): attention_forward for family in FAMILIES},
}
MLPS: Forwards = {family.path("mlp"): mlp_forward for family in FAMILIES}
EXPERTS: Forwards = {family.path("experts"): apply_gate for family in FAMILIES if family.experts}
"""For these, `APPLY_GATE` is replaced instead of forward."""
DECODER_LAYERS: Forwards = {family.path("decoder_layer"): decoder_layer_forward for family in FAMILIES}
