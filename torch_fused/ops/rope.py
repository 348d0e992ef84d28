"""Rotary position embedding."""

import torch
from torch import Tensor

from .checks import check_floating
from .library import leading, register


def apply_rotary_pos_emb_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, casting_mode: str = "torch"
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` in plain torch: float32 throughout ("torch"), or every product rounded ("llama")."""
    dtype = cos.dtype if casting_mode == "llama" else _arithmetic_dtype(cos)
    cos, sin = cos.unsqueeze(unsqueeze_dim).to(dtype), sin.unsqueeze(unsqueeze_dim).to(dtype)

    def rotated(x: Tensor) -> Tensor:
        wide, passed = x.to(dtype).tensor_split([cos.shape[-1]], -1)
        a, b = wide.chunk(2, -1)
        turned = wide * cos + torch.cat([-b, a], -1) * sin
        result = torch.cat([turned, passed], -1)
        return result.new_empty_strided(x.shape, _empty_rows_like(x).stride(), dtype=x.dtype).copy_(result)

    return rotated(q), rotated(k)


def apply_rotary_pos_emb_backward_reference(
    grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k: rotated back by the transposed matrix, which swaps the halves of the sines."""
    a, b = sin.chunk(2, -1)
    return apply_rotary_pos_emb_reference(grad_q, grad_k, cos, torch.cat([-b, -a], -1), unsqueeze_dim)


def _arithmetic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_rows_like(x: Tensor) -> Tensor:
    """As the C++ function of the same name (common/rows.h)."""
    result = torch.empty_like(x)
    return result if x.shape[-1] <= 1 or result.stride(-1) == 1 else x.new_empty(x.shape)


def _rope_fake(q, k, cos, sin, unsqueeze_dim=1, *, casting_mode="torch"):
    return _empty_rows_like(q), _empty_rows_like(k)


def _rope_backward_fake(grad_q, grad_k, cos, sin, unsqueeze_dim):
    return _empty_rows_like(grad_q), _empty_rows_like(grad_k)


register("apply_rotary_pos_emb", reference=apply_rotary_pos_emb_reference, fake=_rope_fake)
register(
    "apply_rotary_pos_emb_backward",
    reference=apply_rotary_pos_emb_backward_reference,
    fake=_rope_backward_fake,
    batched=apply_rotary_pos_emb_backward_reference,
)


@torch.library.register_vmap("torch_fused::apply_rotary_pos_emb")
def _rope_vmap(info, in_dims, q, k, cos, sin, unsqueeze_dim=1, *, casting_mode="torch"):
    """The batch is merged with the op's batch dimension."""
    q, k, *tables = (leading(info, x, dim) for x, dim in zip((q, k, cos, sin), in_dims[:4], strict=True))
    batch = q.shape[1]
    cos, sin = (x.expand(-1, batch, *x.shape[2:]) if x.shape[1] == 1 else x for x in tables)
    q, k, cos, sin = (x.flatten(0, 1) for x in (q, k, cos, sin))
    results = _rope(q, k, cos, sin, unsqueeze_dim, casting_mode=casting_mode)
    return tuple(x.unflatten(0, (info.batch_size, batch)) for x in results), (0, 0)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, *, casting_mode: str = "torch"
) -> tuple[Tensor, Tensor]:
    r"""Rotates queries and keys by their positions, in one launch: :math:`x \cos + \mathrm{rotate\_half}(x) \sin`.

    A drop-in replacement for Hugging Face's function of the same name (models/llama/modeling_llama.py). It uses the
    half-split form, :math:`\mathrm{rotate\_half}(a, b) = (-b, a)`. Differentiable in all four tensors.

    Args:
        q: ``(batch, heads, tokens, head_dim)``, or ``(batch, tokens, heads, head_dim)`` with ``unsqueeze_dim=2``;
            float32, float16 or bfloat16, or float64 on the CPU. A layout with a unit last stride, such as a transposed
            view of a projection, is read in place; any other layout is copied once.
        k: like ``q``, with any number of heads.
        cos: ``(batch or 1, tokens or 1, rotary_dim)``. The first ``rotary_dim`` dimensions of each head are rotated,
            the others are copied. If dtypes differ, the results are promoted as in torch.
        sin: like ``cos``.
        unsqueeze_dim: the dimension of ``q`` and ``k`` that holds the heads, 1 or 2.
        casting_mode: ``"torch"`` computes in float32 and rounds once. ``"llama"`` rounds like Hugging Face's function:
            both products, then their sum.

    Returns:
        The rotated ``q`` and ``k``, with the same shapes. They are dense, with the dimension order of the inputs, or
        contiguous if head_dim would not have a unit stride in that order.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.

    Source: Su et al., RoFormer, https://arxiv.org/abs/2104.09864.

    Example:
        >>> import torch, torch_fused
        >>> q = k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> angle = torch.full((1, 1, 2), torch.pi / 6)
        >>> torch_fused.functional.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())[0].flatten()
        tensor([0.8660, 0.5000])
    """
    if not q.dtype == k.dtype == cos.dtype == sin.dtype:
        check_floating("apply_rotary_pos_emb", q=q, k=k, cos=cos, sin=sin)
        dtype = torch.promote_types(cos.dtype, sin.dtype)
        q_dtype, k_dtype = torch.promote_types(q.dtype, dtype), torch.promote_types(k.dtype, dtype)
        dtype = torch.promote_types(q_dtype, k_dtype)
        q, k = _rope(q.to(dtype), k.to(dtype), cos.to(dtype), sin.to(dtype), unsqueeze_dim, casting_mode=casting_mode)
        return q.to(q_dtype), k.to(k_dtype)
    return _rope(q, k, cos, sin, unsqueeze_dim, casting_mode=casting_mode)


_rope = torch.ops.torch_fused.apply_rotary_pos_emb.default
