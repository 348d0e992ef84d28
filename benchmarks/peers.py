"""Kernels of other libraries for the same ops, where they are installed: they need a CUDA device."""

from collections.abc import Callable
from typing import Any

import torch

Peers = dict[str, dict[str, Callable[..., Any]]]


def _liger() -> Peers:
    from liger_kernel.transformers import functional as liger

    return {
        "rms_norm": {"Liger-Kernel": lambda x, w: liger.liger_rms_norm(x, w, 1e-6, 0.0, "llama", False)},
        "layer_norm": {"Liger-Kernel": lambda x, w, b: liger.liger_layer_norm(x, w, b, 1e-5)},
        "softmax": {"Liger-Kernel": liger.liger_softmax},
        "silu_mul": {"Liger-Kernel": liger.liger_swiglu},
        "gelu_mul": {"Liger-Kernel": liger.liger_geglu},
        "apply_rotary_pos_emb": {"Liger-Kernel": liger.liger_rope},
    }


def _quack() -> Peers:
    from quack import rmsnorm, softmax

    return {"rms_norm": {"quack": lambda x, w: rmsnorm(x, w, eps=1e-6)}, "softmax": {"quack": softmax}}


def _flashinfer() -> Peers:
    import flashinfer

    def top_p(x: torch.Tensor, p: float) -> torch.Tensor:
        return flashinfer.sampling.top_p_sampling_from_probs(x.softmax(-1), p)

    return {
        "rms_norm": {"flashinfer": lambda x, w: flashinfer.rmsnorm(x, w, 1e-6)},
        "top-k 50": {"flashinfer": lambda x: flashinfer.sampling.top_k_sampling_from_probs(x.softmax(-1), 50)},
        "top-k 50, top-p 0.9": {
            "flashinfer": lambda x: flashinfer.sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9)
        },
        "top-p 0.9": {"flashinfer": lambda x: top_p(x, 0.9)},
        "top-p 0.95": {"flashinfer": lambda x: top_p(x, 0.95)},
    }


LIBRARIES = {"Liger-Kernel": _liger, "quack": _quack, "flashinfer": _flashinfer}


def _load() -> tuple[Peers, list[str]]:
    found: Peers = {}
    absent = []
    for name, load in LIBRARIES.items():
        try:
            if not torch.cuda.is_available():
                raise ImportError("no CUDA device")
            library = load()
        except (ImportError, AttributeError, RuntimeError):
            absent.append(name)
            continue
        for op, contenders in library.items():
            found.setdefault(op, {}).update(contenders)
    return found, absent


PEERS, ABSENT = _load()
"""Contenders by op, and the libraries that are not here."""


def peers(op: str) -> dict[str, Callable[..., Any]]:
    return PEERS.get(op, {})
