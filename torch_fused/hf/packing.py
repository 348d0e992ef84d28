"""Replaces a model's linear layers and embeddings by packed modules, and reports them."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..functional import dequantize, quantize
from ..nn import QuantizedEmbedding, QuantizedLinear
from ..ops.quantized import can_pack
from .origin import path_of

PACKED = (QuantizedEmbedding, QuantizedLinear)
METAL_LINEAR = ("transformers.integrations.metal_quantization", "MetalLinear")
"""Transformers' own packed linear layer, with the same layout; it calls the groups' biases ``qbiases``."""


class Format(NamedTuple):
    bits: int
    group_size: int

    def __str__(self) -> str:
        return f"{self.bits} bits in groups of {self.group_size}"


class TiedLinear(QuantizedLinear):
    """A head that uses the packed matrix of an embedding: one matrix, in memory and in checkpoints."""

    def __init__(self, embedding: QuantizedEmbedding, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__["embedding"] = embedding  # not a submodule, so that its tensors have only one name
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bits, self.group_size = embedding.bits, embedding.group_size
        self.bias = bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.__dict__["embedding"].weight

    @property
    def scales(self) -> Tensor:  # type: ignore[override]
        return self.__dict__["embedding"].scales

    @property
    def biases(self) -> Tensor:  # type: ignore[override]
        return self.__dict__["embedding"].biases


@dataclass
class QuantizationReport:
    """Lists what is packed in a model.

    Args:
        packed: module -> its bits and group size.
        dense: linear layer or embedding that is not packed -> the reason.
        errors: module -> the error of its matrix: the root mean square of the difference from the file's matrix,
            divided by that of the matrix. Only for modules that were not converted exactly.
        nbytes: bytes of the packed matrices, scales and biases.
        weights: number of packed weights.
    """

    packed: dict[str, Format] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0
    weights: int = 0

    def __str__(self) -> str:
        formats = ", ".join(f"{count} with {form}" for form, count in Counter(self.packed.values()).items())
        size = f", {self.nbytes / 2**20:.1f} MiB, {self.nbytes / (2 * self.weights):.2f} of bfloat16"
        lines = [f"{len(self.packed)} matrices packed{f': {formats}{size}' if self.weights else ''}"]
        lines += [f"  dense: {name}: {reason}" for name, reason in self.dense.items()]
        if self.errors:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(f"  {len(self.errors)} converted with an error of at most {self.errors[worst]:.2g} ({worst})")
        return "\n".join(lines)


@dataclass
class Plan:
    """Module -> format for modules to pack, module -> reason for dense ones, and head -> embedding for tied heads."""

    packed: dict[str, Format]
    dense: dict[str, str]
    ties: dict[str, str]


def make_plan(
    model: nn.Module, choose: Callable[[str, nn.Module], Format | str], ties: Mapping[str, str] | None = None
) -> Plan:
    """Calls `choose` for each linear layer and embedding, which returns a format, or why it stays dense.

    `ties` maps modules to the owners of their shared matrices; None uses what is shared now.
    """
    plan = Plan({}, {}, {})
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, PACKED) or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        chosen = _unfit(module) or choose(name, module)
        if not isinstance(chosen, str) and not _is_metal(module):
            columns = module.weight.shape[1]
            if not can_pack(columns, chosen.group_size):
                chosen = f"{columns} columns are not a multiple of the group size, {chosen.group_size}"
        if isinstance(chosen, str):
            plan.dense[name] = chosen
        else:
            plan.packed[name] = chosen
    for head, embedding in (_shared(modules) if ties is None else ties).items():
        if head not in plan.packed and embedding not in plan.packed:
            continue
        kinds = type(modules[embedding]), type(modules[head])
        if kinds == (nn.Embedding, nn.Linear) and plan.packed.get(head) == plan.packed.get(embedding):
            plan.ties[head] = embedding
            continue
        for name, other in ((head, embedding), (embedding, head)):
            reason = plan.dense.get(name, f"it shares its matrix with {other}, which is not packed in the same way")
            plan.packed.pop(name, None)
            plan.dense[name] = reason
    return plan


def _unfit(module: Any) -> str:
    if _is_metal(module):
        return "" if module.bits in (4, 8) else f"a MetalLinear of {module.bits} bits"
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"its class is {'.'.join(path_of(module))}"  # which may compute something else
    if module.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weight is {module.weight.dtype}"
    if type(module) is nn.Embedding and module.max_norm is not None:
        return "it has a max_norm"
    return ""


def _is_metal(module: Any) -> bool:
    return path_of(module) == METAL_LINEAR and module.weight.dtype == torch.uint32


def _shared(modules: dict[str, nn.Module]) -> dict[str, str]:
    first: dict[int, str] = {}
    found = {}
    for name, module in modules.items():
        weight = module._parameters.get("weight")
        if isinstance(module, (nn.Linear, nn.Embedding)) and weight is not None:
            owner = first.setdefault(id(weight), name)
            if owner != name:
                found[name] = owner
    return found


def empty_packed(module: Any, form: Format, scales_dtype: torch.dtype | None) -> Any:
    """A packed module on the meta device for a dense one, with the same bias."""
    rows, columns = module.weight.shape
    options: dict[str, Any] = {**form._asdict(), "device": "meta", "dtype": scales_dtype}
    packed: Any
    if isinstance(module, nn.Embedding):
        packed = QuantizedEmbedding(rows, columns, **options)
    else:
        packed = QuantizedLinear(columns, rows, bias=False, **options)
        packed.bias = module.bias
    return packed.train(module.training)


def pack_module(module: Any, form: Format, scales_dtype: torch.dtype | None) -> Any:
    if _is_metal(module):
        packed: Any = QuantizedLinear(
            module.in_features, module.out_features, bias=False, **form._asdict(), device="meta"
        )
        packed.bias = module.bias
        tensors = (module.weight, module.scales, module.qbiases)
        packed.weight, packed.scales, packed.biases = (tensor.detach() for tensor in tensors)
        return packed.train(module.training)
    packed = empty_packed(module, form, scales_dtype)
    weight = module.weight.to(scales_dtype or module.weight.dtype)
    packed.weight, packed.scales, packed.biases = quantize(weight, **form._asdict())
    return packed


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Makes heads use the packed matrices of embeddings, and removes transformers' ties between them."""
    for head, embedding in ties.items():
        dense: Any = model.get_submodule(head)
        packed: Any = model.get_submodule(embedding)
        model.set_submodule(head, TiedLinear(packed, dense.bias))
    forget_ties(model, ties)


def forget_ties(model: nn.Module, heads: Any) -> None:
    """Removes transformers' ties for these modules, which no longer have tied parameters."""
    names = {f"{head}.weight" for head in heads}
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel):
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                keys = getattr(part, attribute, None) or {}
                left = {key: value for key, value in keys.items() if f"{path}.{key}".lstrip(".") not in names}
                if len(left) < len(keys):
                    setattr(part, attribute, left)


def unpack(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replaces packed modules by dense ones; tied ones are tied by transformers again."""
    dense: Any
    names = {module: name for name, module in model.named_modules()}
    for name, module in packed_modules(model).items():
        model.set_submodule(name, _unpacked(module, dtype))
    for module, head in names.items():
        if isinstance(module, TiedLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            dense.weight = model.get_submodule(names[module.__dict__["embedding"]]).weight
            dense.bias = module.bias
            model.set_submodule(head, dense)
    for part in model.modules():
        part.__dict__.pop("_tied_weights_keys", None)  # restores the class's attribute
        if isinstance(part, PreTrainedModel):
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)


def _unpacked(module: Any, dtype: torch.dtype | None) -> nn.Module:
    matrix = dequantize(
        module.weight, module.scales, module.biases, bits=module.bits, group_size=module.group_size, dtype=dtype
    )
    rows, columns = matrix.shape
    dense: Any
    if isinstance(module, QuantizedEmbedding):
        dense = nn.Embedding(rows, columns, device="meta")
    else:
        dense = nn.Linear(columns, rows, bias=False, device="meta")
        dense.bias = module.bias
    dense.weight = nn.Parameter(matrix)
    return dense.train(module.training)


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """The packed modules that own their matrix, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PACKED) and not isinstance(module, TiedLinear)
    }


def report_on(model: nn.Module, dense: dict[str, str]) -> QuantizationReport:
    report = QuantizationReport(dense=dense)
    for name, module in packed_modules(model).items():
        report.packed[name] = Format(module.bits, module.group_size)
        report.nbytes += sum(t.nbytes for t in (module.weight, module.scales, module.biases))
        report.weights += module.weight.numel() * 32 // module.bits
    return report
