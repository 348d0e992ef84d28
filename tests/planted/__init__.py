"""Bugs to plant in copies of the ops' kernels; test_planted_bugs.py plants them."""

from . import cross_entropy, decode, elementwise, norms, quantized, sampling

PARTS = (norms, elementwise, cross_entropy, quantized, sampling, decode)

BUGS = [bug for part in PARTS for bug in part.BUGS]
"""Each is caught when it runs, at its line."""

# (name, source, old, new, run)
ONLY_NUMBERS = [bug for part in PARTS for bug in part.ONLY_NUMBERS]
"""Every access is right in every schedule, so only the results tell."""
