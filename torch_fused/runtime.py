"""Which runtime each op uses."""

import torch

from .ops import decode, kv_cache  # noqa: F401  imported to register their ops
from .ops.library import COMPOSED

_RUNTIMES = {"cpu": "vectorised C++", "cuda": "Metal source translated to CUDA", "mps": "Metal"}


def status() -> dict[str, dict[str, str]]:
    """The runtime of every op on every device this torch can use: ``{op: {device: runtime}}``.

    Returns:
        For every op of ``torch.ops.torch_fused`` the devices there are, of ``"cpu"``, ``"cuda"`` and ``"mps"``, each
        with ``"vectorised C++"``, ``"Metal source translated to CUDA"``, ``"Metal"``; ``"none"`` where the op does not
        run; or ``"torch: "`` and the reason if it has fallen back to torch in this process, because its GPU kernels
        could not be built. An op that calls others has their runtime.

    Example:
        >>> torch_fused.status()["rms_norm"]["cpu"]
        'vectorised C++'
    """
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    fallbacks = dict(zip(*torch.ops.torch_fused._fallbacks(), strict=True))
    ops = sorted(name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if _is_op(name))
    return {op: {device: _runtime(op, device, fallbacks) for device in devices} for op in ops}


def _runtime(op: str, device: str, fallbacks: dict[str, str]) -> str:
    called = COMPOSED.get(op, (op,))
    if not all(torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_fused::{op}", device.upper()) for op in called):
        return "none"
    reasons = [fallbacks[op] for op in called if op in fallbacks]
    return f"torch: {reasons[0]}" if reasons and device != "cpu" else _RUNTIMES[device]


def _is_op(name: str) -> bool:
    return name.startswith("torch_fused::") and not name.startswith("torch_fused::_")
