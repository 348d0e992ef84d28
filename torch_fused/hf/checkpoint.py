"""Reads and checks the tensor list of a checkpoint before anything is loaded."""

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
"""Safetensors' names for the dtypes used here."""


class Stored(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]


def stored_tensors(model: PreTrainedModel, files: Sequence[str]) -> dict[str, Stored]:
    """The tensors of a checkpoint by their names in the model.

    Raises RuntimeError for a truncated file; the message names the first incomplete tensor.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    found = {}
    for file in files:
        for stored in _read_header(file) if str(file).endswith(".safetensors") else _read_pickle(file):
            # The parts of a packed matrix are renamed like its weight.
            module, _, part = stored.name.rpartition(".")
            asked = f"{module}.weight" if part in ("scales", "biases") else stored.name
            name, pattern = rename_source_key(asked, renamings, converters, model.base_model_prefix, state)
            if pattern is None:  # converted tensors have another shape
                found[f"{name.removesuffix('.weight')}.{part}" if asked != stored.name else name] = stored
    return found


def _read_header(file: str) -> list[Stored]:
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise RuntimeError(f"{file}: the file is truncated in its header")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise RuntimeError(f"{file}: the file has no safetensors header: {error}") from None
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise RuntimeError(f"{file}: the file is truncated: {name} ends at byte {end}, the file at byte {size}")
        tensors.append(Stored(name, DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"])))
    return tensors


def _read_pickle(file: str) -> list[Stored]:
    tensors: dict[str, Any] = torch.load(file, map_location="meta", weights_only=True)
    return [Stored(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def check_packed(model: PreTrainedModel, stored: dict[str, Stored], packed: dict[str, Any]) -> None:
    """Raises RuntimeError, naming the tensor, if a tensor of a packed module is missing or wrong."""
    for name, module in packed.items():
        for part in ("weight", "scales", "biases"):
            expected = getattr(module, part)
            found = stored.get(f"{name}.{part}")
            if found is None:
                raise RuntimeError(f"the checkpoint has no tensor {name}.{part}, but {name} is packed")
            dtypes = (torch.uint32,) if part == "weight" else (torch.float32, torch.float16, torch.bfloat16)
            if found.shape != tuple(expected.shape) or found.dtype not in dtypes:
                raise RuntimeError(
                    f"{found.name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)} of shape "
                    f"{list(expected.shape)}, because {name} has {module.bits} bits and groups of {module.group_size}; "
                    f"got {str(found.dtype).removeprefix('torch.')} of shape {list(found.shape)}"
                )
    modules = dict(model.named_modules())  # a checkpoint may hold more than one model's
    for name, found in stored.items():
        owner, _, part = name.rpartition(".")
        if owner in packed or owner not in modules:
            continue
        if part == "scales":
            raise RuntimeError(f"{found.name}: {owner} is a {type(modules[owner]).__name__}, which cannot be packed")
        if part == "weight" and found.dtype == torch.uint32:
            raise RuntimeError(f"{found.name} is packed, but the checkpoint has no tensor {owner}.scales")
    if not packed:
        raise RuntimeError(f"the checkpoint has no packed tensors for a {type(model).__name__}")
