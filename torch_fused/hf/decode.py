"""Steps of a few tokens through a whole model as one op on the CPU, where that computes what transformers does."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..ops.decode import LAYER_PARTS, decode_
from .cache import CACHE, FusedKVCache, FusedLayer
from .models import FAMILIES, SILU, Family
from .watch import GLOBAL_HOOKS, Watch

MOST_SEQUENCES = MOST_STEPS = 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DECODER = "_torch_fused_decoder"
"""The attribute of a patched causal language model that holds its `Decoder`."""

CAUSAL_LMS = {family.class_path(family.causal_lm) for family in FAMILIES}


class Left(Exception):
    """Why a model, or one call of it, is left to transformers."""


@dataclass
class Plan:
    """What the op takes of a model."""

    weights: dict[str, Any]
    rotary: nn.Module
    layers: int
    dropout: bool
    tables: tuple[Tensor, Tensor] | None = None

    def cos_and_sin(self, positions: int) -> tuple[Tensor, Tensor]:
        """The model's own tables for at least that many positions, ``(positions, rotary_dim)``."""
        if self.tables is None or self.tables[0].shape[0] < positions:
            embedding: Tensor = self.weights["embedding"]
            many = torch.arange(max(256, 1 << (positions - 1).bit_length()))[None]
            cos, sin = self.rotary(embedding.new_empty(0), many)
            self.tables = cos[0].contiguous(), sin[0].contiguous()
        return self.tables


class Decoder:
    """Runs the steps of one causal language model; kept with the model while it is patched."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.calls: Counter[str] = Counter()  # by the reason why they were left; "" for none
        self._read: tuple[Watch, Plan | Left] | None = None

    def plan(self) -> Plan:
        """The plan for the model as it is now; raises `Left`."""
        if self._read is None or not self._read[0].holds():
            self._read = None  # the tensors in it may be gone from the model
            self._read = Watch(self.model), read(self.model)
        plan = self._read[1]
        if isinstance(plan, Left):
            raise plan
        return plan

    def why_not(self) -> str:
        """Why the model as it is now is left to transformers; empty if it is not."""
        try:
            self.plan()
        except Left as left:
            return str(left)
        return ""

    def report(self) -> list[str]:
        """Which path the model takes, and what the calls so far took."""
        reason = self.why_not()
        lines = [f"decode: left to transformers: {reason}" if reason else "decode: steps of few tokens are one op"]
        lines += [f"  {count} calls as one op" for why, count in self.calls.items() if not why]
        lines += [f"  {count} calls left to transformers: {why}" for why, count in self.calls.items() if why]
        return lines

    def step(
        self,
        plan: Plan,
        run: Callable[..., Tensor],
        input_ids: Tensor,
        positions: Tensor,
        starts: Tensor | None,
        cache: FusedKVCache,
        **more: Any,
    ) -> Tensor:
        """Calls the op `run` for new tokens behind those of the cache; `check` has given the plan."""
        cos, sin = plan.cos_and_sin(int(positions.max()) + 1)
        keys, values = cache.room_for(input_ids.shape[1])
        length = cache.get_seq_length()
        result = run(
            input_ids,
            positions,
            starts,
            cos=cos,
            sin=sin,
            keys=keys,
            values=values,
            length=length,
            **plan.weights,
            **more,
        )
        cache.advance(input_ids.shape[1])
        self.calls[""] += 1
        return result

    def check(self, input_ids: Tensor, cache: Any) -> Plan:
        """The plan, if the call is one for the op; raises `Left`."""
        plan = self.plan()
        if torch.is_autocast_enabled("cpu"):
            raise Left("autocast is on")
        self._check_cache(plan, input_ids, cache)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            raise Left("gradients are enabled")
        if torch.compiler.is_compiling():
            raise Left("torch.compile is tracing")
        if plan.dropout and self.model.training:
            raise Left("the model is in training mode and has attention dropout")
        emulation = sys.modules.get("torch_fused.metal.emulation")
        if emulation is not None and emulation.active():
            raise Left("the Metal kernels are being emulated")
        config = self.model.config
        if config.num_hidden_layers != plan.layers:
            raise Left(f"config.num_hidden_layers has become {config.num_hidden_layers}")
        if config._attn_implementation not in ("eager", "sdpa"):
            raise Left(f"its attention is {config._attn_implementation!r}")
        return plan

    def _check_cache(self, plan: Plan, input_ids: Tensor, cache: Any) -> None:
        batch, steps = input_ids.shape
        if batch > MOST_SEQUENCES or steps > MOST_STEPS:
            raise Left(f"more than {MOST_STEPS} new tokens or {MOST_SEQUENCES} sequences (a prompt)")
        if type(cache) is not FusedKVCache:
            raise Left(f"the cache is a {_name(cache)}, not a FusedKVCache")
        if len(cache.layers) != plan.layers or any(type(layer) is not FusedLayer for layer in cache.layers):
            raise Left("the cache has layers that are not plain attention")
        weight: Tensor = plan.weights["embedding"]
        first: Any = cache.layers[0]
        if not first.is_initialized:
            raise Left("the cache is empty (a prompt)")
        if not cache.is_uniform(weight.dtype, weight.device, batch):
            raise Left("the cache has another dtype, device or batch size than the call, or layers that differ")
        if cache.max_cache_len is not None and cache.get_seq_length() + steps > cache.max_cache_len:
            raise Left("the cache is full")


# ---- the forward of a patched model ---------------------------------------------------------------------------------


def causal_lm_forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """The class's own forward, whose signature `generate` looks at, or the same logits, in float32, from one op."""
    decoder: Decoder = self.__dict__[DECODER]
    cache = past_key_values if cache is None else cache
    args = (input_ids, attention_mask, position_ids, cache, inputs_embeds, labels, use_cache, logits_to_keep)
    try:
        return _forward(decoder, *args, **kwargs)
    except Left as left:
        decoder.calls[str(left)] += 1
    return type(self).forward(self, *args, **kwargs)


def _forward(
    decoder: Decoder,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    inputs_embeds: Tensor | None,
    labels: Tensor | None,
    use_cache: bool | None,
    logits_to_keep: int | Tensor,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    config = decoder.model.config
    if input_ids is None or inputs_embeds is not None:
        raise Left("inputs_embeds instead of input_ids")
    if labels is not None:
        raise Left("a loss is wanted")
    if cache is None or not (config.use_cache if use_cache is None else use_cache):
        raise Left("no cache is used")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.pop(name, None) or getattr(config, name, False):
            raise Left(f"{name} is on")
    if not kwargs.pop("return_dict", True) or not config.return_dict:
        raise Left("a tuple is wanted")
    unknown = [name for name, value in kwargs.items() if value is not None]
    if unknown:
        raise Left(f"an argument that only transformers knows: {', '.join(unknown)}")
    if not isinstance(logits_to_keep, int):
        raise Left("logits_to_keep is a tensor")
    plan = decoder.check(input_ids, cache)
    length = cache.get_seq_length()
    starts = left_padding(attention_mask, input_ids, length)
    if position_ids is None:
        position_ids = torch.arange(length, length + input_ids.shape[1])[None]
    positions = position_ids.expand(input_ids.shape).contiguous()
    logits = decoder.step(
        plan,
        decode_,
        input_ids.contiguous(),
        positions,
        starts,
        cache,
        logits_to_keep=min(logits_to_keep, input_ids.shape[1]),
    )
    return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


def left_padding(mask: Tensor | None, input_ids: Tensor, length: int) -> Tensor | None:
    """The first slot that each sequence attends, None if that is the first of all; raises `Left` for other masks."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != (input_ids.shape[0], length + input_ids.shape[1]):
        raise Left(f"attention_mask is not of shape (batch, tokens): {tuple(getattr(mask, 'shape', ()))}")
    attended = mask != 0
    if attended.all():
        return None
    starts = attended.int().argmax(-1)
    if not torch.equal(attended.sum(-1), mask.shape[1] - starts) or int(starts.max()) > length:
        raise Left("attention_mask is not left padding alone")
    return starts


# ---- what the op takes of a model -----------------------------------------------------------------------------------


def read(model: Any) -> Plan | Left:
    """The plan for a model of exactly the classes that `FAMILIES` names, or why there is none."""
    try:
        return _read(model)
    except Left as left:
        return left


def _read(model: Any) -> Plan:
    family = next((f for f in FAMILIES if _path_of(model) == f.class_path(f.causal_lm)), None)
    if family is None:
        raise Left(f"{type(model).__name__} is not one of {', '.join(f.causal_lm for f in FAMILIES)}")
    reader = _Reader(family)
    _reject_foreign_forward("the model", model)
    base = reader.child(model, "model", family.model)
    layers = list(base.layers[: model.config.num_hidden_layers])
    embedding = reader.child(base, "embed_tokens", nn.Embedding)
    if embedding.max_norm is not None:
        raise Left("model.embed_tokens has a max_norm")
    rotary = reader.child(base, "rotary_emb", family.rotary_embedding)
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        raise Left(f"its rotary embedding is {rotary.rope_type!r}, whose angles depend on the length")
    parts: list[Tensor | None] = []
    attentions = []
    for layer in layers:
        if type(layer).__qualname__ != family.decoder_layer:
            raise Left(f"a layer is a {_name(layer)}")
        _reject_foreign_forward("a layer", layer)
        attention = reader.child(layer, "self_attn", family.attention)
        mlp = reader.child(layer, "mlp", family.mlp)
        if type(mlp.act_fn) not in SILU:
            raise Left(f"its activation is {_name(mlp.act_fn)}")
        attentions.append(attention)
        found = {
            "input_norm": reader.norm(layer, "input_layernorm"),
            "post_attention_norm": reader.norm(layer, "post_attention_layernorm"),
            **reader.linear(attention, q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
            **reader.linear(mlp, gate="gate_proj", up="up_proj", down="down_proj"),
        }
        for name in ("q_norm", "k_norm"):
            found[name] = reader.norm(attention, name) if hasattr(attention, name) else None
        if any(found.pop(f"{name}_bias") is not None for name in ("gate", "up", "down")):
            raise Left("its feed-forward layers have biases")
        parts += [found[name] for name in LAYER_PARTS]
    weights = {
        "embedding": reader.parameter(embedding, "weight"),
        "layers": parts,
        "norm": reader.norm(base, "norm"),
        **reader.linear(model, head="lm_head"),
        "heads": model.config.num_attention_heads,
    }
    if weights.pop("head_bias") is not None:
        raise Left("lm_head has a bias")
    weights["eps"] = _only("epsilons of norms", reader.epsilons)
    weights["scaling"] = _only("scalings of attention", [attention.scaling for attention in attentions])
    dtypes = {(tensor.dtype, tensor.device.type) for tensor in reader.tensors}
    dtype, device = _only("dtypes or devices", dtypes)
    if dtype not in DTYPES or device != "cpu":
        raise Left(f"its weights are {dtype} on {device}")
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise Left(f"hooks on {path or 'the model'}")
    if any(GLOBAL_HOOKS):
        raise Left("hooks on all modules")
    dropout = any(attention.attention_dropout for attention in attentions)
    return Plan(weights, rotary, len(layers), dropout)


class _Reader:
    """Takes modules and tensors out of a model, and looks that they are plain."""

    def __init__(self, family: Family):
        self.family = family
        self.epsilons: list[float] = []
        self.tensors: list[Tensor] = []

    def child(self, parent: nn.Module, name: str, expected: str | type) -> Any:
        module = getattr(parent, name)
        if isinstance(expected, str):
            plain = _path_of(module) == self.family.class_path(expected)
        else:
            plain = type(module) is expected
        if not plain:
            raise Left(f"{name} is a {_name(module)}")
        _reject_foreign_forward(name, module)
        return module

    def norm(self, parent: nn.Module, name: str) -> Tensor:
        norm = self.child(parent, name, self.family.rms_norm)
        self.epsilons.append(norm.variance_epsilon)
        return self.parameter(norm, "weight")

    def linear(self, parent: nn.Module, **names: str) -> dict[str, Tensor | None]:
        """The weights and biases of linear layers, by the op's name for each."""
        found: dict[str, Tensor | None] = {}
        for part, name in names.items():
            layer = self.child(parent, name, nn.Linear)
            found[part] = self.parameter(layer, "weight")
            found[f"{part}_bias"] = None if layer.bias is None else self.parameter(layer, "bias")
        return found

    def parameter(self, module: nn.Module, name: str) -> Tensor:
        tensor = getattr(module, name)
        # A subclass holds its values in another way: quantised, or sharded over devices.
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise Left(f"a weight of {_name(module)} is a {_name(tensor)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise Left(f"a weight of {_name(module)} has strides {tensor.stride()}")
        self.tensors.append(tensor)
        return tensor


def _reject_foreign_forward(what: str, module: nn.Module) -> None:
    forward = module.__dict__.get("forward")
    # A wrapper may call itself by the name and module of what it wraps; a bound method of ours is never one.
    ours = isinstance(forward, MethodType) and forward.__func__.__module__.startswith(f"{__package__}.")
    if forward is not None and not ours:
        raise Left(f"the forward of {what} has been replaced")
    if module._compiled_call_impl is not None:
        raise Left(f"{what} is compiled by torch.compile")


def _only(what: str, values: Any) -> Any:
    if len(set(values)) != 1:
        raise Left(f"it has several {what}: {', '.join(map(str, sorted(set(values), key=str)))}")
    return next(iter(values))


def _path_of(module: Any) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
