"""The models that are patched, a row a family, and the forwards that replace transformers' own.

A new family whose modules compute what Llama's compute is one more row.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..functional import add_rms_norm, apply_rotary_pos_emb, rms_norm, silu_mul
from .cache import CACHE


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


SILU = {nn.SiLU, type(ACT2FN["silu"])}
"""The classes of the activation that `silu_mul` computes."""

NEXT_NORM = "_torch_fused_next_norm"
"""The attribute of a decoder layer that holds the norm its result goes to: the next layer's first, or the last."""

CARRIED = "_torch_fused_carried"
"""The attribute of a decoder layer's result that holds that norm, the result's version and the norm of it."""


def rms_norm_forward(self, hidden_states: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():  # a compiler takes no attributes of tensors
        carried = hidden_states.__dict__.pop(CARRIED, None)
        if carried is not None and carried[:2] == (self, hidden_states._version):
            return carried[2]
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, casting_mode="llama")


@torch.no_grad()
def rotary_embedding_forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of cosines and sines in float32, without the steps that change nothing."""
    if "dynamic" in self.rope_type or self.rope_type == "longrope":  # their frequencies depend on the length
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
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values=None,
    cache=None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What the attention of Llama, Qwen2 and Qwen3 computes, the positions of queries and keys by one kernel."""
    cache = past_key_values if cache is None else cache
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    if hasattr(self, "sliding_window"):
        kwargs["sliding_window"] = self.sliding_window
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, *position_embeddings, casting_mode="llama")
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    eager = sys.modules[type(self).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    dropout = self.attention_dropout if self.training else 0.0
    attended, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
    return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), weights


def mlp_forward(self, x: Tensor) -> Tensor:
    if type(self.act_fn) not in SILU or _hooked(self.act_fn):
        return type(self).forward(self, x)
    return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x), casting_mode="llama"))


def decoder_layer_forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    if self.gradient_checkpointing and self.training:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _decoder_layer_forward(self, hidden_states, *args, **kwargs)


def _decoder_layer_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values=None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    cache=None,
    **kwargs,
) -> Tensor:
    """``LlamaDecoderLayer.forward`` (models/llama/modeling_llama.py), its first addition and second norm as one."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **{CACHE: past_key_values if cache is None else cache},
        **kwargs,
    )
    norm = self.post_attention_layernorm
    if _is_plain(norm, attended, hidden_states):
        normed, residual = _add_norm(attended, hidden_states, norm)
    else:
        residual = hidden_states + attended
        normed = norm(residual)
    fed = self.mlp(normed)
    next_norm = self.__dict__.get(NEXT_NORM)
    # An inference tensor does not tell when it is written to.
    carries = next_norm is not None and not torch.compiler.is_compiling() and not fed.is_inference()
    if not carries or not _is_plain(next_norm, fed, residual):
        return residual + fed
    normed, total = _add_norm(fed, residual, next_norm)
    setattr(total, CARRIED, (next_norm, total._version, normed))
    return total


def _is_plain(norm: nn.Module, hidden_states: Tensor, residual: Tensor) -> bool:
    """Whether calling `norm` does nothing but `rms_norm`, on tensors that `add_rms_norm` takes."""
    ours = getattr(norm.__dict__.get("forward"), "__func__", None) is rms_norm_forward
    if not ours or _hooked(norm):
        return False
    # Autocast, or a norm kept in float32, mixes dtypes; a model in parts has them on several devices.
    tensors = (hidden_states, residual, norm.weight)
    return len({tensor.dtype for tensor in tensors}) == len({tensor.device for tensor in tensors}) == 1


def _add_norm(hidden_states: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """``norm(residual + hidden_states)`` and the sum."""
    return add_rms_norm(hidden_states, residual, norm.weight, norm.variance_epsilon, casting_mode="llama")


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
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
