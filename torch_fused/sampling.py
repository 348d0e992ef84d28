"""The next token from logits: greedy choice, random draws, and the filters between."""

from .ops.sampling import filter_logits, greedy, sample

__all__ = ["filter_logits", "greedy", "sample"]
