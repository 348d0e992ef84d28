"""Checks the arguments of functions in `torch_fused.hf`: finds the model, and the inputs of `generate`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def find_model(function: str, given: Any, can: str = "forward") -> Any:
    """`given`, or the model of a pipeline, if it has the method `can`.

    Raises TypeError in the name of `function` otherwise.
    """
    model = given if isinstance(given, nn.Module) else getattr(given, "model", None)
    if isinstance(model, nn.Module) and callable(getattr(model, can, None)):
        return model
    got = repr(given) if isinstance(given, str) else type(given).__name__
    hint = f"; load it with AutoModelForCausalLM.from_pretrained({given!r})" if isinstance(given, str) else ""
    raise TypeError(f"{function}: model must be a transformers model with {can}(), or a pipeline, got {got}{hint}")


def merge_inputs(inputs: Any, generate_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``model.generate``, from `inputs` and `generate_kwargs`.

    Raises TypeError or ValueError.
    """
    if inputs is None:
        inputs = {}
    elif isinstance(inputs, Tensor):
        inputs = {"input_ids": inputs}
    elif not isinstance(inputs, Mapping):
        raise TypeError(
            f"generate: inputs must be a tensor of token ids or a mapping, got {type(inputs).__name__}; "
            'use tokenizer(text, return_tensors="pt")'
        )
    twice = inputs.keys() & generate_kwargs.keys()
    if twice:
        raise TypeError(f"generate: {min(twice)} is passed twice, in inputs and as an argument")
    arguments = {**inputs, **generate_kwargs}
    ids = arguments.get("input_ids")
    if ids is None:
        return arguments
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f'generate: input_ids must be a tensor of integers, got {got}; use tokenizer(text, return_tensors="pt")'
        )
    if ids.dim() != 2 or ids.numel() == 0:
        hint = "; use input_ids[None] for one sequence" if ids.dim() == 1 else ""
        raise ValueError(
            f"generate: input_ids must have the shape (batch, tokens), both at least 1, got {tuple(ids.shape)}{hint}"
        )
    return arguments
