"""Packed weights for transformers: a quantization config for `from_pretrained`, and `quantize_`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.logging import tqdm
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..functional import quantize
from ..ops.quantized import check_format
from .checkpoint import Stored, check_packed, stored_tensors
from .inputs import find_model
from .packing import (
    PACKED,
    Format,
    Plan,
    QuantizationReport,
    empty_packed,
    forget_ties,
    make_plan,
    pack_module,
    packed_modules,
    report_on,
    tie,
    unpack,
)
from .transformers_private import kept_in_float32

METHOD = "torch_fused"
"""The ``quant_method`` in a config.json."""
SCALES = ("float32", "float16", "bfloat16")


@register_quantization_config(METHOD)
class TorchFusedConfig(QuantizationConfigMixin):
    """Packs the weights of a model while `from_pretrained` loads it.

    Linear layers and embeddings are packed; a head that is tied to its embedding shares the packed matrix. Everything
    else stays dense, and so do matrices with a number of columns that is not a multiple of the group size.
    ``model.hf_quantizer.report`` lists what was packed and what was not.

    Args:
        bits: bits per weight, 4 or 8.
        group_size: 32, 64 or 128 columns that share a scale and a bias.
        modules_to_not_convert: names of modules that stay dense, matched as in transformers' other configs.
        per_module: exact module name -> its own format, ``{"bits": ..., "group_size": ...}``, or False to keep it
            dense.
        scales_dtype: dtype of scales and biases: float32, float16 or bfloat16; None uses the model's.
        quant_method: identifies this class in a config.json; do not pass it.

    Raises:
        RuntimeError: ``bits``, ``group_size`` or ``scales_dtype`` has another value; the message names the module.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> config = TorchFusedConfig(bits=4, group_size=64)
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct", quantization_config=config)
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        modules_to_not_convert: Sequence[str] | None = None,
        per_module: dict[str, Any] | None = None,
        scales_dtype: torch.dtype | str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        check_format("TorchFusedConfig", bits, group_size)
        self.quant_method: Any = quant_method
        self.bits, self.group_size = bits, group_size
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.per_module = dict(per_module or {})
        for name, form in self.per_module.items():
            if form is not False:
                check_format(f"TorchFusedConfig: {name}", *self._named_format(form))
        self.scales_dtype = None if scales_dtype is None else str(scales_dtype).removeprefix("torch.")
        if self.scales_dtype not in (None, *SCALES):
            raise RuntimeError(f"TorchFusedConfig: scales_dtype must be one of {', '.join(SCALES)}, got {scales_dtype}")

    def to_dict(self) -> dict[str, Any]:
        always = ("quant_method", "bits", "group_size")
        return {name: value for name, value in self.__dict__.items() if name in always or value}

    def format_of(self, name: str) -> Format | str:
        """The format of a module, or why it stays dense."""
        form = self.per_module.get(name)
        if form is False:
            return "left dense by per_module"
        if form is not None:
            return self._named_format(form)
        if not should_convert_module(name, self.modules_to_not_convert):
            return "left dense by modules_to_not_convert"
        return Format(self.bits, self.group_size)

    def _named_format(self, form: dict[str, int]) -> Format:
        return Format(form.get("bits", self.bits), form.get("group_size", self.group_size))

    def torch_scales_dtype(self) -> torch.dtype | None:
        return None if self.scales_dtype is None else getattr(torch, self.scales_dtype)

    def note_formats(self, model: nn.Module) -> None:
        """Records the modules that are packed in another format than this config's default."""
        self.per_module = {name: form for name, form in self.per_module.items() if form is False}
        for name, module in model.named_modules():  # tied heads too, for they have their embedding's
            if isinstance(module, PACKED) and (module.bits, module.group_size) != (self.bits, self.group_size):
                self.per_module[name] = {"bits": module.bits, "group_size": module.group_size}


@register_quantizer(METHOD)
class TorchFusedQuantizer(HfQuantizer):
    """Called by transformers while it loads a model with a `TorchFusedConfig`."""

    requires_calibration = False
    quantization_config: TorchFusedConfig

    def __init__(self, quantization_config: TorchFusedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = QuantizationReport()
        self.dtype: torch.dtype | None = None
        self._plan = Plan({}, {}, {})
        self._stored: dict[str, Stored] | None = None  # None where the tensors come from no files

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        stored = self._stored = stored_tensors(model, files) if files else None
        ties = {_owner(target): _owner(source) for target, source in model.all_tied_weights_keys.items()}
        self._plan = plan = make_plan(model, lambda name, module: self._choose(model, name), ties)
        modules = {}
        for name, form in plan.packed.items():
            dense = model.get_submodule(name)
            if not self._is_tied(name):
                modules[name] = packed = empty_packed(dense, form, self._scales_dtype(name))
                model.set_submodule(name, packed)
        if self.pre_quantized:
            if stored is not None:
                check_packed(model, stored, modules)
        else:
            for name, module in modules.items():
                shape = (module.weight.shape[0], module.weight.shape[1] * 32 // module.bits)
                self._check_dense(f"{name}.weight", shape)
                module.weight = torch.empty(shape, dtype=self.dtype, device="meta")  # as it is read
        tie(model, {head: owner for head, owner in plan.ties.items() if self._is_tied(head)})
        forget_ties(model, plan.ties)  # matrices that a checkpoint has twice are compared after loading

    def _choose(self, model: PreTrainedModel, name: str) -> Format | str:
        chosen = self.quantization_config.format_of(name)
        if isinstance(chosen, str):
            return chosen
        if not should_convert_module(name, kept_in_float32(model)):
            return "transformers keeps it in float32"
        stored = self._stored
        tied_to = next((_owner(s) for t, s in model.all_tied_weights_keys.items() if _owner(t) == name), name)
        if stored is not None and not {f"{name}.weight", f"{tied_to}.weight"} & stored.keys():
            return "its weight is not in the checkpoint"
        if stored is not None and self.pre_quantized and not {f"{name}.scales", f"{tied_to}.scales"} & stored.keys():
            return "it is dense in the checkpoint"
        return chosen

    def _is_tied(self, name: str) -> bool:
        """Whether the module is tied and the checkpoint has no separate matrix for it."""
        return name in self._plan.ties and f"{name}.weight" not in (self._stored or {})

    def _scales_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in the checkpoint, or else the requested one."""
        found = (self._stored or {}).get(f"{name}.scales") if self.pre_quantized else None
        if found is not None and isinstance(found.dtype, torch.dtype):
            return found.dtype
        return self.quantization_config.torch_scales_dtype() or self.dtype

    def _check_dense(self, name: str, shape: tuple[int, int]) -> None:
        found = (self._stored or {}).get(name)
        if found is None:
            return
        if found.dtype == torch.uint32:
            raise RuntimeError(f"{found.name} is already packed; use torch_fused.hf.load_mlx for MLX checkpoints")
        if found.shape != shape:
            raise RuntimeError(f"{found.name} must have the shape {list(shape)}, got {list(found.shape)}")

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        owner, _, part = param_name.rpartition(".")
        return not self.pre_quantized and part == "weight" and owner in self._plan.packed

    def get_quantize_ops(self) -> ConversionOps:
        return Pack(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        plan = self._plan
        for head, embedding in plan.ties.items():
            if not self._is_tied(head) and _equal(model.get_submodule(head), model.get_submodule(embedding)):
                tie(model, {head: embedding})
        give_dtype(model, self.dtype)
        self.quantization_config.note_formats(model)
        self.report = report_on(model, plan.dense)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        unpack(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class Pack(ConversionOps):
    """Converts a weight, when it is read, to the three tensors of its packed module."""

    def __init__(self, quantizer: TorchFusedQuantizer):
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        ((name, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        owner = _owner(name)
        weight = weight.to(self._quantizer._scales_dtype(owner))
        packed, scales, biases = quantize(weight, **self._quantizer._plan.packed[owner]._asdict())
        return {name: packed, f"{owner}.scales": scales, f"{owner}.biases": biases}


def quantize_(
    model: Any,
    *,
    bits: int = 4,
    group_size: int = 64,
    modules_to_not_convert: Sequence[str] | None = None,
    per_module: dict[str, Any] | None = None,
    scales_dtype: torch.dtype | str | None = None,
) -> QuantizationReport:
    """Packs the weights of a model in place, like `from_pretrained` with a :class:`TorchFusedConfig`.

    The model can then be saved with ``save_pretrained``. ``MetalLinear`` layers, transformers' packed layers for Apple
    GPUs, are converted without changing their weights. Add adapters afterwards.

    Args:
        model: a transformers model, any module, or a pipeline.
        bits, group_size, modules_to_not_convert, per_module, scales_dtype: as in :class:`TorchFusedConfig`.

    Returns:
        A report of what was packed, and what stayed dense and why.

    Raises:
        TypeError: ``model`` is none of these.
        RuntimeError: an argument has a wrong value, or the model has adapters or is quantised in another way.

    Example:
        >>> print(quantize_(model, bits=8, group_size=32))
        16 matrices packed: 16 with 8 bits in groups of 32, ... MiB, 0.62 of bfloat16
    """
    model = find_model("quantize_", model)
    config = TorchFusedConfig(bits, group_size, modules_to_not_convert, per_module, scales_dtype)
    method = getattr(model, "quantization_method", None)
    if method not in (None, METHOD, "metal"):
        raise RuntimeError(f"quantize_: model is already quantised with {method}")
    if any(hasattr(module, "peft_config") for module in model.modules()):
        raise RuntimeError("quantize_: model has adapters; quantise it before adding them")
    kept = [name for module in model.modules() for name in kept_in_float32(module)]

    def choose(name: str, module: Any) -> Format | str:
        if hasattr(module, "qbiases"):
            return Format(module.bits, module.group_size)
        return config.format_of(name) if should_convert_module(name, kept) else "transformers keeps it in float32"

    plan = make_plan(model, choose)
    dtype = getattr(model, "dtype", None)
    for name, form in tqdm(plan.packed.items(), desc="Packing weights"):
        if name not in plan.ties:
            packed = pack_module(model.get_submodule(name), form, config.torch_scales_dtype())
            model.set_submodule(name, packed)
    tie(model, plan.ties)
    give_dtype(model, dtype)
    config.note_formats(model)
    report = report_on(model, plan.dense)
    if isinstance(model, PreTrainedModel):
        quantizer = TorchFusedQuantizer(config, pre_quantized=True)
        quantizer.dtype, quantizer._plan = dtype, plan
        for name, value in {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": METHOD}.items():
            setattr(model, name, value)
        quantizer.postprocess_model(model)  # as after `from_pretrained`
        report = quantizer.report
    return report


def give_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Sets the output dtype of embeddings to the model's if their scales have another dtype."""
    for module in packed_modules(model).values():
        if hasattr(module, "output_dtype") and module.scales.dtype != dtype:
            module.output_dtype = dtype


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _equal(first: Any, second: Any) -> bool:
    if first.weight.is_meta or second.weight.is_meta:
        return False
    pairs = ((getattr(first, part), getattr(second, part)) for part in ("weight", "scales", "biases"))
    return all(a.dtype == b.dtype and bool((_words(a) == _words(b)).all()) for a, b in pairs)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
