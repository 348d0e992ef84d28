"""Fused ops with the signatures of `torch.nn.functional`; extra arguments are keyword-only."""

from .ops.layer_norm import layer_norm
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.softmax import softmax

__all__ = ["add_rms_norm", "layer_norm", "rms_norm", "softmax"]
