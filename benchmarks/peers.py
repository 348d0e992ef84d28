"""Other libraries' kernels for the same ops, and other programs that generate with the demo's weights."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from torch_fused import demo
from torch_fused.cache import kept

Run = Callable[[torch.Tensor, int], object]  # given ids (batch, tokens) and a number of new ones, generates them


def has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@cache
def liger_kernels() -> dict[str, Callable[..., Any]]:
    """Liger-Kernel's, which need a CUDA device, by op."""
    if not torch.cuda.is_available() or not has("liger_kernel"):
        return {}
    from liger_kernel.transformers import functional as liger

    return {
        "rms_norm": lambda x, w: liger.liger_rms_norm(x, w, 1e-6, 0.0, "llama", False),
        "layer_norm": lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5),
        "softmax": liger.liger_softmax,
        "silu_mul": liger.liger_swiglu,
        "gelu_mul": liger.liger_geglu,
        "apply_rotary_pos_emb": liger.liger_rope,
        "linear_cross_entropy": liger.liger_fused_linear_cross_entropy,
    }


def kernels(op: str, columns: int = 0) -> dict[str, Callable[..., Any]]:
    """Those for rows of so many columns: Liger-Kernel's rows have at most 65,536, but for cross entropy."""
    return {"Liger-Kernel": liger_kernels()[op]} if op in liger_kernels() and columns <= 65536 else {}


def patched_by_liger(model: Any) -> None:
    """A Qwen2 with Liger-Kernel's patch, which changes transformers' module too: here only while this model runs."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    module = sys.modules[type(model).__module__]
    with mock.patch.dict(vars(module)):
        apply_liger_kernel_to_qwen2(model=model)
        rope = mock.patch.object(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)
    model.forward = rope(model.forward)


def llama_file(weights: str) -> Path:
    """The demo's file for 4 bits, else a file that llama.cpp converts from it once."""
    import llama_cpp

    def convert(folder: Path) -> None:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
        if llama_cpp.llama_model_quantize(bytes(demo._demo_file()), bytes(folder / "model.gguf"), options):
            raise RuntimeError(f"llama.cpp cannot convert {demo._demo_file()} to {kind}")

    if weights == "4 bits":
        return demo._demo_file()
    kind = {"bf16": "BF16", "8 bits": "Q8_0"}[weights]
    return kept("models", f"SmolLM2-135M-Instruct-MOSTLY_{kind}", convert) / "model.gguf"


def llama_cpp(weights: str, room: int, sampled: bool) -> Run:
    """llama-cpp-python on the CPU, one sequence at a time."""
    from llama_cpp import Llama

    file, threads = str(llama_file(weights)), torch.get_num_threads()
    model = Llama(file, n_ctx=room, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False)
    options: dict[str, Any] = {"top_k": 50, "top_p": 0.9, "temp": 1.0} if sampled else {"temp": 0.0}
    generate = partial(model.generate, min_p=0.0, repeat_penalty=1.0, **options)
    return lambda ids, count: (model.reset(), list(islice(generate(ids[0].tolist()), count)))


def mlx_lm(weights: str, room: int, sampled: bool) -> Run:
    """mlx-lm on MLX's default device: a Mac's GPU, on Linux the CPU."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step
    from mlx_lm.sample_utils import make_sampler

    model, _ = load(str(demo.demo_model_folder()))
    model.set_dtype(mx.bfloat16)
    sampler = make_sampler(temp=1.0, top_p=0.9, top_k=50) if sampled else make_sampler(temp=0.0)
    return lambda ids, count: list(generate_step(mx.array(ids[0].tolist()), model, max_tokens=count, sampler=sampler))


def programs(device: str, bits: int, prompt: int) -> dict[str, Callable[[str, int, bool], Run]]:
    """The programs that are installed and run weights of `bits` bits (0: dense) on `device`."""
    of_mlx = {"darwin": "mps", "linux": "cpu"}.get(sys.platform)
    short = device == "mps" or prompt <= 128  # on the CPU mlx-lm takes minutes for a longer one
    llama = {"llama-cpp-python": llama_cpp} if device == "cpu" and has("llama_cpp") else {}
    return llama | ({"mlx-lm": mlx_lm} if not bits and device == of_mlx and short and has("mlx_lm") else {})
