"""Fused ops with the signatures of `torch.nn.functional`; extra arguments are keyword-only."""

from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.softmax import softmax

__all__ = ["add_rms_norm", "rms_norm", "softmax"]
