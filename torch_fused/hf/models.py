"""The models that are patched, a row a family, and the forwards that replace transformers' own.

A new family whose modules compute what Llama's compute is one more row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import SiLUActivation

from ..functional import add_rms_norm, apply_rotary_pos_emb, rms_norm, silu_mul
from .origin import function_of, has_own_rotation, home_of
from .transformers_private import CACHE, KWARGS_REACH_CACHE, attention_of


@dataclass(frozen=True)
class Family:
    """Class names in ``transformers.models.<package>.modeling_<package>``."""

    package: str
    rms_norm: str
    rotary_embedding: str
    attention: str
    mlp: str
    decoder_layer: str
    model: str
    causal_lm: str

    def class_path(self, name: str) -> tuple[str, str]:
        return f"transformers.models.{self.package}.modeling_{self.package}", name


def _family(package: str, prefix: str) -> Family:
    parts = ("RMSNorm", "RotaryEmbedding", "Attention", "MLP", "DecoderLayer", "Model", "ForCausalLM")
    return Family(package, *(prefix + part for part in parts))


FAMILIES = (_family("llama", "Llama"), _family("qwen2", "Qwen2"), _family("qwen3", "Qwen3"))


SILU = {nn.SiLU, SiLUActivation}
"""The classes of the activation that `silu_mul` computes."""

# Each forward serves only calls that its class's own, as transformers wrote it, would serve alike.


def _is_left(module: nn.Module) -> bool:
    """Whether a call is the class's own: somebody has replaced it, or a compiler traces it, which fuses better."""
    return home_of(type(module)) is None or torch.compiler.is_compiling()


def rms_norm_forward(self, hidden_states: Tensor) -> Tensor:
    if _is_left(self) or not _plain(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, casting_mode="llama")


def rotary_embedding_forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of cosines and sines in float32, without the steps that change nothing."""
    by_length = "dynamic" in self.rope_type or self.rope_type == "longrope"  # so are the frequencies
    if by_length or self.inv_freq.requires_grad or _is_left(self):
        return type(self).forward(self, x, position_ids)
    angles = position_ids[..., None] * self.inv_freq.to(device=x.device, dtype=torch.float32)
    angles = torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()
    if self.attention_scaling != 1.0:
        cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)


def attention_forward(
    self,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    *cache: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention of Llama, Qwen2 and Qwen3 computes, the positions of queries and keys by one kernel."""
    if _is_left(self):
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, *cache, **kwargs)
    home: Any = home_of(type(self))
    held = take_cache(kwargs, *cache)
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if has_own_rotation(home) and _plain(q, k, *position_embeddings):
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, casting_mode="llama")
    else:
        q, k = home.apply_rotary_pos_emb(q, k, *position_embeddings)
    if held is not None:
        handed = {"kwargs": kwargs} if KWARGS_REACH_CACHE else {}  # which the cache may change
        k, v = held.update(k, v, self.layer_idx, **handed)
    window = {"sliding_window": self.sliding_window} if hasattr(self, "sliding_window") else {}
    attend = home.ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), home.eager_attention_forward)
    dropout = self.attention_dropout if self.training else 0.0
    attended, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **window, **kwargs)
    return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights


def mlp_forward(self, x: Tensor) -> Tensor:
    activation = self.act_fn
    silu = type(activation) in SILU and home_of(type(activation)) is not None
    if not silu or "forward" in activation.__dict__ or _hooked(activation) or _is_left(self):
        return type(self).forward(self, x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    product = silu_mul(gate, up, casting_mode="llama") if _plain(gate, up) else activation(gate) * up
    return self.down_proj(product)


def decoder_layer_forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
    if checkpointed or _is_left(self):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _decoder_layer_forward(self, hidden_states, *args, **kwargs)


def _decoder_layer_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    _cache: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Tensor:
    """``LlamaDecoderLayer.forward`` (models/llama/modeling_llama.py), its first addition and second norm as one."""
    held = take_cache(kwargs, _cache)
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **{CACHE: held},
        **kwargs,
    )
    norm = self.post_attention_layernorm
    if _can_join(norm, attended, hidden_states):
        normed, residual = add_rms_norm(
            attended, hidden_states, norm.weight, norm.variance_epsilon, casting_mode="llama"
        )
    else:
        residual = hidden_states + attended
        normed = norm(residual)
    return residual + self.mlp(normed)


def _can_join(norm: nn.Module, hidden_states: Tensor, residual: Tensor) -> bool:
    """Whether calling `norm` does nothing but `rms_norm`, on tensors that `add_rms_norm` takes."""
    if (
        function_of(norm.__dict__.get("forward")) is not rms_norm_forward
        or _hooked(norm)
        or home_of(type(norm)) is None
    ):
        return False
    # Autocast, or a norm kept in float32, mixes dtypes; a model in parts has them on several devices.
    tensors = (hidden_states, residual, norm.weight)
    alike = len({tensor.dtype for tensor in tensors}) == len({tensor.device for tensor in tensors}) == 1
    return alike and _plain(*tensors)


def _plain(*tensors: Any) -> bool:
    """Whether these are torch's own tensors: our ops do not take DTensors, for one."""
    for tensor in tensors:  # noqa: SIM110 (twice as fast as all())
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return True


def take_cache(kwargs: dict[str, Any], cache: Any = None) -> Any:
    """The cache that was given by position, by its name or by the name it had before."""
    for name in (CACHE, "past_key_values"):
        named = kwargs.pop(name, None)
        cache = named if cache is None else cache
    return cache


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


Forwards = dict[tuple[str, str], Callable]
"""(module, class) -> the forward bound on instances of exactly that class."""

RMS_NORMS: Forwards = {family.class_path(family.rms_norm): rms_norm_forward for family in FAMILIES}
ROTARY: Forwards = {
    **{family.class_path(family.rotary_embedding): rotary_embedding_forward for family in FAMILIES},
    **{family.class_path(family.attention): attention_forward for family in FAMILIES},
}
MLPS: Forwards = {family.class_path(family.mlp): mlp_forward for family in FAMILIES}
DECODER_LAYERS: Forwards = {family.class_path(family.decoder_layer): decoder_layer_forward for family in FAMILIES}
