"""The sum of the squares of many tensors, for the norm of all gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import register


def sum_of_squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """`sum_of_squares` in plain torch, without its checks."""
    wide = _result_dtype(tensors)
    return torch.stack([tensor.to(wide).square().sum() for tensor in tensors]).sum()


def _result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _sum_of_squares_fake(tensors):
    return tensors[0].new_empty((), dtype=_result_dtype(tensors))


register("sum_of_squares", reference=sum_of_squares_reference, fake=_sum_of_squares_fake)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of all elements of all tensors, with 28 tensors per launch on a GPU and one final launch.

    Its square root equals :func:`torch.nn.utils.get_total_norm`, except that 16-bit norms are not rounded. The
    summation order depends only on the sizes, so the same tensors give the same bits. Not differentiable: call it under
    :func:`torch.no_grad`.

    Args:
        tensors: at least one, all on one device, with any shape and strides; each float32, float16 or bfloat16, or
            float64 on the CPU.

    Returns:
        One float32 on the device of the tensors; float64 if all tensors are. The host does not wait for it.

    Raises:
        RuntimeError: an argument does not meet the requirements above; the message names it.

    Example:
        >>> import torch
        >>> from torch_fused.ops.sum_of_squares import sum_of_squares
        >>> sum_of_squares([torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
        tensor(14.)
    """
    return torch.ops.torch_fused.sum_of_squares.default(tensors)
