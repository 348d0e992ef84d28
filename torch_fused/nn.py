"""Modules that use the fused ops, with the same parameters and state dicts as torch's or Hugging Face's modules."""

import torch

from . import functional
from .ops.quantized import can_pack, check_format

__all__ = ["GeGLU", "LayerNorm", "QuantizedEmbedding", "QuantizedLinear", "RMSNorm", "Softmax", "SwiGLU"]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with the fused op: the same arguments, parameters and state dict.

    Shapes: input ``(*, *normalized_shape)``, output the same; float32, float16 or bfloat16, or float64 on the CPU.

    Raises:
        RuntimeError: when called, as in :func:`torch_fused.functional.layer_norm`.

    Example:
        >>> torch_fused.nn.LayerNorm(2)(torch.tensor([[1.0, 3.0]])).shape
        torch.Size([1, 2])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class _Packed(torch.nn.Module):
    """A packed matrix in buffers with MLX's names."""

    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        bits: int,
        group_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_format(name, bits, group_size)
        if not can_pack(columns, group_size):
            raise RuntimeError(f"{name}: the columns must be a multiple of group_size ({group_size}), got {columns}")
        self.bits, self.group_size = bits, group_size
        # Zero scales, so that a module that is not loaded yet returns zeros.
        packed = torch.zeros(rows, columns * bits // 32, dtype=torch.int32, device=device).view(torch.uint32)
        self.register_buffer("weight", packed)
        self.register_buffer("scales", torch.zeros(rows, columns // group_size, device=device, dtype=dtype))
        self.register_buffer("biases", torch.zeros(rows, columns // group_size, device=device, dtype=dtype))

    def _pack(self, weight: torch.Tensor) -> None:
        packed = functional.quantize(weight, bits=self.bits, group_size=self.group_size)
        self.weight, self.scales, self.biases = packed


class QuantizedEmbedding(_Packed):
    """`torch.nn.Embedding` with a packed matrix: rows are unpacked when they are looked up.

    Args:
        num_embeddings: number of rows.
        embedding_dim: number of columns, a multiple of ``group_size``.
        bits: bits per weight, 4 or 8.
        group_size: 32, 64 or 128 columns that share a scale and a bias.
        device, dtype: of the scales and biases; float32, float16 or bfloat16.
        output_dtype: dtype of the result; None uses the dtype of the scales.

    Shapes: ids ``(*)``, output ``(*, embedding_dim)``. The state dict has MLX's format: ``weight`` (uint32),
    ``scales``, ``biases``, as returned by :func:`torch_fused.functional.quantize`; none of them has a gradient.

    Raises:
        RuntimeError: ``bits``, ``group_size`` or ``embedding_dim`` cannot be packed.

    Example:
        >>> embedding = torch.nn.Embedding.from_pretrained(torch.eye(32))
        >>> packed = torch_fused.nn.QuantizedEmbedding.from_embedding(embedding, group_size=32)
        >>> packed(torch.tensor([1]))[0, :3], packed.as_linear(torch.ones(32)).shape
        (tensor([0., 1., 0.]), torch.Size([32]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int = 4,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, group_size, device, dtype)
        self.num_embeddings, self.embedding_dim, self.output_dtype = num_embeddings, embedding_dim, output_dtype

    @classmethod
    def from_embedding(
        cls, embedding: torch.nn.Embedding, *, bits: int = 4, group_size: int = 64
    ) -> "QuantizedEmbedding":
        """Packs an embedding's matrix."""
        packed = cls(*embedding.weight.shape, bits=bits, group_size=group_size, device="meta")
        packed._pack(embedding.weight)
        return packed.train(embedding.training)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.weight.view(torch.int32)[ids].view(torch.uint32)
        return functional.dequantize(
            rows,
            self.scales[ids],
            self.biases[ids],
            bits=self.bits,
            group_size=self.group_size,
            dtype=self.output_dtype,
        )

    def as_linear(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies `x` by the matrix, for a head that is tied to the embedding."""
        return functional.quantized_linear(
            x, self.weight, self.scales, self.biases, bits=self.bits, group_size=self.group_size
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"


class QuantizedLinear(_Packed):
    """`torch.nn.Linear` with a packed matrix.

    Args:
        in_features: number of columns, a multiple of ``group_size``.
        out_features: number of rows.
        bias: whether to add a bias, which is a parameter.
        bits: bits per weight, 4 or 8.
        group_size: 32, 64 or 128 columns that share a scale and a bias.
        device, dtype: of the scales, the biases and the bias; float32, float16 or bfloat16.

    Shapes: input ``(*, in_features)``, output ``(*, out_features)`` in the input's dtype. The state dict has MLX's
    format: ``weight`` (uint32), ``scales``, ``biases``, as returned by :func:`torch_fused.functional.quantize`, and
    ``bias``. Only ``bias`` and the input have gradients.

    Raises:
        RuntimeError: ``bits``, ``group_size`` or ``in_features`` cannot be packed; when called, as in
            :func:`torch_fused.functional.quantized_linear`.

    Example:
        >>> linear = torch.nn.Linear(64, 3)
        >>> packed = torch_fused.nn.QuantizedLinear.from_linear(linear)
        >>> packed(torch.ones(2, 64)).shape, packed.weight.shape
        (torch.Size([2, 3]), torch.Size([3, 8]))
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, group_size, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = torch.nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, bits: int = 4, group_size: int = 64) -> "QuantizedLinear":
        """Packs a linear layer's matrix; shares its bias."""
        rows, columns = linear.weight.shape
        packed = cls(columns, rows, bias=False, bits=bits, group_size=group_size, device="meta")
        packed._pack(linear.weight)
        packed.bias = linear.bias
        return packed.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return functional.quantized_linear(
            input, self.weight, self.scales, self.biases, bias, bits=self.bits, group_size=self.group_size
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with the fused op: the same arguments, parameters and state dict.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the mean square; None is the machine epsilon of float32.
        elementwise_affine: whether to learn a weight.
        device, dtype: of the weight.
        casting_mode, weight_offset: as in :func:`torch_fused.functional.rms_norm`.

    Shapes: input ``(*, *normalized_shape)``, output the same; float32, float16 or bfloat16, or float64 on the CPU.

    Raises:
        RuntimeError: when called, as in :func:`torch_fused.functional.rms_norm`.

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
    """`torch.nn.Softmax` with the fused op. If ``dim`` is None, the last dimension is used.

    Shapes: any input, output the same; float32, float16 or bfloat16, or float64 on the CPU.

    Raises:
        IndexError, RuntimeError: when called, as in :func:`torch_fused.functional.softmax`.

    Example:
        >>> torch_fused.nn.Softmax(dim=-1)(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.softmax(input, -1 if self.dim is None else self.dim)


class SwiGLU(torch.nn.Module):
    """A SwiGLU feed-forward network, ``down_proj(silu(gate_proj(x)) * up_proj(x))``, with a fused activation.

    The parameters have the same names as in Hugging Face's ``LlamaMLP``, so state dicts are interchangeable.

    Args:
        hidden_size: features of the input and the output.
        intermediate_size: features of the gate and up projections.
        bias: whether the projections have a bias.
        device, dtype: of the parameters.
        casting_mode: as in :func:`torch_fused.functional.silu_mul`.

    Shapes: input ``(*, hidden_size)``, output the same; float32, float16 or bfloat16, or float64 on the CPU.

    Raises:
        RuntimeError: when called, as in :func:`torch_fused.functional.silu_mul`.

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


class GeGLU(SwiGLU):
    """A GeGLU feed-forward network, ``down_proj(gelu(gate_proj(x)) * up_proj(x))``, with a fused activation.

    The parameters have the same names as in Hugging Face's ``Gemma2MLP``, so state dicts are interchangeable.

    Args:
        hidden_size, intermediate_size, bias, device, dtype, casting_mode: as in :class:`SwiGLU`.
        approximate: as in :func:`torch_fused.functional.gelu_mul`; Gemma uses ``"tanh"``.

    Shapes: input ``(*, hidden_size)``, output the same; float32, float16 or bfloat16, or float64 on the CPU.

    Raises:
        RuntimeError: when called, as in :func:`torch_fused.functional.gelu_mul`.

    Example:
        >>> torch_fused.nn.GeGLU(8, 20, approximate="tanh")(torch.ones(3, 8)).shape
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
        approximate: str = "none",
        casting_mode: str = "torch",
    ) -> None:
        super().__init__(hidden_size, intermediate_size, bias, device, dtype, casting_mode=casting_mode)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        options = {"approximate": self.approximate, "casting_mode": self.casting_mode}
        return self.down_proj(functional.gelu_mul(self.gate_proj(x), self.up_proj(x), **options))
