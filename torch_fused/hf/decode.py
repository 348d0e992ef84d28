"""Steps of a few tokens through a whole model as one op, where that computes what transformers does."""

import inspect
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..nn import QuantizedEmbedding, QuantizedLinear
from ..ops.decode import LAYER_PARTS, Adapter, Matrix, Packed, decode_, make_decoder
from .cache import FusedKVCache, FusedLayer
from .lora import Low, is_lora, lora_of
from .models import FAMILIES, SILU, Family, take_cache
from .origin import describe, home_of, is_ours, is_own, path_of
from .packing import TiedLinear
from .transformers_private import CACHE, attention_of, mask_function_of
from .watch import FUNCTIONS, GLOBAL_HOOKS, Watch, has_hooks

MOST_SEQUENCES = MOST_STEPS = 8
MOST_HEAD_DIM = 256  # on a GPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda", "mps")
INTEGERS = (torch.int32, torch.int64)
ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    CACHE,
    "inputs_embeds",
    "labels",
    "use_cache",
    "logits_to_keep",
)
"""Of a causal language model's forward, by position."""

UNUSED_ARGUMENTS = {"tokenizer", "assistant_tokenizer", "num_items_in_batch"}
"""What `generate` and trainers hand through a model without a use in it."""
SHARED_FUNCTIONS = ("transformers.masking_utils", "transformers.modeling_utils")
"""Where a family's module has functions from that are not its own."""

LINEAR_LAYERS = (nn.Linear, QuantizedLinear, TiedLinear)

DECODER = "_torch_fused_decoder"
"""The attribute of a patched causal language model that holds its `Decoder`."""

CAUSAL_LMS = {family.class_path(family.causal_lm) for family in FAMILIES}


class Left(Exception):
    """Why a model, or one call of it, is left to transformers."""


@dataclass
class Plan:
    """What the op takes of a model."""

    decoder: Any  # a torch.classes.torch_fused.Decoder
    dtype: torch.dtype  # of the model's vectors, its rotary tables and the cache
    device: torch.device
    rotary: Any
    layers: int
    dropout: list[nn.Module]  # the attentions and the adapters' layers that have it
    tables: tuple[Tensor, Tensor] | None = None
    frequencies: Any = None  # those of the tables

    def cos_and_sin(self, positions: int) -> tuple[Tensor, Tensor]:
        """The model's own tables for at least that many positions, ``(positions, rotary_dim)``."""
        tables = self.tables
        if tables is None or tables[0].shape[0] < positions or not self._has_frequencies():
            many = torch.arange(max(256, 1 << (positions - 1).bit_length()), device=self.device)[None]
            with torch.no_grad():
                cos, sin = self.rotary(torch.empty(0, dtype=self.dtype, device=self.device), many)
            self.tables = tables = cos[0].contiguous(), sin[0].contiguous()
            inv_freq = self.rotary.inv_freq
            # Comparing values would wait for a GPU: there, the tensor and torch's count of the writes to it.
            self.frequencies = inv_freq.clone() if _on_the_host(inv_freq) else (inv_freq, inv_freq._version)
        return tables

    def _has_frequencies(self) -> bool:
        inv_freq = self.rotary.inv_freq
        if isinstance(self.frequencies, Tensor):
            return self.frequencies.device == inv_freq.device and torch.equal(self.frequencies, inv_freq)
        known, version = self.frequencies
        return known is inv_freq and version == inv_freq._version


def _on_the_host(tensor: Tensor) -> bool:
    return tensor.is_cpu or tensor.is_inference()  # which has no count of writes


class Decoder:
    """Runs the steps of one causal language model, from any thread; kept with the model while it is patched.

    Args:
        model: the model.
        gives_cache: whether a call without a cache, but with ``use_cache``, gets a `FusedKVCache`.
        int8_products: as in :func:`make_decoder`.
    """

    def __init__(self, model: nn.Module, gives_cache: bool = False, int8_products: bool = True):
        self.model: Any = model
        self.gives_cache = gives_cache
        self.int8_products = int8_products
        self.calls: Counter[str] = Counter()  # by the reason why they were left; "" for none
        self._read: tuple[Watch, Plan | Left] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        names = ("model", "gives_cache", "int8_products", "calls")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _read=None, _lock=threading.Lock())

    def count(self, reason: str = "") -> None:
        with self._lock:
            self.calls[reason] += 1

    def plan(self) -> Plan:
        """The plan for the model as it is now; raises `Left`."""
        found = self._read
        if found is None or not found[0].holds() or not (isinstance(found[1], Left) or found[1].decoder.is_current()):
            found = self._read = None  # the tensors in it may be gone from the model
            found = self._read = Watch(self.model), read(self.model, self.int8_products)
        plan = found[1]
        if isinstance(plan, Left):
            raise Left(*plan.args)
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
        with self._lock:
            calls = self.calls.copy()
        lines += [f"  {count} calls as one op" for why, count in calls.items() if not why]
        lines += [f"  {count} calls left to transformers: {why}" for why, count in calls.items() if why]
        return lines

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the class's own forward returns, or the same logits, in float32, from one op."""
        own = type(self.model).forward
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        cache = take_cache(given)
        gives = cache is None and self._can_give_cache(given)
        if gives:
            ids = given.get("input_ids")
            tokens = (given["inputs_embeds"] if ids is None else ids).shape[1]
            cache = FusedKVCache(self.model.config, expected_len=tokens)
        try:
            return self._forward(cache, **given)
        except Left as left:
            self.count(str(left))
        return own(self.model, **given, **{CACHE: cache}) if gives else own(self.model, *args, **kwargs)

    def step(
        self,
        plan: Plan,
        run: Callable[..., Tensor],
        input_ids: Tensor,
        positions: Tensor,
        starts: Tensor | None,
        rows: int,
        cache: FusedKVCache,
        **more: Any,
    ) -> Tensor:
        """Calls the op `run` for new tokens behind those of the cache; `check` has given the plan.

        All positions are below `rows`.
        """
        cos, sin = plan.cos_and_sin(rows)
        keys, values = cache.room_for(input_ids.shape[1])
        length = cache.get_seq_length()
        result = run(
            plan.decoder,
            input_ids.long().contiguous(),
            positions.long().contiguous(),
            starts,
            cos=cos,
            sin=sin,
            keys=keys,
            values=values,
            length=length,
            **more,
        )
        cache.advance(input_ids.shape[1])
        self.count()
        return result

    def check(self, input_ids: Tensor, cache: Any) -> Plan:
        """The plan, if the call is one for the op; raises `Left`."""
        self._check_cache(input_ids, cache)
        plan = self.plan()
        if input_ids.device != plan.device:
            raise Left(f"the token ids are on {input_ids.device}, the weights on {plan.device}")
        if torch.is_autocast_enabled(plan.device.type):
            _widen(cache, plan.dtype)
        if len(cache.layers) != plan.layers or not cache.is_uniform(plan.dtype, plan.device, input_ids.shape[0]):
            raise Left("the cache has another dtype, device, number of layers or another batch size, or layers differ")
        if self.needs_gradients():
            raise Left("gradients are enabled")
        if any(module.training for module in plan.dropout):
            raise Left("the model is in training mode and has dropout: call model.eval()")
        config = self.model.config
        if config.num_hidden_layers != plan.layers:
            raise Left(f"config.num_hidden_layers has become {config.num_hidden_layers}")
        if not getattr(config, "is_causal", True):
            raise Left("config.is_causal is off")
        implementation = attention_of(config)
        if implementation not in ("eager", "sdpa"):
            raise Left(f"its attention is {implementation!r}")
        home: Any = home_of(type(self.model))
        attention = home.ALL_ATTENTION_FUNCTIONS.get(implementation, home.eager_attention_forward)
        for function in (attention, mask_function_of(implementation)):
            if not is_own(function):
                raise Left(f"{implementation} attention is {describe(function)}")
        return plan

    def needs_gradients(self) -> bool:
        model = self.model
        return torch.is_grad_enabled() and (
            any(parameter.requires_grad for parameter in model.parameters())
            or bool(model.get_input_embeddings()._forward_hooks)  # enable_input_require_grads
        )

    def is_wrapped(self) -> bool:
        """Whether somebody's code runs around the model's forward."""
        model = self.model
        replaced = "forward" in model.__dict__ and not is_ours(model.__dict__["forward"], model)
        return replaced or has_hooks(model) or model._compiled_call_impl is not None

    def _can_give_cache(self, given: dict[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        wanted = self.gives_cache and (self.model.config.use_cache if use_cache is None else use_cache)
        return wanted and not torch.jit.is_tracing() and not self.needs_gradients() and not self.why_not()

    def _check_cache(self, input_ids: Tensor, cache: Any) -> None:
        if type(cache) is not FusedKVCache:
            raise Left(f"the cache is a {_name(cache)}, not a FusedKVCache")
        if any(type(layer) is not FusedLayer for layer in cache.layers):
            raise Left("the cache has layers that are not plain attention")
        layers: Any = cache.layers
        if not all(layer.is_initialized for layer in layers):
            raise Left("the cache is empty (a prompt)")
        batch, steps = input_ids.shape
        if steps > MOST_STEPS:
            raise Left(f"more than {MOST_STEPS} new tokens (a prompt)")
        if batch > MOST_SEQUENCES:
            raise Left(f"more than {MOST_SEQUENCES} sequences")
        if cache.max_cache_len is not None and cache.get_seq_length() + steps > cache.max_cache_len:
            raise Left("the cache is full")

    def _forward(
        self,
        cache: Any,
        /,  # a call may hand on a `cache` of its own: continuous batching in transformers 5.17 does
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        config = self.model.config
        if input_ids is None or inputs_embeds is not None:
            raise Left("inputs_embeds instead of input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in INTEGERS:
            raise Left("input_ids is not a tensor of integers (batch, tokens)")
        if labels is not None:
            raise Left("a loss is wanted")
        if not (config.use_cache if use_cache is None else use_cache):
            raise Left("use_cache is off")
        if cache is None:
            raise Left("no cache was given")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.pop(name, None) or getattr(config, name, False):
                raise Left(f"{name} is on")
        if not kwargs.pop("return_dict", True) or not config.return_dict:
            raise Left("a tuple is wanted")
        unknown = [name for name, value in kwargs.items() if value is not None and name not in UNUSED_ARGUMENTS]
        if unknown:
            raise Left(f"an argument that only transformers knows: {', '.join(unknown)}")
        if not isinstance(logits_to_keep, int):
            raise Left("logits_to_keep is a tensor")
        plan = self.check(input_ids, cache)
        length = cache.get_seq_length()
        starts = left_padding(attention_mask, input_ids, length)
        rows = length + input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, rows, device=input_ids.device)[None].expand(input_ids.shape)
        else:
            position_ids = rows_of(position_ids, input_ids)
            rows = int(position_ids.max()) + 1
        logits = self.step(
            plan,
            decode_,
            input_ids,
            position_ids,
            starts,
            rows,
            cache,
            logits_to_keep=min(logits_to_keep, input_ids.shape[1]),
        )
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


# ---- the forward of a patched model ---------------------------------------------------------------------------------


def causal_lm_forward(self, *args: Any, **kwargs: Any) -> Any:
    decoder = self.__dict__.get(DECODER)
    if decoder is None or len(args) > len(ARGUMENTS) or torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)
    return decoder.forward(*args, **kwargs)


# `generate` and trainers look at it, through wrappers too.
causal_lm_forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in ARGUMENTS),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


def rows_of(position_ids: Any, input_ids: Tensor) -> Tensor:
    """A position for each token, which is a row of the tables; raises `Left` for anything else."""
    shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else ()
    if shape not in (tuple(input_ids.shape), (1, input_ids.shape[1])) or position_ids.dtype not in INTEGERS:
        raise Left(f"position_ids is not a tensor of integers (batch, tokens): {shape}")
    if int(position_ids.min()) < 0:
        raise Left("position_ids has negative positions")
    return position_ids.expand(input_ids.shape)


def _widen(cache: Any, dtype: torch.dtype) -> None:
    """Gives keys and values the weights' dtype; autocast leaves some of them in its own, after a prompt."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)
            if states.dtype != dtype:
                setattr(layer, name, states.to(dtype))


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


def read(model: Any, int8_products: bool = True) -> Plan | Left:
    """The plan for a model of exactly the classes that `FAMILIES` names, or why there is none."""
    try:
        return _read(model, int8_products)
    except Left as left:
        return left


def _read(model: Any, int8_products: bool) -> Plan:
    family = next((f for f in FAMILIES if path_of(model) == f.class_path(f.causal_lm)), None)
    if family is None:
        raise Left(f"{type(model).__name__} is not one of {', '.join(f.causal_lm for f in FAMILIES)}")
    reader = _Reader(family)
    # What surrounds the model's forward, and hooks on the model, run around the step too.
    _reject_replaced_class("the model", model)
    home: Any = home_of(type(model))
    for name in FUNCTIONS:
        if hasattr(home, name) and not is_own(getattr(home, name), home.__name__, *SHARED_FUNCTIONS):
            raise Left(f"{home.__name__}.{name} has been replaced by {describe(getattr(home, name))}")
    base = reader.child(model, "model", family.model)
    layers = list(base.layers[: model.config.num_hidden_layers])
    embedding = reader.child(base, "embed_tokens", nn.Embedding, QuantizedEmbedding)
    if getattr(embedding, "max_norm", None) is not None:
        raise Left("model.embed_tokens has a max_norm")
    rotary = reader.child(base, "rotary_emb", family.rotary_embedding)
    if rotary.inv_freq.requires_grad:
        raise Left("its rotary frequencies are trained")
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        raise Left(f"its rotary embedding is {rotary.rope_type!r}, whose angles depend on the length")
    parts: list[Matrix | None] = []
    adapters: list[Adapter] = []
    dropouts: list[nn.Module] = []
    attentions = []
    for layer in layers:
        if path_of(layer) != family.class_path(family.decoder_layer):
            raise Left(f"a layer is a {_name(layer)}")
        _reject_foreign_forward("a layer", layer)
        attention = reader.child(layer, "self_attn", family.attention)
        if not attention.is_causal:
            raise Left("its attention is not causal")
        mlp = reader.child(layer, "mlp", family.mlp)
        if type(mlp.act_fn) not in SILU:
            raise Left(f"its activation is {_name(mlp.act_fn)}")
        _reject_foreign_forward("an activation", mlp.act_fn)
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
        for name, low in reader.adapters.items():
            place = len(parts) + LAYER_PARTS.index(name)
            adapters += [Adapter(place, each.a, each.b, each.scale) for each in low]
            dropouts += [each.dropout for each in low if isinstance(each.dropout, nn.Dropout) and each.dropout.p > 0]
        reader.adapters.clear()
        parts += [found.get(name) for name in LAYER_PARTS]
    weights = {
        "embedding": reader.matrix(embedding),
        "layers": parts,
        "norm": reader.norm(base, "norm"),
        **reader.linear(model, head="lm_head"),
        "heads": model.config.num_attention_heads,
    }
    if weights.pop("head_bias") is not None:
        raise Left("lm_head has a bias")
    weights["eps"] = _only("epsilons of norms", reader.epsilons)
    weights["scaling"] = _only("scalings of attention", [attention.scaling for attention in attentions])
    dtype, device = _only("dtypes or devices", {(tensor.dtype, tensor.device) for tensor in reader.tensors})
    if any(tensor.device != device for tensor in reader.packed):
        raise Left(f"not all of its packed matrices are on {device}")
    if isinstance(embedding, QuantizedEmbedding) and (embedding.output_dtype or embedding.scales.dtype) != dtype:
        raise Left(f"embed_tokens gives another dtype than the norms' {dtype}")
    if dtype not in DTYPES or device.type not in DEVICES:
        raise Left(f"its weights are {dtype} on {device}")
    if device.type != "cpu" and attentions[0].head_dim > MOST_HEAD_DIM:
        raise Left(f"its heads have more than {MOST_HEAD_DIM} dimensions")
    for path, module in model.named_modules():
        if path and has_hooks(module):
            raise Left(f"hooks on {path}")
    if any(GLOBAL_HOOKS):
        raise Left("hooks on all modules")
    dropouts += [attention for attention in attentions if attention.attention_dropout]
    try:
        decoder = make_decoder(**weights, adapters=adapters, int8_products=int8_products)
    except RuntimeError as error:
        raise Left(str(error)) from None
    return Plan(decoder, dtype, device, rotary, len(layers), dropouts)


class _Reader:
    """Takes modules and tensors out of a model, and looks that they are plain."""

    def __init__(self, family: Family):
        self.family = family
        self.epsilons: list[float] = []
        self.tensors: list[Tensor] = []
        self.packed: list[Tensor] = []  # codes, scales and biases
        self.adapters: dict[str, list[Low]] = {}  # of a layer's linear layers, by the op's names

    def child(self, parent: nn.Module, name: str, *expected: str | type) -> Any:
        module = getattr(parent, name)
        if isinstance(expected[0], str):
            plain = path_of(module) == self.family.class_path(expected[0])
        else:
            plain = type(module) in expected
        if not plain:
            raise Left(f"{name} is a {_name(module)}")
        _reject_foreign_forward(name, module)
        return module

    def norm(self, parent: nn.Module, name: str) -> Tensor:
        norm = self.child(parent, name, self.family.rms_norm)
        self.epsilons.append(norm.variance_epsilon)
        return self.parameter(norm, "weight")

    def linear(self, parent: nn.Module, **names: str) -> dict[str, Matrix | None]:
        """The weights and biases of linear layers, by the op's name for each."""
        found: dict[str, Matrix | None] = {}
        for part, name in names.items():
            layer = getattr(parent, name)
            if is_lora(layer) and part in LAYER_PARTS:
                _reject_replaced(name, layer)
                self.adapters[part], reason = lora_of(layer)
                if reason:
                    raise Left(f"{name}: {reason}")
                layer = self.child(layer, "base_layer", *LINEAR_LAYERS)
            else:
                layer = self.child(parent, name, *LINEAR_LAYERS)
            found[part] = self.matrix(layer)
            found[f"{part}_bias"] = None if layer.bias is None else self.parameter(layer, "bias")
        return found

    def matrix(self, module: nn.Module) -> Matrix:
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            return self.parameter(module, "weight")
        packed = Packed(*(self.tensor(module, name) for name in Packed._fields))
        self.packed += packed
        return packed

    def parameter(self, module: nn.Module, name: str) -> Tensor:
        self.tensors.append(self.tensor(module, name))
        return self.tensors[-1]

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        tensor = getattr(module, name)
        # A subclass holds its values in another way: quantised, or sharded over devices.
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise Left(f"a weight of {_name(module)} is a {_name(tensor)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise Left(f"a weight of {_name(module)} has strides {tensor.stride()}")
        return tensor


def _reject_foreign_forward(what: str, module: nn.Module) -> None:
    _reject_replaced(what, module)
    _reject_replaced_class(what, module)


def _reject_replaced(what: str, module: nn.Module) -> None:
    forward = module.__dict__.get("forward")
    if forward is not None and not is_ours(forward, module):
        raise Left(f"the forward of {what} has been replaced")
    if module._compiled_call_impl is not None:
        raise Left(f"{what} is compiled by torch.compile")


def _reject_replaced_class(what: str, module: nn.Module) -> None:
    if home_of(type(module)) is None:
        raise Left(f"the forward of {what}'s class has been replaced by {describe(type(module).forward)}")


def _only(what: str, values: Any) -> Any:
    if len(set(values)) != 1:
        raise Left(f"it has several {what}: {', '.join(map(str, sorted(set(values), key=str)))}")
    return next(iter(values))


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
