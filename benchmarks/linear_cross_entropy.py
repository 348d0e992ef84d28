"""The loss of a head and its gradients, time and memory: python benchmarks/linear_cross_entropy.py [--device ...]

Contenders are interleaved, each in a process of its own. The memory is what a call and its backward pass
take beyond what was there before, at most: on the CPU the pages that the process has touched, on a GPU what torch has
allocated. The weight's gradient, which all of them return, is in it, and named in a column of its own.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_megabytes
from record import Results
from timing import Timing, arguments

from torch_fused.devices import synchronize
from torch_fused.functional import linear_cross_entropy
from torch_fused.testing import NAMES

KEYS = ("op", "shape", "dtype", "kind", "contender")
VALUES = ("ms", "spread", "peak_mb", "weight_grad_mb")
CLASSES = 151936


def in_torch(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def as_transformers(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def chunked(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Torch's own, since 2.13, with chunks as it chooses them."""
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def chunks_of_128(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """With chunks of as many rows as ours have here."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def liger(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import functional

    return functional.liger_fused_linear_cross_entropy(hidden, weight, target)


def contenders(dtype: torch.dtype, device: str) -> dict[str, Callable[..., torch.Tensor]]:
    found: dict[str, Callable[..., torch.Tensor]] = {"torch_fused": linear_cross_entropy, "torch": in_torch}
    if dtype != torch.float32:
        found["transformers"] = as_transformers
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy, 128 rows"] = chunks_of_128
        if device != "cpu":  # there its own choice is two rows, which take minutes
            found["F.linear_cross_entropy, chunked"] = chunked
    if device.startswith("cuda"):
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            return found
        found["Liger-Kernel"] = liger
    return found


def serve(pipe: Any, name: str, shape: tuple[int, int], dtype: torch.dtype, device: str, threads: int) -> None:
    """A contender's process: a step whenever it is asked, and how long and how much it took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokens, features = shape
    hidden = torch.randn(tokens, features, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(CLASSES, features, device=device) * 0.02).to(dtype).requires_grad_()
    target = torch.randint(CLASSES, (tokens,), device=device)
    call = contenders(dtype, device)[name]

    def step() -> None:
        call(hidden, weight, target).backward()

    while pipe.recv():
        hidden.grad = weight.grad = None
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - begin
        hidden.grad = weight.grad = None
        peak = peak_megabytes(step, device)
        assert weight.grad is not None
        pipe.send((seconds, peak, weight.grad.nbytes / 1e6))


def measure(
    shape: tuple[int, int], dtype: torch.dtype, names: list[str], device: str, threads: int, rounds: int
) -> dict[str, list[tuple[float, float, float]]]:
    """(seconds, MB, MB of the weight's gradient) of each round of each contender, interleaved."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in names:
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, name, shape, dtype, device, threads)))
        processes[-1].start()
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            samples[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    return {name: found[1:] for name, found in samples.items()}  # the first warms up


def cases(device: str, full: bool) -> list[tuple[tuple[int, int], torch.dtype]]:
    shapes = [(512, 576)] if device == "cpu" and not full else [(512, 576), (512, 896), (2048, 896), (8192, 896)]
    if device == "cpu":
        shapes = shapes[:2]
    return [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]


def columns(samples: list[tuple[float, float, float]]) -> dict[str, float]:
    timing = Timing([seconds for seconds, _, _ in samples])
    peak = statistics.median(peak for _, peak, _ in samples)
    return {
        "ms": timing.seconds * 1e3,
        "spread": timing.spread,
        "peak_mb": peak,
        "weight_grad_mb": samples[0][2],
    }


def main() -> None:
    args = arguments(__doc__, ("--rounds", {"type": int, "default": 5, "help": "samples of each contender"}))
    results = Results("linear_cross_entropy", KEYS, VALUES, args.results, args.device, args.again)
    for shape, dtype in cases(args.device, args.full):
        names = list(contenders(dtype, args.device))
        shared = {"op": "linear_cross_entropy", "shape": str((*shape, CLASSES)), "dtype": NAMES[dtype], "kind": ""}

        def measured(shape=shape, dtype=dtype, names=names) -> dict[str, dict[str, float]]:
            found = measure(shape, dtype, names, args.device, args.threads, args.rounds)
            return {name: columns(samples) for name, samples in found.items()}

        print(f"linear_cross_entropy {shared['shape']} {shared['dtype']}", flush=True)
        for name, row in results.rows({name: shared | {"contender": name} for name in names}, measured).items():
            beside = float(row["peak_mb"]) - float(row["weight_grad_mb"])
            print(
                f"  {name:32s} {float(row['ms']):9.1f} ms +-{float(row['spread']) * 100:3.0f} %  {beside:8.0f} MB "
                f"beside {float(row['weight_grad_mb']):.0f} MB of the weight's gradient",
                flush=True,
            )


if __name__ == "__main__":
    main()
