"""Mistakes to plant in copies of the ops' kernels; test_planted_bugs.py plants them."""

from . import elementwise, norms, sampling

BUGS = [*norms.BUGS, *elementwise.BUGS, *sampling.BUGS]
"""Each is caught when it runs, at its line."""

# (name, source, old, new, run)
ONLY_NUMBERS = [*norms.ONLY_NUMBERS, *elementwise.ONLY_NUMBERS, *sampling.ONLY_NUMBERS]
"""Every access is right in every schedule, so only the results tell."""
