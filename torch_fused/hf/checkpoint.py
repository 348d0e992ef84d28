"""What the files of a checkpoint hold, read and checked before anything is loaded."""

import json
import os
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

DTYPES = {"U32": torch.uint32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Safetensors' names for the dtypes that matter here."""


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]


def stored_tensors(model: PreTrainedModel, files: Sequence[str]) -> dict[str, Stored]:
    """The tensors of a checkpoint by the names that they have in the model.

    Raises RuntimeError for a file that is cut off; the message names the first tensor that is not whole.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    found = {}
    for file in files:
        for stored in _read_header(file) if str(file).endswith(".safetensors") else _read_pickle(file):
            # The parts of a packed matrix go where its weight goes.
            module, _, part = stored.name.rpartition(".")
            asked = f"{module}.weight" if part in ("scales", "biases") else stored.name
            name, pattern = rename_source_key(asked, renamings, converters, model.base_model_prefix, state)
            if pattern is None:  # what is converted has another shape
                found[f"{name.removesuffix('.weight')}.{part}" if asked != stored.name else name] = stored
    return found


def _read_header(file: str) -> list[Stored]:
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise RuntimeError(f"{file}: the file is cut off in its header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise RuntimeError(f"{file}: it has no safetensors header: {error}") from None
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise RuntimeError(f"{file}: the file is cut off: {name} ends at byte {end}, the file at byte {size}")
        tensors.append(Stored(name, DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])))
    return tensors


def _read_pickle(file: str) -> list[Stored]:
    tensors: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True)
    return [Stored(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def check_packed(model: PreTrainedModel, stored: dict[str, Stored], packed: dict[str, Any]) -> None:
    """Raises RuntimeError, which names the tensor, if one of a packed module is missing or wrong."""
    for name, module in packed.items():
        for part in ("weight", "scales", "biases"):
            expected = getattr(module, part)
            found = stored.get(f"{name}.{part}")
            if found is None:
                raise RuntimeError(f"the checkpoint has no tensor {name}.{part}, and {name} is packed in it")
            dtypes = (torch.uint32,) if part == "weight" else (torch.float32, torch.float16, torch.bfloat16)
            if found.shape != tuple(expected.shape) or found.dtype not in dtypes:
                raise RuntimeError(
                    f"{found.name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} with the shape "
                    f"{list(expected.shape)}, as {name} has {module.bits} bits and groups of {module.group_size}; "
                    f"got {str(found.dtype).removeprefix('torch.')} with {list(found.shape)}"
                )
    modules = dict(model.named_modules())  # a checkpoint may hold more than one model's
    for name, found in stored.items():
        owner, _, part = name.rpartition(".")
        if owner in packed or owner not in modules:
            continue
        if part == "scales":
            raise RuntimeError(f"{found.name}: {owner} is a {type(modules[owner]).__name__}, which cannot be packed")
        if part == "weight" and found.dtype == torch.uint32:
            raise RuntimeError(f"{found.name} is packed, and the checkpoint has no tensor {owner}.scales")
    if not packed:
        raise RuntimeError(f"the checkpoint has no packed tensor that a {type(model).__name__} has")
