"""Runs every GPU kernel on small, awkward shapes, for compute-sanitizer; checks results, and that none is missing."""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
import torch

from torch_fused.metal.parser import parse
from torch_fused.selfcheck import CHECKS


def built_in() -> set[str]:
    """The names of all kernels of all Metal sources, including template instantiations."""
    names, texts = torch.ops.torch_fused._metal_sources()
    return {kernel.name for name, text in zip(names, texts, strict=True) for kernel in parse(text, name).kernels}


def run(device: str) -> None:
    """Raises AssertionError if a result is wrong."""
    for check in CHECKS.values():
        check(device)


def never_launched(launched: Iterable[str]) -> list[str]:
    return sorted(built_in() - set(launched))


def main() -> int:
    run("cuda")
    torch.cuda.synchronize()
    missed = never_launched(torch.ops.torch_fused._cuda_kernels())
    if missed:
        print(f"gpu_kernels: never launched: {', '.join(missed)}")
        return 1
    print(f"gpu_kernels: {len(built_in())} kernels right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
