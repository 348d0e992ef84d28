"""The models that are patched, a row a family, and the forwards that replace transformers' own.

A new family whose modules compute what Llama's compute is one more row.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..functional import add_rms_norm, rms_norm


@dataclass(frozen=True)
class Family:
    """Class names in ``transformers.models.<package>.modeling_<package>``."""

    package: str
    rms_norm: str
    decoder_layer: str

    def class_path(self, name: str) -> tuple[str, str]:
        return f"transformers.models.{self.package}.modeling_{self.package}", name


FAMILIES = (
    Family("llama", "LlamaRMSNorm", "LlamaDecoderLayer"),
    Family("qwen2", "Qwen2RMSNorm", "Qwen2DecoderLayer"),
    Family("qwen3", "Qwen3RMSNorm", "Qwen3DecoderLayer"),
)


def rms_norm_forward(self, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon, casting_mode="llama")


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
    **kwargs,
) -> Tensor:
    """``LlamaDecoderLayer.forward`` (models/llama/modeling_llama.py), its first addition and second norm as one."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    normed, residual = _add_norm(attended, hidden_states, self.post_attention_layernorm)
    return residual + self.mlp(normed)


def _add_norm(hidden_states: Tensor, residual: Tensor, norm) -> tuple[Tensor, Tensor]:
    """``norm(residual + hidden_states)`` and the sum: one kernel where calling `norm` does nothing but `rms_norm`."""
    ours = getattr(norm.__dict__.get("forward"), "__func__", None) is rms_norm_forward
    hooked = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    # Autocast, or a norm kept in float32, mixes dtypes.
    if ours and not hooked and hidden_states.dtype == residual.dtype == norm.weight.dtype:
        return add_rms_norm(hidden_states, residual, norm.weight, norm.variance_epsilon, casting_mode="llama")
    total = residual + hidden_states
    return norm(total), total


Forwards = dict[tuple[str, str], Callable]
"""(module, class) -> the forward bound on instances of exactly that class."""

RMS_NORMS: Forwards = {family.class_path(family.rms_norm): rms_norm_forward for family in FAMILIES}
DECODER_LAYERS: Forwards = {family.class_path(family.decoder_layer): decoder_layer_forward for family in FAMILIES}
