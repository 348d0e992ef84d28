"""Products with a frozen weight: on AMD's CPUs, oneDNN's in float32, which are faster there than MKL's."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_faster_onednn() -> bool:
    """Whether torch multiplies float32 with MKL, on a CPU that is not MKL's vendor's."""
    cpu = Path("/proc/cpuinfo")
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and cpu.exists() and "AMD" in cpu.read_text()


ONEDNN = _has_faster_onednn()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``(rows, features)`` and a weight in any layout; differentiable, and then by torch's product."""
    served = x.dtype == torch.float32 and x.is_cpu and weight.numel() > 0
    if not ONEDNN or not served or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
