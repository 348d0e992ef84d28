"""What compute-sanitizer sees on a GPU: tools/gpu_kernels.py, here in the emulator, and tools/gpu_generate.py."""

import sys
from pathlib import Path

import pytest
import torch

from torch_fused.metal import emulate
from torch_fused.testing import make, relative_error

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


def test_small_models_generate_with_every_step_as_one_op():
    """In float32 the tokens are transformers'."""
    pytest.importorskip("transformers")
    import gpu_generate

    for request in gpu_generate.REQUESTS:
        gpu_generate.generate(request, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_without_cublas_are_products(dtype):
    """Of one and several matrices, with and without what is added."""
    pytest.importorskip("transformers")
    import gpu_generate

    for batch in ((), (3,)):
        x, a, b = (make(*batch, *shape, dtype=dtype, seed=i) for i, shape in enumerate(((70, 17), (70, 33), (33, 17))))
        exact = a.double() @ b.double()
        assert relative_error(gpu_generate.product(a, b), exact) < 1e-6
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3
        for beta in (0, 0.5):
            found = gpu_generate.product_and_sum(x, a, b, beta=beta, alpha=2)
            assert relative_error(found, beta * x.double() + 2 * exact) < tolerance
