"""compute-sanitizer sees every kernel on a GPU: tools/gpu_kernels.py, here in the emulator."""

import sys
from pathlib import Path

from torch_fused.metal import emulate

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import gpu_kernels


def test_every_kernel_is_launched_and_right():
    """Each dtype and number of packs of every Metal source, on the shapes of the self-check."""
    with emulate(checked=False) as run:
        gpu_kernels.run("cpu")
    launched = {launch.kernel for launch in run.launches}
    assert gpu_kernels.never_launched(launched) == []
    assert launched <= gpu_kernels.built_in()


def test_a_kernel_left_out_is_named():
    """The tool's exit status depends on this list."""
    kernels = gpu_kernels.built_in()
    assert {"rms_norm_f32_1", "adamw_bf16_f32", "greedy_rows"} <= kernels
    assert gpu_kernels.never_launched(kernels - {"greedy_rows"}) == ["greedy_rows"]
