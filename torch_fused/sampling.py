"""Choosing the next token from logits: greedy decoding, sampling and filtering."""

from .ops.sampling import filter_logits, greedy, sample

__all__ = ["filter_logits", "greedy", "sample"]
