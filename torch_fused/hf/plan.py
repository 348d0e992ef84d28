"""Reads from a model what the decode op needs, following the row of its family."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantizedEmbedding, QuantizedLinear
from ..ops.decoder import LAYER_PARTS, Adapter, Matrix, Packed, make_decoder
from .described import mismatch
from .families import UNKNOWN, Family, family_of_model
from .lora import MERGE, Low, is_lora, lora_of
from .models import activation_of, is_by_length
from .origin import class_name, describe, home_of, is_ours, is_own, path_of
from .packing import TiedLinear
from .transformers_private import APPLY_GATE, attention_of, has_own_gate
from .watch import FUNCTIONS, GLOBAL_HOOKS, has_hooks

MOST_HEAD_DIM = 256  # on a GPU
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda", "mps")
SHARED_FUNCTIONS = ("transformers.masking_utils", "transformers.modeling_utils")
"""Modules from which a family's module imports functions."""

LINEAR_LAYERS = (nn.Linear, QuantizedLinear, TiedLinear)

NORMS = ("input_norm", "post_attention_norm"), ("attention_output_norm", "feed_forward_output_norm")
"""The op's names for the norms before and after attention and the feed-forward layers."""


class Left(Exception):
    """The reason why a model, or one of its calls, is left to transformers."""


@dataclass
class Plan:
    """The arguments of the decode op for a model."""

    decoder: Any  # a torch.classes.torch_fused.Decoder
    family: Family
    config: Any  # of the text model
    dtype: torch.dtype  # of the model's vectors and the cache
    device: torch.device
    rotary: Any
    table_types: tuple[str | None, ...]  # the layer types that have their own tables
    windows: list[int]
    most_positions: int | None  # the tables and the scale of queries are valid for this many
    dropout: list[nn.Module]  # modules with dropout
    attention: str  # the name of the attention function
    types: list[str] | None  # of layers
    tables: tuple[Tensor, Tensor] | None = None
    frequencies: list = field(default_factory=list)  # of the tables

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def is_current(self) -> bool:
        """Whether the plan still fits the model, if the model has the same modules and tensors."""
        types = self.types is None or self.types == self.config.layer_types
        softcap = not self.family.softcap or self.attention == attention_of(self.config)
        return self.decoder.is_current() and types and softcap

    def check_positions(self, positions: int) -> None:
        if self.most_positions is not None and positions > self.most_positions:
            raise Left(f"positions past {self.most_positions - 1}, where this model's rotary tables or queries change")

    def cos_and_sin(self, positions: int) -> tuple[Tensor, Tensor]:
        """The model's own tables for at least this many positions, stacked if it has several."""
        tables = self.tables
        if tables is None or tables[0].shape[-2] < positions or not self._has_frequencies():
            many = max(256, 1 << (positions - 1).bit_length())
            ids = torch.arange(min(many, self.most_positions or many), device=self.device)[None]
            if self.family.tables == "sections":
                ids = ids[None].expand(3, -1, -1)
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                made = [self.rotary(like, ids, *([] if kind is None else [kind])) for kind in self.table_types]
            stacked = [torch.stack([tables[i][0] for tables in made]) for i in range(2)]
            self.tables = tables = (stacked[0].squeeze(0), stacked[1].squeeze(0))
            self.frequencies = [_as_they_are(inv_freq) for inv_freq in self._inv_freqs()]
        return tables

    def _inv_freqs(self) -> Iterable[Tensor]:
        return frequencies_of(self.rotary, self.table_types)

    def _has_frequencies(self) -> bool:
        return all(map(_are_still, self.frequencies, self._inv_freqs()))


def frequencies_of(rotary: Any, types: Iterable[str | None]) -> list[Tensor]:
    return [getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq") for kind in types]


def _as_they_are(inv_freq: Tensor) -> Any:
    # Comparing values would wait for a GPU; there, the tensor and its version number are compared.
    on_the_host = inv_freq.is_cpu or inv_freq.is_inference()  # inference tensors have no version number
    return inv_freq.clone() if on_the_host else (inv_freq, inv_freq._version)


def _are_still(known: Any, inv_freq: Tensor) -> bool:
    if isinstance(known, Tensor):
        return known.device == inv_freq.device and torch.equal(known, inv_freq)
    return known[0] is inv_freq and known[1] == inv_freq._version


def read(model: Any, int8_products: bool = True) -> Plan | Left:
    """The plan for a model with exactly the classes in `FAMILIES`, or why there is none."""
    try:
        return _read(model, int8_products)
    except Left as left:
        return left


def text_model(model: Any, family: Family) -> Any:
    return model.get_submodule(family.text)


def _read(model: Any, int8_products: bool) -> Plan:
    family = family_of_model(model)
    if family is None:
        raise Left(UNKNOWN.format(type(model).__name__))
    # Wrappers around the model's forward, and hooks on the model, also run around the step.
    _reject_replaced_class("the model", model)
    _reject_unknown("the model", model)
    base = text_model(model, family)
    home: Any = home_of(type(base)) or home_of(type(model))
    for name in FUNCTIONS:
        if hasattr(home, name) and not is_own(getattr(home, name), home.__name__, *SHARED_FUNCTIONS):
            raise Left(f"{home.__name__}.{name} has been replaced by {describe(getattr(home, name))}")
    if base is not model.model:
        _reject_foreign_forward("its inner model", model.model)
    reader = _Reader(family, base.config)
    reader.check("model", base, "model")
    layers = list(base.layers[: base.config.num_hidden_layers])
    _reject_hybrid(family, layers)
    embedding = reader.embedding(base)
    windows = windows_of(base.config, family, len(layers))
    types = table_types_of(base.config, family, len(layers))
    rotary = reader.child(base, "rotary_emb", "rotary_embedding")
    found = [reader.layer(layer, i) for i, layer in enumerate(layers)]
    kinds: tuple = tuple(dict.fromkeys(types))
    if any(inv_freq.requires_grad for inv_freq in frequencies_of(rotary, kinds)):
        raise Left("its rotary frequencies require a gradient")
    weights: dict[str, Any] = {
        "embedding": reader.matrix(embedding),
        "layers": [parts[name] for parts in found for name in LAYER_PARTS],
        "norm": reader.norm(base, "norm"),
        **reader.linear(model, head="lm_head"),
        "heads": base.config.num_attention_heads,
        "activation": _only("activations", reader.activations),
        "eps": _only("epsilons of norms", reader.epsilons),
        "norm_offset": family.norm.weight_offset,
        "scaling": _only("scalings of attention", [attention.scaling for attention in reader.attentions]),
        "attention_softcap": _only("soft caps of attention", [reader.softcap(own) for own in reader.attentions]),
        "residual_scale": _only("scales of what its layers add", [reader.residual_scale(layer) for layer in layers]),
        "embedding_scale": reader.embedding_scale(base, embedding),
        "logits_scale": 1 / getattr(base.config, family.logits_divisor) if family.logits_divisor else 1.0,
        "logits_softcap": (family.logits_softcap and getattr(base.config, family.logits_softcap)) or 0.0,
        "windows": windows,
        "tables": [
            kinds.index(kind) if reader.has_positions(attention) else -1
            for kind, attention in zip(types, reader.attentions, strict=True)
        ],
        "int8_products": int8_products,
        "adapters": reader.adapters,
    }
    if reader.routing:
        chosen = _only("ways to choose experts", reader.routing)
        weights |= dict(zip(("experts_per_token", "normalise_experts"), chosen, strict=True))
    if weights.pop("head_bias") is not None:
        raise Left("lm_head has a bias")
    dtype, device = _only("dtypes or devices", {(tensor.dtype, tensor.device) for tensor in reader.tensors})
    if any(tensor.device != device for tensor in reader.packed):
        raise Left(f"not all of its packed matrices are on {device}")
    if isinstance(embedding, QuantizedEmbedding) and (embedding.output_dtype or embedding.scales.dtype) != dtype:
        raise Left(f"the output of embed_tokens does not have the norms' dtype, {dtype}")
    if dtype not in DTYPES or device.type not in DEVICES:
        raise Left(f"its weights are {dtype} on {device}")
    if device.type != "cpu" and reader.attentions[0].head_dim > MOST_HEAD_DIM:
        raise Left(f"its heads have more than {MOST_HEAD_DIM} dimensions")
    for path, module in model.named_modules():
        if path and has_hooks(module):
            raise Left(f"{path} has hooks; remove them")
    if any(GLOBAL_HOOKS):
        raise Left("there are global module hooks; remove them")
    try:
        decoder = make_decoder(**weights)
    except RuntimeError as error:
        raise Left(str(error)) from None
    return Plan(
        decoder,
        family,
        base.config,
        dtype,
        device,
        rotary,
        kinds,
        windows,
        most_positions_of(base.config, family, rotary, kinds),
        reader.dropouts,
        attention_of(base.config),
        list(base.config.layer_types) if family.windows == "layers" else None,
    )


def _reject_hybrid(family: Family, layers: list[Any]) -> None:
    for i, layer in enumerate(layers):
        if family.linear_attention and family.linear_attention in layer._modules:
            raise Left(f"layer {i} has linear attention, which the decode step does not support; other parts are fused")
    if family.gated:
        raise Left("its attention has gates, which the decode step does not support; other parts are fused")


def windows_of(config: Any, family: Family, layers: int) -> list[int]:
    """The window of each layer, 0 for none."""
    window = getattr(config, "sliding_window", None) or 0
    if family.windows != "layers":
        return [window if family.windows else 0] * layers
    types = config.layer_types[:layers]
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise Left(f"it has layers of unknown type: {', '.join(sorted(unknown))}")
    return [window if kind == "sliding_attention" else 0 for kind in types]


def table_types_of(config: Any, family: Family, layers: int) -> list[str | None]:
    """Per layer, the name of its tables of cosines and sines; None if all use the same."""
    return config.layer_types[:layers] if family.tables == "layer types" else [None] * layers


def most_positions_of(config: Any, family: Family, rotary: Any, kinds: tuple) -> int | None:
    """The length up to which the tables, and the scale of queries, do not change."""
    most = []
    for kind in kinds:
        rope_type = rotary.rope_type if kind is None else rotary.rope_type[kind]
        if is_by_length(rope_type):
            rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
            short = rope.get("original_max_position_embeddings") if rope_type == "longrope" else None
            most.append((short or rotary.original_max_seq_len) - 1)
    if family.scaled_queries and config.rope_parameters.get("llama_4_scaling_beta"):
        most.append(config.rope_parameters["original_max_position_embeddings"])
    return min(most, default=None)


class _Reader:
    """Collects modules and tensors from a model, and checks that they are plain."""

    def __init__(self, family: Family, config: Any):
        self.family = family
        self.config = config
        self.epsilons: list[float] = []
        self.activations: list[str] = []
        self.attentions: list[Any] = []
        self.dropouts: list[nn.Module] = []
        self.routing: list[tuple[int, bool]] = []  # experts per token, and whether their weights sum to 1
        self.tensors: list[Tensor] = []
        self.packed: list[Tensor] = []  # codes, scales and biases
        self.adapters: list[Adapter] = []
        self.low: dict[str, list[Adapter]] = {}  # the adapters of one layer, by the op's names, without places

    # ---- modules ----------------------------------------------------------------------------------------------------

    def child(self, parent: nn.Module, name: str, *expected: str | type) -> Any:
        module = getattr(parent, name)
        if isinstance(expected[0], str):
            self.check(name, module, expected[0])
        elif type(module) not in expected:
            raise Left(f"{name} is a {class_name(module)}{_help(module)}")
        else:
            _reject_foreign_forward(name, module)
        return module

    def check(self, what: str, module: Any, part: str) -> None:
        if path_of(module) != self.family.path(part):
            raise Left(f"{what} is a {class_name(module)}{_help(module)}")
        _reject_foreign_forward(what, module)
        _reject_unknown(what, module)

    def layer(self, layer: Any, index: int) -> dict[str, Matrix | None]:
        """The tensors of a layer, by the op's names, and its adapters."""
        found = self.parts(layer)
        if self.attentions[-1].layer_idx != index:
            raise Left(f"layer {index} keeps its tokens as layer {self.attentions[-1].layer_idx}: set its layer_idx")
        for name, low in self.low.items():
            place = index * len(LAYER_PARTS) + LAYER_PARTS.index(name)
            self.adapters += [each._replace(place=place) for each in low]
        self.low.clear()
        return found

    def parts(self, layer: Any) -> dict[str, Matrix | None]:
        family = self.family
        self.check("a layer", layer, "decoder_layer")
        attention = self.child(layer, "self_attn", "attention")
        if not attention.is_causal:
            raise Left("its attention is not causal")
        self.attentions.append(attention)
        if attention.attention_dropout:
            self.dropouts.append(attention)
        for name in family.dropouts or ():
            drop = self.child(layer, name, nn.Dropout)
            if drop.p:
                self.dropouts.append(drop)
        found: dict[str, Matrix | None] = dict.fromkeys(LAYER_PARTS)
        for names, places in zip((family.norms_before, family.norms_after), NORMS, strict=True):
            for norm, place in zip(names, places, strict=True):
                found[place] = self.norm(layer, norm) if norm else None
        found |= self.projections(attention)
        if family.qk_norm:
            found |= {name: self.norm(attention, name) for name in ("q_norm", "k_norm")}
        return found | self.feed_forward(layer)

    def projections(self, attention: Any) -> dict[str, Matrix | None]:
        if self.family.qkv:
            sizes = [self.config.num_attention_heads, *[self.config.num_key_value_heads] * 2]
            sizes = [heads * attention.head_dim for heads in sizes]
            found = self.split(attention, self.family.qkv, dict(zip("qkv", sizes, strict=True)))
        else:
            found = self.linear(attention, q="q_proj", k="k_proj", v="v_proj")
        return found | self.linear(attention, o="o_proj")

    def feed_forward(self, layer: Any) -> dict[str, Matrix | None]:
        if not self.family.experts or path_of(layer.mlp) != self.family.path("experts_block"):
            return self.mlp(self.child(layer, "mlp", "mlp"))
        block = self.child(layer, "mlp", "experts_block")
        router = self.child(block, "gate", "router")
        experts = self.child(block, "experts", "experts")
        if experts.is_transposed or experts.has_bias or not experts.has_gate:
            raise Left("its experts have biases, transposed matrices or no gates")
        _reject_replaced("the experts", experts, APPLY_GATE)
        if not has_own_gate(type(experts)):
            raise Left(f"{APPLY_GATE} of its experts is not transformers' own")
        self.routing.append((router.top_k, bool(router.norm_topk_prob)))
        self.activation(experts.act_fn)
        gate, up = self.tensor(experts, "gate_up_proj").chunk(2, 1)
        found: dict[str, Matrix | None] = {
            "router": self.parameter(router, "weight"),
            "experts_gate": gate,
            "experts_up": up,
            "experts_down": self.parameter(experts, "down_proj"),
        }
        if self.family.experts == "shared":
            found |= self.mlp(self.child(block, "shared_expert", "mlp"))
            found |= self.linear(block, shared_gate="shared_expert_gate")
            if found.pop("shared_gate_bias") is not None:
                raise Left("the gate of its shared expert has a bias")
        return found

    def mlp(self, mlp: Any) -> dict[str, Matrix | None]:
        self.activation(getattr(mlp, self.family.activation))
        if self.family.gate_up:
            rows = getattr(mlp, self.family.gate_up).out_features // 2
            found = self.split(mlp, self.family.gate_up, {"gate": rows, "up": rows}) | self.linear(
                mlp, down="down_proj"
            )
        else:
            found = self.linear(mlp, gate="gate_proj", up="up_proj", down="down_proj")
        if any(found.pop(f"{name}_bias") is not None for name in ("gate", "up", "down")):
            raise Left("its feed-forward layers have biases")
        return found

    def activation(self, activation: Any) -> None:
        kind = activation_of(activation)
        if not kind:
            raise Left(f"its activation is {class_name(activation)}")
        _reject_foreign_forward("an activation", activation)
        self.activations.append(kind)

    def embedding(self, base: Any) -> Any:
        if path_of(base.embed_tokens) == (self.family.home, self.family.embedding):
            embedding = base.embed_tokens
            _reject_foreign_forward("embed_tokens", embedding)
        elif self.family.embedding:
            raise Left(f"embed_tokens is a {class_name(base.embed_tokens)}")
        else:
            embedding = self.child(base, "embed_tokens", nn.Embedding, QuantizedEmbedding)
        if getattr(embedding, "max_norm", None) is not None:
            raise Left("model.embed_tokens has a max_norm")
        return embedding

    # ---- numbers ----------------------------------------------------------------------------------------------------

    def embedding_scale(self, base: Any, embedding: Any) -> float:
        if self.family.embedding:
            return float(embedding.embed_scale.to(embedding.weight.dtype))
        return float(getattr(base, self.family.embedding_scale)) if self.family.embedding_scale else 1.0

    def residual_scale(self, layer: Any) -> float:
        return float(getattr(layer, self.family.residual_scale)) if self.family.residual_scale else 1.0

    def softcap(self, attention: Any) -> float:
        """The soft cap of attention scores. Only "eager" attention has it; "sdpa" ignores or rejects it."""
        has = self.family.softcap and attention_of(self.config) == "eager"
        return float(attention.attn_logit_softcapping or 0) if has else 0.0

    def has_positions(self, attention: Any) -> bool:
        return not self.family.use_rotary or bool(getattr(attention, self.family.use_rotary))

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def norm(self, parent: nn.Module, name: str) -> Tensor:
        norm = self.child(parent, name, "rms_norm")
        self.epsilons.append(getattr(norm, self.family.norm.eps))
        return self.parameter(norm, "weight")

    def linear(self, parent: nn.Module, **names: str) -> dict[str, Matrix | None]:
        """The weights and biases of linear layers, by the op's names."""
        found: dict[str, Matrix | None] = {}
        for part, name in names.items():
            layer, low = self.base_of(parent, name)
            if low and part not in LAYER_PARTS:
                raise Left(f"{name} has an adapter: {MERGE}")
            self.low[part] = low
            found[part] = self.matrix(layer)
            found[f"{part}_bias"] = None if layer.bias is None else self.parameter(layer, "bias")
        return found

    def split(self, parent: nn.Module, name: str, sizes: dict[str, int]) -> dict[str, Matrix | None]:
        """Splits the rows of one linear layer into several of the op's matrices."""
        layer, low = self.base_of(parent, name)
        matrix, bias = self.matrix(layer), None if layer.bias is None else self.parameter(layer, "bias")
        found: dict[str, Matrix | None] = {}
        start = 0
        for part, count in sizes.items():
            rows = slice(start, start + count)
            found[part] = Packed(*(tensor[rows] for tensor in matrix)) if isinstance(matrix, Packed) else matrix[rows]
            found[f"{part}_bias"] = None if bias is None else bias[rows]
            self.low[part] = [each._replace(b=each.b[rows]) for each in low]
            start += count
        return found

    def base_of(self, parent: nn.Module, name: str) -> tuple[Any, list[Adapter]]:
        """A linear layer, and its active adapters."""
        layer = getattr(parent, name)
        if not is_lora(layer):
            return self.child(parent, name, *LINEAR_LAYERS), []
        _reject_replaced(name, layer)
        low, reason = lora_of(layer)
        if reason:
            raise Left(f"{name}: {reason}")
        return self.child(layer, "base_layer", *LINEAR_LAYERS), [self.adapter(name, each) for each in low]

    def adapter(self, name: str, low: Low) -> Adapter:
        for module in (low.a, low.b, low.dropout):
            _reject_foreign_forward(f"an adapter of {name}", module)
        if isinstance(low.dropout, nn.Dropout) and low.dropout.p:
            self.dropouts.append(low.dropout)
        return Adapter(-1, self.tensor(low.a, "weight"), self.tensor(low.b, "weight"), low.scale)

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
        # A subclass stores its values differently, for example quantised or sharded.
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise Left(f"a weight of {class_name(module)} is a {class_name(tensor)}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise Left(f"a weight of {class_name(module)} has strides {tensor.stride()}")
        return tensor


def _help(module: nn.Module) -> str:
    """How to make a module of another class work with the step."""
    if hasattr(module, "lora_A") or hasattr(module, "merged_adapters"):
        return f": {MERGE}"
    return ""


def _reject_unknown(what: str, module: nn.Module) -> None:
    reason = mismatch(module)
    if reason:
        raise Left(f"{what}: {reason}")


def _reject_foreign_forward(what: str, module: nn.Module) -> None:
    _reject_replaced(what, module)
    _reject_replaced_class(what, module)


def _reject_replaced(what: str, module: nn.Module, method: str = "forward") -> None:
    own = module.__dict__.get(method)
    if own is not None and not is_ours(own, module):
        raise Left(f"the {method} of {what} has been replaced")
    if module._compiled_call_impl is not None:
        raise Left(f"{what} is compiled by torch.compile")


def _reject_replaced_class(what: str, module: nn.Module) -> None:
    if home_of(type(module)) is None:
        raise Left(f"the forward of {what}'s class has been replaced by {describe(type(module).forward)}")


def _only(what: str, values: Any) -> Any:
    if len(set(values)) != 1:
        raise Left(f"it has different {what}: {', '.join(map(str, sorted(set(values), key=str)))}")
    return next(iter(values))
