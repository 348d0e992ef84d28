"""Appends the keys and values of new tokens to the buffers of a cache, in place."""

import torch
from torch import Tensor

from .library import COMPOSED, refuse_vmap, register


def kv_append_reference(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: int) -> None:
    """`kv_append_` in plain torch, without its checks."""
    keys.narrow(2, position, new_keys.shape[2]).copy_(new_keys)
    values.narrow(2, position, new_values.shape[2]).copy_(new_values)


def _kv_append_fake(keys, values, new_keys, new_values, position):
    return None


register("kv_append_", reference=kv_append_reference, fake=_kv_append_fake)
COMPOSED["kv_update_"] = ("kv_append_",)
refuse_vmap("kv_update_")


def kv_append_(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, position: int) -> None:
    """Writes ``new_keys`` and ``new_values`` into the buffers at tokens ``position : position + tokens``.

    The time depends only on the number of new tokens, not on the size of the buffers. Not differentiable.

    Args:
        keys: ``(batch, heads, capacity, head_dim)``, written in place; any dtype, any strides except expanded ones.
        values: like ``keys``, with the same dtype; head_dim may differ. Must not overlap with ``keys``.
        new_keys: ``(batch, heads, tokens, head_dim)``, any strides; dtype and device of ``keys``. Must not overlap with
            ``keys`` or ``values``.
        new_values: like ``new_keys``, with the head_dim of ``values``.
        position: the first token written, from 0 to ``capacity - tokens``.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype or device, the tokens do not fit, or an argument requires a
            gradient; the message names it. Nothing is written then.

    Example:
        >>> import torch
        >>> from torch_fused.ops.kv_cache import kv_append_
        >>> keys, values = torch.zeros(2, 1, 1, 4, 2).unbind()
        >>> kv_append_(keys, values, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 3)
        >>> keys[0, 0, :, 0]
        tensor([0., 0., 0., 1.])
    """
    _kv_append(keys, values, new_keys, new_values, position)


_kv_append = torch.ops.torch_fused.kv_append_.default

kv_update_ = torch.ops.torch_fused.kv_update_.default
""":func:`kv_append_`, then views of the first ``position + tokens`` tokens of ``keys`` and ``values``."""
