"""Every op as a function of tensors, and code that the CUDA tests run in separate processes."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_fused.functional import (
    add_rms_norm,
    apply_rotary_pos_emb,
    gelu_mul,
    layer_norm,
    quantize,
    quantized_linear,
    rms_norm,
    silu_mul,
    softmax,
)
from torch_fused.ops.adamw import adamw_
from torch_fused.ops.kv_cache import kv_append_
from torch_fused.sampling import filter_logits, greedy, sample
from torch_fused.testing import make

COLS = 896
VOCABULARY = 9001
THREADS = 8


@dataclass(frozen=True)
class Case:
    """One op. `run` takes the result of `operands`, on any device, and returns all results, including in-place ones."""

    operands: Callable[[int], list[Tensor]]  # of a seed; on the CPU
    run: Callable[..., list[Tensor]]

    def __call__(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return self.run(*operands)


def tensors(*shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    return lambda seed: [make(*shape, seed=100 * seed + i) for i, shape in enumerate(shapes)]


def differentiated(op: Callable, inputs: int) -> Callable[..., list[Tensor]]:
    """The op's results and gradients; the first `inputs` operands are its inputs, the rest its results' gradients."""

    def run(*operands: Tensor) -> list[Tensor]:
        # New leaves for each call: their graph nodes belong to its stream.
        leaves = [operand.detach().requires_grad_() for operand in operands[:inputs]]
        results = op(*leaves)
        results = [results] if isinstance(results, Tensor) else list(results)
        return [*(r.detach() for r in results), *torch.autograd.grad(results, leaves, operands[inputs:])]

    return run


def rotated(cos: Tensor, sin: Tensor, *operands: Tensor) -> list[Tensor]:
    return differentiated(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), 2)(*operands)


ADAMW_SIZES = (5, 2049, 2112, 1, 3000, 49, 4096, 130, 64)


def adamw_operands(seed: int) -> list[Tensor]:
    made = tensors(*[(size,) for _ in range(4) for size in ADAMW_SIZES])(seed)
    return [*made[: -len(ADAMW_SIZES)], *(squares.abs() for squares in made[-len(ADAMW_SIZES) :])]


def adamw_step(*operands: Tensor) -> list[Tensor]:
    count = len(ADAMW_SIZES)
    params, grads, averages, squares = (list(operands[i * count : (i + 1) * count]) for i in range(4))
    adamw_(params, grads, averages, squares, [torch.tensor(float(i)) for i in range(count)], lr=0.02)
    return [*params, *averages, *squares]


def appended(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> list[Tensor]:
    kv_append_(keys, values, new_keys, new_values, 5)
    return [keys, values]


def logits_and(parameters: Callable[[int], list[Tensor]]) -> Callable[[int], list[Tensor]]:
    return lambda seed: [make(4, VOCABULARY, seed=seed, scale=3), *parameters(seed)]


def row_parameters(seed: int) -> list[Tensor]:
    """temperature, top_k, top_p and min_p of four rows."""
    return [
        torch.tensor([1.0, 0.7, 1.3, 0.0]) + seed % 3 * 0.1,
        torch.tensor([0.0, 50.0, 3000.0, 5.0]),
        torch.tensor([0.9, 1.0, 0.6, 0.95]),
        torch.tensor([0.0, 0.01, 0.0, 0.2]),
    ]


def random_state(seed: int) -> list[Tensor]:
    return [torch.tensor([seed + 2**40]), torch.tensor([7 * seed])]


def filtered(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> list[Tensor]:
    return [filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)]


def drawn(logits: Tensor, seed: Tensor, offset: Tensor) -> list[Tensor]:
    return list(sample(logits, temperature=0.8, top_k=50, top_p=0.9, seed=seed, offset=offset, return_valid=True))


def drawn_by_row(logits: Tensor, *more: Tensor) -> list[Tensor]:
    temperature, top_k, top_p, min_p, seed, offset = more
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return list(sample(logits, seed=seed, offset=offset, return_valid=True, **filters))


def packed_operands(seed: int) -> list[Tensor]:
    """x, a packed matrix, bias, and the gradient of the result."""
    x, weight, bias, grad = tensors((3, COLS), (67, COLS), (67,), (3, 67))(seed)
    return [x, *quantize(weight * 0.1), bias, grad]


def multiplied(x: Tensor, weight: Tensor, scales: Tensor, biases: Tensor, *operands: Tensor) -> list[Tensor]:
    def linear(x: Tensor, bias: Tensor) -> Tensor:
        return quantized_linear(x, weight, scales, biases, bias, bits=4, group_size=64)

    return differentiated(linear, 2)(x, *operands)


def head_operands(seed: int) -> list[Tensor]:
    """Hidden states, weight, bias and targets."""
    made = [
        make(*shape, dtype=torch.bfloat16, seed=100 * seed + i) for i, shape in enumerate(((9, 16), (150, 16), (150,)))
    ]
    return [*made, (torch.arange(9) * (seed + 17)) % 150]


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> list[Tensor]:
    """The loss and its gradients, in chunks of 32 classes."""
    options = (-100, 0.1, "mean", 0.01, True, True, True, 32)
    op = torch.ops.torch_fused._linear_cross_entropy_gradients
    return list(op(hidden, weight, target, bias, None, *options))


ROWS, WEIGHT = (5, COLS), (COLS,)
LONG = (3, 40001)  # few long rows, which several threadgroups share
HEADS = ((2, 5, 64), (2, 5, 64), (2, 6, 5, 64), (2, 2, 5, 64))  # cos, sin, q, k
CACHE = ((2, 4, 9, 64), (2, 4, 9, 64), (2, 4, 3, 64), (2, 4, 3, 64))

CASES: dict[str, Case] = {
    "rms_norm": Case(tensors(ROWS, WEIGHT, ROWS), differentiated(lambda x, w: rms_norm(x, WEIGHT, w), 2)),
    "add_rms_norm": Case(tensors(ROWS, ROWS, WEIGHT, ROWS, ROWS), differentiated(add_rms_norm, 3)),
    "layer_norm": Case(
        tensors(ROWS, WEIGHT, WEIGHT, ROWS), differentiated(lambda x, w, b: layer_norm(x, WEIGHT, w, b), 3)
    ),
    "softmax": Case(tensors(ROWS, ROWS), differentiated(softmax, 1)),
    "softmax_long": Case(tensors(LONG, LONG), differentiated(softmax, 1)),
    "silu_mul": Case(tensors(ROWS, ROWS, ROWS), differentiated(silu_mul, 2)),
    "gelu_mul": Case(tensors(ROWS, ROWS, ROWS), differentiated(gelu_mul, 2)),
    "gelu_mul_tanh": Case(tensors(ROWS, ROWS, ROWS), differentiated(partial(gelu_mul, approximate="tanh"), 2)),
    "apply_rotary_pos_emb": Case(tensors(*HEADS, *HEADS[2:]), rotated),
    "adamw_": Case(adamw_operands, adamw_step),
    "kv_append_": Case(tensors(*CACHE), appended),
    "quantized_linear": Case(packed_operands, multiplied),
    "linear_cross_entropy": Case(head_operands, head_loss),
    "greedy": Case(logits_and(lambda seed: []), lambda logits: [greedy(logits)]),
    "filter_logits": Case(logits_and(row_parameters), filtered),
    "sample": Case(logits_and(random_state), drawn),
    "sample_by_row": Case(logits_and(lambda seed: [*row_parameters(seed), *random_state(seed)]), drawn_by_row),
}


def operands_on(device: str, case: Case, seed: int) -> list[Tensor]:
    return [operand.to(device) for operand in case.operands(seed)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"{what}: result {i} differs"


def assert_close_to_the_cpus(actual: Sequence[Tensor], name: str, seed: int) -> None:
    """float32 except for the order of sums, bfloat16 except for a rounding; integers and filtered logits exactly."""
    expected = CASES[name](CASES[name].operands(seed))
    exact = name in ("greedy", "filter_logits", "sample", "sample_by_row", "kv_append_")
    tolerance = 0.0 if exact else 2e-2 if name == "linear_cross_entropy" else 1e-4
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a.cpu(), e, rtol=tolerance, atol=tolerance, msg=lambda text, i=i: f"{name}, result {i}: {text}"
        )


def start_torch() -> None:
    """Initialises what torch cannot create during a capture: backward threads, cuBLAS handles."""
    x = torch.ones(2, 2, device="cuda", requires_grad=True)
    (x @ x).sum().backward()


def assert_replays(name: str) -> None:
    """Captures the op, then replays it with other values in the captured tensors and checks the results."""
    start_torch()
    case = CASES[name]
    static = operands_on("cuda", case, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case(static)
    for seed in (1, 2):
        for operand, fresh in zip(static, case.operands(seed), strict=True):
            operand.copy_(fresh)
        graph.replay()
        assert_same(results, case(operands_on("cuda", case, seed)), f"{name}, replayed with values {seed}")


# ---- run in a process of their own, which has loaded no kernel yet --------------------------------------------------


def first_use_in_captures() -> None:
    """Every op uses its kernels for the first time inside a capture, also in the backward pass."""
    start_torch()
    assert torch.ops.torch_fused._cuda_kernels() == []
    for name in CASES:
        assert_replays(name)
    print("right")


def threads_on_streams(device: str = "cuda") -> None:
    """Eight threads, each on its own stream, start at once with different ops; no kernels are loaded yet."""
    operands = {name: case.operands(0) for name, case in CASES.items()}
    start = threading.Barrier(THREADS)

    def work(number: int) -> dict[str, list[Tensor]]:
        names = list(CASES)
        names = names[number % len(names) :] + names[: number % len(names)]
        results = {}
        start.wait()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                for name in names:
                    results[name] = CASES[name]([operand.to(device, copy=True) for operand in operands[name]])
        stream.synchronize()
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        runs = list(pool.map(work, range(THREADS)))
    for name, case in CASES.items():
        expected = case(operands_on(device, case, 0))
        assert_close_to_the_cpus(expected, name, 0)
        for number, results in enumerate(runs):
            assert_same(results[name], expected, f"{name} in thread {number}")
    print("right")


def one_of_several_processes(device: str = "cuda") -> None:
    """Waits for a line, then runs ops of four sources."""
    torch.ones(1, device=device)
    print("ready", flush=True)
    sys.stdin.readline()
    for name in ("rms_norm", "softmax", "greedy", "kv_append_"):
        assert_close_to_the_cpus(CASES[name](operands_on(device, CASES[name], 0)), name, 0)
    print("right")
