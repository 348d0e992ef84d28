"""Fused ops with the signatures of `torch.nn.functional`; extra arguments are keyword-only."""

from .ops.layer_norm import layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.quantized import dequantize, quantize, quantized_linear
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import apply_rotary_pos_emb
from .ops.softmax import softmax
from .ops.swiglu import gelu_mul, silu_mul

__all__ = [
    "add_rms_norm",
    "apply_rotary_pos_emb",
    "dequantize",
    "gelu_mul",
    "layer_norm",
    "linear_cross_entropy",
    "quantize",
    "quantized_linear",
    "rms_norm",
    "silu_mul",
    "softmax",
]
