"""Fused PyTorch ops for Apple GPUs, and for CUDA and the CPU from the same sources."""

import importlib
from pathlib import Path

import torch as torch  # first, because it loads the libraries that the extension is linked to

try:
    from . import _C  # type: ignore[attr-defined]  # noqa: F401  registers torch.ops.torch_fused
except ImportError as error:
    folder = Path(__file__).parent
    if not any(folder.glob("_C.*")):
        raise ImportError(
            f"torch_fused: the extension of the sources in {folder} is not built. Build it with `pip install "
            "--no-build-isolation .` or, to use an installed torch_fused, run Python in another folder."
        ) from None
    raise ImportError(
        f"torch_fused: the extension cannot be loaded with torch {torch.__version__} ({error}). It is compiled for one "
        "torch version; rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    ) from error

from . import functional, nn, optim, sampling
from .runtime import status

__version__ = "0.1.0"
__all__ = ["demo", "functional", "hf", "metal", "nn", "optim", "sampling", "status"]


def __getattr__(name: str):
    # Loaded on demand: hf needs transformers, demo the demo extra, metal a compiler.
    if name in ("demo", "hf", "metal"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
