"""Packed weights: 4 or 8 bits each, in MLX's affine layout."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_floating
from .library import leading, register, run_first

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)

_BLOCK = 1 << 22  # weights quantised at once; the temporary tensors are several times larger


def can_pack(columns: int, group_size: int) -> bool:
    """Whether rows with this many columns divide into whole groups."""
    return columns > 0 and columns % group_size == 0


def quantize(weight: Tensor, *, bits: int = 4, group_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    r"""Packs a matrix: :math:`w \approx scale \cdot code + bias`, with a scale and a bias per group of columns.

    Codes, scales and biases are the same as from MLX's quantiser, ``mlx.core.quantize``. In each group, 0 and the
    minimum or maximum, whichever is larger in magnitude, are represented exactly.

    Args:
        weight: ``(..., columns)``; float32, float16 or bfloat16. A group with NaN or infinity becomes NaN.
        bits: bits per code, 4 or 8.
        group_size: columns per group: 32, 64 or 128. The number of columns must be a multiple of it.

    Returns:
        ``(weight, scales, biases)``: the codes as uint32 ``(..., columns * bits / 32)``, with the first column in the
        lowest bits; scales and biases ``(..., columns / group_size)`` in the weight's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or value; the message names it.

    Source: the affine mode of https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html.

    Example:
        >>> import torch, torch_fused
        >>> weight, scales, biases = torch_fused.functional.quantize(torch.arange(32.0)[None], group_size=32)
        >>> [hex(word) for word in weight[0].tolist()], scales.tolist(), biases.tolist()
        (['0xccddeeff', '0x8899aabb', '0x44556677', '0x112233'], [[-2.066666603088379]], [[31.0]])
    """
    check_format("quantize", bits, group_size)
    check_floating("quantize", weight=weight)
    if weight.dtype == torch.float64 or weight.dim() == 0 or weight.shape[-1] % group_size != 0:
        raise RuntimeError(
            f"quantize: weight must be float32, float16 or bfloat16 and have a multiple of group_size ({group_size}) "
            f"columns, got {weight.dtype} of shape {list(weight.shape)}"
        )
    *leading, columns = weight.shape
    with torch.no_grad():
        rows = weight.detach().reshape(-1, columns) if columns else weight.new_empty(0, 0)
        packed = torch.empty(len(rows), columns * bits // 32, dtype=torch.int32, device=weight.device)
        scales, biases = (weight.new_empty(len(rows), columns // group_size) for _ in range(2))
        step = max(1, _BLOCK // max(1, columns))
        for start in range(0, len(rows), step):
            block = slice(start, start + step)
            packed[block], scales[block], biases[block] = _quantize_rows(rows[block], bits, group_size)
    return (
        packed.view(torch.uint32).reshape(*leading, -1 if packed.numel() else columns * bits // 32),
        scales.reshape(*leading, columns // group_size),
        biases.reshape(*leading, columns // group_size),
    )


def _quantize_rows(rows: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = rows.float().unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1)
    # Both the edge of larger magnitude and 0 are on the grid: they are a whole number of steps apart.
    from_low = low.abs() > high.abs()
    edge = torch.where(from_low, low, high)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
    step = torch.where(from_low, step, -step)
    steps = torch.round(edge / step)
    scales = torch.where(steps == 0, step, edge / steps)
    biases = torch.where(steps == 0, 0.0, edge)
    codes = torch.round((groups - biases[..., None]) / scales[..., None]).clamp(0, 2**bits - 1)
    codes = codes.nan_to_num().to(torch.int32).view(len(rows), -1, 32 // bits)
    packed = (codes << _shifts(bits, rows.device)).sum(-1, dtype=torch.int32)  # the codes share no bits
    return packed, scales.to(rows.dtype), biases.to(rows.dtype)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)


def check_format(op: str, bits: int, group_size: int) -> None:
    if bits not in BITS:
        raise RuntimeError(f"{op}: bits must be 4 or 8, got {bits}")
    if group_size not in GROUP_SIZES:
        raise RuntimeError(f"{op}: group_size must be 32, 64 or 128, got {group_size}")


def dequantize_reference(
    weight: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`dequantize` in plain torch: a product and a sum in float32 or float64, rounded once."""
    wide = torch.promote_types(torch.promote_types(scales.dtype, torch.float32), dtype or torch.float32)
    codes = weight.contiguous().view(torch.int32)[..., None] >> _shifts(bits, weight.device) & (2**bits - 1)
    groups = codes.flatten(-2).unflatten(-1, (-1, group_size)).to(wide)
    return (groups * scales.to(wide)[..., None] + biases.to(wide)[..., None]).flatten(-2).to(dtype or scales.dtype)


def quantized_linear_reference(
    x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Tensor | None = None, *, bits: int, group_size: int
) -> Tensor:
    """`quantized_linear` in plain torch: the product with the unpacked matrix."""
    matrix = dequantize_reference(weight, scales, biases, bits=bits, group_size=group_size, dtype=x.dtype)
    return F.linear(x, matrix, bias)


def _dequantize_fake(weight, scales, biases, *, bits, group_size, dtype=None):
    return scales.new_empty((*weight.shape[:-1], weight.shape[-1] * 32 // bits), dtype=dtype or scales.dtype)


def _quantized_linear_fake(x, weight, scales, biases, bias=None, *, bits, group_size):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register("dequantize", reference=dequantize_reference, fake=_dequantize_fake)
register("quantized_linear", reference=quantized_linear_reference, fake=_quantized_linear_fake)


def _dequantize_vmap(info, in_dims, *packed, **options):
    """The batch becomes a leading dimension."""
    return _dequantize(*map(partial(leading, info), packed, in_dims), **options), 0


torch.library.register_vmap("torch_fused::dequantize", _dequantize_vmap)


@torch.library.register_vmap("torch_fused::quantized_linear")
def _quantized_linear_vmap(info, in_dims, x, weight, scales, biases, bias=None, *, bits, group_size):
    """A batch of vectors becomes a leading dimension; a batch of matrices is unpacked."""
    options = {"bits": bits, "group_size": group_size}
    run_first(_quantized_linear, info, in_dims, *(x, weight, scales, biases, bias)[: len(in_dims)], **options)
    packed, x = (weight, scales, biases), leading(info, x, in_dims[0])
    if all(dim is None for dim in in_dims[1:]):
        return _quantized_linear(x, *packed, bias, **options), 0
    if all(dim is None for dim in in_dims[1:4]):
        result = _quantized_linear(x, *packed, **options)
    else:
        matrices, _ = _dequantize_vmap(info, in_dims[1:4], *packed, **options, dtype=x.dtype)
        result = (x.reshape(len(x), -1, x.shape[-1]) @ matrices.mT).view(*x.shape[:-1], matrices.shape[-2])
    if bias is not None:
        bias = leading(info, bias, in_dims[4])
        result = result + bias.view(len(bias), *[1] * (x.dim() - 2), -1)
    return result, 0


def dequantize(
    weight: Tensor, scales: Tensor, biases: Tensor, *, bits: int, group_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Unpacks a matrix: :math:`scale \cdot code + bias`, computed in float32 and rounded once.

    Args:
        weight, scales, biases, bits, group_size: a packed matrix as returned by :func:`quantize`. The scales and biases
            may be float32, float16 or bfloat16.
        dtype: dtype of the result; None uses the dtype of the scales.

    Returns:
        ``(..., columns)``. Not differentiable.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Example:
        >>> import torch, torch_fused
        >>> packed = torch_fused.functional.quantize(torch.linspace(-1.0, 14.0, 32)[None], bits=8, group_size=32)
        >>> torch_fused.functional.dequantize(*packed, bits=8, group_size=32)[0, :3]
        tensor([-1.0000, -0.5294, -0.0588])
    """
    return _dequantize(weight, scales, biases, bits=bits, group_size=group_size, dtype=dtype)


def quantized_linear(
    x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, bias: Tensor | None = None, *, bits: int, group_size: int
) -> Tensor:
    r"""Multiplies by a packed matrix: :math:`x W^T + bias` with :math:`W = scale \cdot code + bias`.

    Replaces ``F.linear`` on the unpacked matrix. Up to eight vectors are multiplied by the packed rows directly; for
    more vectors, the matrix is unpacked first. Differentiable in ``x`` and ``bias``.

    Args:
        x: ``(..., columns)``; float32, float16 or bfloat16, or float64 on the CPU.
        weight, scales, biases, bits, group_size: a packed matrix ``(rows, columns)`` as returned by :func:`quantize`.
            The scales and biases may be float32, float16 or bfloat16.
        bias: ``(rows,)`` in ``x``'s dtype, or None.

    Returns:
        ``(..., rows)`` in ``x``'s dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or value; the message names it.

    Example:
        >>> import torch, torch_fused
        >>> packed = torch_fused.functional.quantize(torch.ones(2, 32), group_size=32)
        >>> torch_fused.functional.quantized_linear(torch.ones(1, 32), *packed, bits=4, group_size=32)
        tensor([[32., 32.]])
    """
    return _quantized_linear(x, weight, scales, biases, bias, bits=bits, group_size=group_size)


_dequantize = torch.ops.torch_fused.dequantize.default
_quantized_linear = torch.ops.torch_fused.quantized_linear.default
