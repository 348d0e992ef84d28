"""Modules over the fused ops, with the parameters and state dicts of torch's or Hugging Face's modules."""

import torch

from . import functional

__all__ = ["LayerNorm", "RMSNorm", "Softmax", "SwiGLU"]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on the fused op: the same arguments, parameters and state dict.

    Shapes: input ``(*, *normalized_shape)``, output the same; float32, float16 or bfloat16, on the CPU float64 too.

    Raises:
        RuntimeError: when called, as :func:`torch_fused.functional.layer_norm`.

    Example:
        >>> torch_fused.nn.LayerNorm(2)(torch.tensor([[1.0, 3.0]])).shape
        torch.Size([1, 2])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on the fused op: the same arguments, parameters and state dict.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the mean square; None is the machine epsilon of float32.
        elementwise_affine: whether there is a learnable weight.
        device, dtype: of the weight.
        casting_mode, weight_offset: as in :func:`torch_fused.functional.rms_norm`.

    Shapes: input ``(*, *normalized_shape)``, output the same; float32, float16 or bfloat16, on the CPU float64 too.

    Raises:
        RuntimeError: when called, as :func:`torch_fused.functional.rms_norm`.

    Example:
        >>> with torch.no_grad():
        ...     torch_fused.nn.RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.8485, 1.1314]])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        casting_mode: str = "torch",
        weight_offset: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.casting_mode = casting_mode
        self.weight_offset = weight_offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            casting_mode=self.casting_mode,
            weight_offset=self.weight_offset,
        )


class Softmax(torch.nn.Softmax):
    """`torch.nn.Softmax` on the fused op. ``dim`` None is the last dimension.

    Shapes: any input, output the same; float32, float16 or bfloat16, on the CPU float64 too.

    Raises:
        IndexError, RuntimeError: when called, as :func:`torch_fused.functional.softmax`.

    Example:
        >>> torch_fused.nn.Softmax(dim=-1)(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.softmax(input, -1 if self.dim is None else self.dim)


class SwiGLU(torch.nn.Module):
    """A SwiGLU feed-forward network, ``down_proj(silu(gate_proj(x)) * up_proj(x))``, its activation on the fused op.

    The parameters have the names of Hugging Face's ``LlamaMLP``, so state dicts are interchangeable.

    Args:
        hidden_size: features of the input and the output.
        intermediate_size: features between.
        bias: whether the projections have one.
        device, dtype: of the parameters.
        casting_mode: as in :func:`torch_fused.functional.silu_mul`.

    Shapes: input ``(*, hidden_size)``, output the same; float32, float16 or bfloat16, on the CPU float64 too.

    Raises:
        RuntimeError: when called, as :func:`torch_fused.functional.silu_mul`.

    Example:
        >>> torch_fused.nn.SwiGLU(8, 20)(torch.ones(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        casting_mode: str = "torch",
    ) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, bias, device, dtype)
        self.casting_mode = casting_mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu_mul(self.gate_proj(x), self.up_proj(x), casting_mode=self.casting_mode))
