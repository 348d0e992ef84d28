"""Which runtime each op uses."""

import torch

_RUNTIMES = {"cpu": "vectorised C++", "cuda": "Metal source translated to CUDA", "mps": "Metal"}


def status() -> dict[str, dict[str, str]]:
    """The runtime of every op on every device this torch can use: ``{op: {device: runtime}}``.

    An op that has fallen back to torch in this process, because its GPU kernels could not be built, says so and why.

    Returns:
        For every op of ``torch.ops.torch_fused`` the devices there are, of ``"cpu"``, ``"cuda"`` and ``"mps"``, each
        with ``"vectorised C++"``, ``"Metal source translated to CUDA"``, ``"Metal"``, or ``"torch"`` where it has no
        kernel of its own.

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
    table = {}
    for op in ops:
        table[op] = {device: _runtime(op, device) for device in devices}
        for device in devices[1:]:
            if op in fallbacks:
                table[op][device] = f"torch: {fallbacks[op]}"
    return table


def _runtime(op: str, device: str) -> str:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_fused::{op}", device.upper())
    return _RUNTIMES[device] if has_kernel else "torch"


def _is_op(name: str) -> bool:
    return name.startswith("torch_fused::") and not name.startswith("torch_fused::_")
