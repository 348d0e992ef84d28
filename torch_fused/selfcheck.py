"""Runs every op on a device, with small and awkward shapes that reach every kernel, and compares with float64.

Used by the doctor, and for GPU memory and race checkers.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .functional import add_rms_norm, apply_rotary_pos_emb, dequantize, gelu_mul, quantize, silu_mul
from .ops.adamw import adamw_, adamw_reference
from .ops.cross_entropy import cross_entropy_, gradient_reference, losses_reference
from .ops.decode import decode_, decode_reference
from .ops.decoder import LAYER_PARTS, Adapter, DecoderParts, Packed, decoder_arguments, make_decoder
from .ops.kv_cache import kv_append_, kv_append_reference
from .ops.layer_norm import layer_norm_backward_reference, layer_norm_reference
from .ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .ops.quantized import dequantize_reference, quantized_linear_reference
from .ops.rms_norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference
from .ops.rope import apply_rotary_pos_emb_backward_reference, apply_rotary_pos_emb_reference
from .ops.sampling import filter_logits_reference, greedy_reference, sample_reference
from .ops.softmax import softmax_backward_reference, softmax_reference
from .ops.sum_of_squares import sum_of_squares, sum_of_squares_reference
from .ops.swiglu import (
    gelu_mul_backward_reference,
    gelu_mul_reference,
    silu_mul_backward_reference,
    silu_mul_reference,
)
from .sampling import filter_logits, greedy, sample
from .testing import make, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
INT8_TOLERANCE = 1.6e-2
"""For products on a CPU with vectors rounded to int8, at these sizes."""


def compare(what: str, actual: Iterable[Tensor], exact: Iterable[Tensor]) -> None:
    """Raises AssertionError naming `what` if any tensor differs from float64 by more than its dtype allows."""
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        error = relative_error(a, e)
        assert error < TOLERANCE[a.dtype], f"{what}, {a.dtype}, result {i}: relative error {error:.3g}"


def longest_row(dtype: torch.dtype) -> int:
    """Slightly more columns than fit in registers of a row kernel's largest threadgroup: 4 packs of 512 threads."""
    return 8200 if dtype == torch.float32 else 16400


def row_operands(device: str):
    """(dtype, cols, tensors on the device, the same in float64): rows for every kernel, aligned and misaligned."""
    # One, two and four packs per thread, and rows too long for registers; odd lengths; rows misaligned by a view.
    for dtype in DTYPES:
        for cols in (5, 896, 3001, 6000, 9000, longest_row(dtype)):
            for start in (0, 3):
                x, residual = (make(3, cols + start, dtype=dtype, seed=s)[:, start:] for s in range(2))
                tensors = (x, residual, make(cols, dtype=dtype, seed=2))
                # A view of whole rows on the device, so that it is misaligned there too.
                moved = [make(3, cols + start, dtype=dtype, seed=s).to(device)[:, start:] for s in range(2)]
                yield dtype, cols, [*moved, tensors[2].to(device)], [t.double() for t in tensors]


def check_rms_norm(device: str) -> None:
    for _, cols, (x, _, weight), (x64, _, weight64) in row_operands(device):
        actual = torch.ops.torch_fused.rms_norm(x, (cols,), weight, 1e-6)
        compare(f"rms_norm of {cols} columns", [actual], [rms_norm_reference(x64, (cols,), weight64, 1e-6)])


def check_add_rms_norm(device: str) -> None:
    for _, cols, (x, residual, weight), wide in row_operands(device):
        compare(f"add_rms_norm of {cols} columns", add_rms_norm(x, residual, weight), add_rms_norm_reference(*wide))


def check_rms_norm_backward(device: str) -> None:
    for _, cols, (x, grad, weight), (x64, grad64, weight64) in row_operands(device):
        rest = ((cols,), weight, 1e-6, "torch", 0.0, True)
        actual = torch.ops.torch_fused.rms_norm_backward(grad, x, x, *rest)
        exact = rms_norm_backward_reference(grad64, x64, x64, rest[0], weight64, *rest[2:])
        compare(f"rms_norm_backward of {cols} columns", actual, exact)


def check_layer_norm(device: str) -> None:
    for _, cols, (x, residual, weight), (x64, residual64, weight64) in row_operands(device):
        bias, bias64 = residual[0], residual64[0]
        actual = torch.ops.torch_fused.layer_norm(x, (cols,), weight, bias)
        compare(f"layer_norm of {cols} columns", [actual], [layer_norm_reference(x64, (cols,), weight64, bias64)])


def check_layer_norm_backward(device: str) -> None:
    for _, cols, (x, grad, weight), (x64, grad64, weight64) in row_operands(device):
        actual = torch.ops.torch_fused.layer_norm_backward(grad, x, (cols,), weight, 1e-5, True, True)
        exact = layer_norm_backward_reference(grad64, x64, (cols,), weight64, 1e-5, True, True)
        compare(f"layer_norm_backward of {cols} columns", actual, exact)


def softmax_operands(device: str):
    """(what, x and its gradient on the device, the same in float64): many long rows, and few, which are split."""
    for dtype in DTYPES:
        for rows, cols in ((3, 5), (3, 3001), (3, 6000), (3, 9000), (130, longest_row(dtype)), (3, 17001)):
            for start in (0, 3):
                tensors = [make(rows, cols + start, dtype=dtype, seed=s) for s in range(2)]
                moved = [t.to(device)[:, start:] for t in tensors]
                yield f"of ({rows}, {cols})", moved, [t[:, start:].double() for t in tensors]


def check_softmax(device: str) -> None:
    for what, (x, _), (x64, _) in softmax_operands(device):
        compare(f"softmax {what}", [torch.ops.torch_fused.softmax(x)], [softmax_reference(x64)])


def check_softmax_backward(device: str) -> None:
    for what, (x, grad), (x64, grad64) in softmax_operands(device):
        y = softmax_reference(x64).to(x.dtype)
        exact = softmax_backward_reference(grad64, y.double())
        compare(f"softmax_backward {what}", [torch.ops.torch_fused.softmax_backward(grad, y.to(device))], [exact])


def check_cross_entropy(device: str) -> None:
    """Losses, and gradients with one scale and with one per row; one row is ignored."""
    for _, cols, (x, _, _), (x64, _, _) in row_operands(device):
        target = torch.tensor([cols - 1, -100, cols // 2])
        options: Any
        for scale, options in ((torch.tensor([1.0, 2.0, 3.0]), {}), (torch.tensor(0.5), {"label_smoothing": 0.1})):
            found = x.clone()
            losses = cross_entropy_(found, target.to(device), scale.to(device), z_loss=0.01, **options)
            exact = losses_reference(x64, target, z_loss=0.01, **options)
            gradient = gradient_reference(x64, target, scale.double().expand(3), z_loss=0.01, **options)
            compare(f"cross_entropy_ of {cols} classes", [losses, found], [exact, gradient])


def check_linear_cross_entropy(device: str) -> None:
    """The loss and the gradients of a third of it, of one chunk of classes; one row is ignored."""
    for dtype in DTYPES:
        for classes in (100, 2050):
            tensors = [make(n, 16, dtype=dtype, seed=n, scale=0.5) for n in (20, classes)]
            target = torch.arange(20) * 5
            target[3] = -100
            for reduction in ("mean", "none"):
                options: Any = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
                exact = differentiated(linear_cross_entropy_reference, [t.double() for t in tensors], target, options)
                moved = [t.to(device) for t in tensors]
                actual = differentiated(linear_cross_entropy, moved, target.to(device), options)
                for a, e in zip(actual, exact, strict=True):
                    error = relative_error(a, e)
                    assert error < TOLERANCE[dtype], f"linear_cross_entropy, {dtype}: relative error {error:.3g}"


def differentiated(op: Callable, tensors: Iterable[Tensor], target: Tensor, options: Any) -> list[Tensor]:
    """The result and the gradients of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    loss = op(*leaves, target, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum() / 3, leaves)]


def check_silu_mul(device: str) -> None:
    for _, cols, (gate, up, _), (gate64, up64, _) in row_operands(device):
        compare(f"silu_mul of {cols} columns", [silu_mul(gate, up)], [silu_mul_reference(gate64, up64)])


def check_silu_mul_backward(device: str) -> None:
    for _, cols, (gate, up, _), (gate64, up64, _) in row_operands(device):
        actual = torch.ops.torch_fused.silu_mul_backward(up, gate, up)
        compare(f"silu_mul_backward of {cols} columns", actual, silu_mul_backward_reference(up64, gate64, up64))


def check_gelu_mul(device: str) -> None:
    for approximate in ("none", "tanh"):
        for _, cols, (gate, up, _), (gate64, up64, _) in row_operands(device):
            what, options = f"gelu_mul of {cols} columns, {approximate}", {"approximate": approximate}
            compare(what, [gelu_mul(gate, up, **options)], [gelu_mul_reference(gate64, up64, **options)])


def check_gelu_mul_backward(device: str) -> None:
    for approximate in ("none", "tanh"):
        for _, cols, (gate, up, _), (gate64, up64, _) in row_operands(device):
            what, options = f"gelu_mul_backward of {cols} columns, {approximate}", {"approximate": approximate}
            actual = torch.ops.torch_fused.gelu_mul_backward(up, gate, up, **options)
            compare(what, actual, gelu_mul_backward_reference(up64, gate64, up64, **options))


def rotary_operands(device: str):
    """(what, q, k, cos and sin on the device, the same in float64): full and partial rotations, odd halves."""
    for dtype in DTYPES:
        for head_dim, rotary_dim in ((64, 64), (80, 32), (13, 6)):
            q, k = (make(2, 5, heads, head_dim, dtype=dtype, seed=heads) for heads in (6, 2))
            tables = [make(2, 5, rotary_dim, dtype=dtype, seed=s) for s in range(2)]
            tensors = [q.transpose(1, 2), k.transpose(1, 2), *tables]
            yield f"of {rotary_dim} in {head_dim}", [t.to(device) for t in tensors], [t.double() for t in tensors]


def check_rotary(device: str) -> None:
    for what, tensors, wide in rotary_operands(device):
        exact = apply_rotary_pos_emb_reference(*wide)
        compare(f"apply_rotary_pos_emb {what}", apply_rotary_pos_emb(*tensors), exact)


def check_rotary_backward(device: str) -> None:
    for what, tensors, (grad_q, grad_k, cos, sin) in rotary_operands(device):
        actual = torch.ops.torch_fused.apply_rotary_pos_emb_backward(*tensors, 1)
        exact = apply_rotary_pos_emb_backward_reference(grad_q, grad_k, cos, sin, 1)
        compare(f"apply_rotary_pos_emb_backward {what}", actual, exact)


def adamw_operands(device: str, dtype: torch.dtype, state_dtype: torch.dtype, start: int) -> list[list[Tensor]]:
    """Parameters, gradients and states of more tensors than fit in a launch, as views with offset `start`."""
    sizes = (5, 2049, 2112, 1, 0, 3000, 49, 4096, 130, 64)
    dtypes = (dtype, dtype, state_dtype, state_dtype)
    wholes = [[make(n + start, dtype=d, seed=9 * i + j) for j, n in enumerate(sizes)] for i, d in enumerate(dtypes)]
    wholes[3] = [squares.abs() for squares in wholes[3]]
    return [[whole.to(device)[start:] for whole in tensors] for tensors in wholes]


def check_adamw(device: str) -> None:
    for dtype in DTYPES:
        for state_dtype in {dtype, torch.float32}:
            for start in (0, 3):
                what = f"states in {state_dtype}"
                actual = adamw_operands(device, dtype, state_dtype, start)
                steps = [torch.tensor(float(i)) for i in range(len(actual[0]))]
                compare_adamw(what, actual, steps, steps, lr=0.02)
            largest = [squares.flip(0).clone() for squares in actual[3]]
            on_device = {name: torch.tensor(value, device=device) for name, value in ADAMW_NUMBERS.items()}
            options = {"capturable": True, "max_grad_norm": 3.0, "beta2": 0.95}
            compare_adamw(
                f"amsgrad, numbers on the device, {what}",
                [*actual, largest],
                [step.to(device) for step in steps],
                steps,
                **options,
                **on_device,
            )


ADAMW_NUMBERS = {"lr": 0.02, "beta1": 0.875, "grad_scale": 4.0, "found_inf": 0.0, "grad_squares": 400.0}


def compare_adamw(
    what: str, actual: list[list[Tensor]], steps: list[Tensor], counts: list[Tensor], **options: Any
) -> None:
    """A step with (parameters, gradients, averages, squares, and optionally maxima), against float64."""
    exact = [[tensor.cpu().double() for tensor in tensors] for tensors in actual]
    for lists, step, of_step, settings in (
        (exact, adamw_reference, [count.clone() for count in counts], in_reference(options)),
        (actual, adamw_, steps, options),
    ):
        maxima = lists[4] if len(lists) > 4 else []
        step(lists[0], lists[1], lists[2], lists[3], of_step, maxima, **settings)
    for name, i in (("parameter", 0), ("exp_avg", 2), ("exp_avg_sq", 3), ("max_exp_avg_sq", 4)):
        if i < len(actual):
            compare(f"adamw_, {name}, {what}", actual[i], exact[i])


def in_reference(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of adamw_ for the reference, in float64."""
    moved = {name: value.cpu().double() if isinstance(value, Tensor) else value for name, value in options.items()}
    numbers = {name for name in ("lr", "beta1", "beta2") if isinstance(moved.get(name), Tensor)}
    return {f"{name}_tensor" if name in numbers else name: value for name, value in moved.items()}


def check_sum_of_squares(device: str) -> None:
    for dtype in DTYPES:
        for start in (0, 3):
            wholes = [make(n + start, dtype=dtype, seed=i).to(device) for i, n in enumerate((5, 0, 40000, 1) * 8)]
            tensors = [whole[start:] for whole in wholes]
            exact = sum_of_squares_reference([tensor.cpu().double() for tensor in tensors])
            actual = sum_of_squares(tensors).cpu()
            assert relative_error(actual, exact) < 1e-5, f"sum_of_squares of {dtype}"


def logits(device: str):
    """(what, logits on the device, the same on the CPU): one or more slices and a tail; equal, rounded, NaN rows."""
    for dtype in DTYPES:
        for vocabulary in (5, 2048, 9001):
            x = make(4, vocabulary, dtype=dtype)
            x[1], x[2], x[3] = 0, x[2].round(), torch.nan
            yield f"of {vocabulary} logits, {dtype}", x.to(device), x


def same(what: str, actual: Tensor, exact: Tensor) -> None:
    assert torch.equal(actual.cpu(), exact), f"{what}: differs from the reference"


def packed_operands(device: str):
    """(what, x and a packed matrix on the device, the same on the CPU, options): aligned or not, 1 or 5 vectors."""
    shapes = (
        (9, 96, 4, 32),
        (9, 2112, 4, 64),
        (9, 1120, 8, 32),
        (9, 896, 8, 128),
        (8200, 96, 4, 32),
        (8200, 192, 4, 64),
    )
    for dtype in DTYPES:
        for rows, cols, bits, group_size in shapes:
            packed = quantize(make(rows, cols, dtype=dtype, scale=0.2), bits=bits, group_size=group_size)
            for vectors, start in ((1, 0), (1, 3), (5, 0)):
                x = make(vectors, cols + start, dtype=dtype, seed=1)
                moved = [x.to(device)[:, start:], *(t.to(device) for t in packed)]
                what = f"of {vectors} vectors and {rows} rows of {cols}, {bits} bits in groups of {group_size}"
                yield what, moved, (x[:, start:], *packed), {"bits": bits, "group_size": group_size}


def check_dequantize(device: str) -> None:
    for what, (_, *packed), (_, *exact), options in packed_operands(device):
        for dtype in DTYPES:
            actual = dequantize(*packed, **options, dtype=dtype)
            same(f"dequantize {what}, {dtype}", actual, dequantize_reference(*exact, **options, dtype=dtype))


def check_quantized_linear(device: str) -> None:
    for what, (x, *packed), (x_cpu, weight, scales, biases), options in packed_operands(device):
        bias = make(len(weight), dtype=x.dtype, seed=2)
        wide = x_cpu.double(), weight, scales.double(), biases.double(), bias.double()
        actual = torch.ops.torch_fused.quantized_linear(x, *packed, bias.to(device), **options)
        compare(f"quantized_linear {what}", [actual], [quantized_linear_reference(*wide, **options)])


def check_greedy(device: str) -> None:
    for what, x, x_cpu in logits(device):
        same(f"greedy {what}", greedy(x), greedy_reference(x_cpu))


FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01})


def check_filter_logits(device: str) -> None:
    for what, x, x_cpu in logits(device):
        for filters in FILTERS:
            same(f"filter_logits {what}", filter_logits(x, **filters), filter_logits_reference(x_cpu, **filters))


def check_sample(device: str) -> None:
    for what, x, x_cpu in logits(device):
        for filters in FILTERS:
            actual = sample(x, seed=1, return_valid=True, **filters)
            for a, e in zip(actual, sample_reference(x_cpu, seed=1, **filters), strict=True):
                same(f"sample {what}", a, e)


def check_kv_append(device: str) -> None:
    # Rows of whole packs, and of elements of 1 to 8 bytes, into the middle of a buffer; states with the heads after
    # the tokens.
    for dtype in (*DTYPES, torch.float64, torch.int8):
        for head_dim in (5, 64):
            fresh = [make(2, 3, 4, head_dim, dtype=dtype, seed=s, scale=9).transpose(1, 2) for s in range(2)]
            exact = [make(2, 4, 9, head_dim, dtype=dtype, seed=s, scale=9) for s in (2, 3)]
            keys, values = (t.to(device, copy=True) for t in exact)
            kv_append_(keys, values, fresh[0].to(device), fresh[1].to(device), 5)
            kv_append_reference(exact[0], exact[1], fresh[0], fresh[1], 5)
            same(f"kv_append_ of {head_dim} elements, {dtype}", keys, exact[0])
            same(f"kv_append_ of {head_dim} elements, {dtype}", values, exact[1])


TRAITS = {
    "norm_offset": 1.0,
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logits_scale": 0.5,
    "attention_softcap": 2.0,
    "logits_softcap": 2.0,
    "activation": "gelu_tanh",
}
"""Settings of a decoder that only some families use."""


SEVERAL_CHUNKS = {1: 520, 3: 130}
"""Tokens of a context that attention splits, by new tokens: the fewer, the more of it a threadgroup attends at once."""


def check_decode(device: str) -> None:
    # Odd sizes, and whole packs with heads of 64 and 128 dimensions; one new token and several.
    for hidden, head_dim, steps in ((42, 12, 3), (64, 64, 1), (64, 64, 3), (64, 128, 1), (64, 128, 3)):
        for dtype in DTYPES:
            check_decoder(device, dtype, hidden, head_dim, steps)
    # A context of several chunks, which are combined after attention.
    for hidden, head_dim, steps in ((42, 12, 3), (64, 64, 1), (64, 64, 3)):
        for dtype in DTYPES:
            check_decoder(device, dtype, hidden, head_dim, steps, SEVERAL_CHUNKS[steps])
    for hidden, head_dim in ((42, 12), (64, 64)):
        check_decoder(device, torch.float32, hidden, head_dim, 3, SEVERAL_CHUNKS[3], traits=True)
        for dtype in DTYPES:
            check_decoder(device, dtype, hidden, head_dim, 3, experts=5)
    for bits in (4, 8):
        for dtype in DTYPES:
            for steps, length in ((1, 20), (3, 20), *SEVERAL_CHUNKS.items()):
                check_decoder(device, dtype, 64, 64, steps, length, bits)
            check_decoder(device, dtype, 64, 64, 3, bits=bits, group_size=64)
        # Norms and biases in another dtype than the scales.
        for length in (20, SEVERAL_CHUNKS[3]):
            check_decoder(device, torch.float16, 64, 64, 3, length, bits, beside=torch.float32)
    # Matrices with many rows.
    for dtype in DTYPES:
        for group_size in (32, 64):
            check_decoder(device, dtype, 64, 64, 1, bits=4, group_size=group_size, rows=8200)


def check_decoder(
    device: str,
    dtype: torch.dtype,
    hidden: int,
    head_dim: int,
    steps: int,
    length: int = 20,
    bits: int = 0,
    beside: torch.dtype | None = None,
    traits: bool = False,
    experts: int = 0,
    group_size: int = 32,
    rows: int = 0,
) -> None:
    """With dense matrices, or packed ones of `bits` bits; norms and biases have the dtype `beside`.

    The head has `rows` rows, and gate and up together at least as many. `traits`: with settings that only some families
    use. `experts`: in addition to a shared expert.
    """
    heads, batch, vocabulary = 4, 1 if steps == 1 else 2, rows or 50
    intermediate = 3 * group_size + rows // 128 * 64 if hidden == 64 else 71
    queries, keys = heads * head_dim, 2 * head_dim
    sizes = {
        "input_norm": (hidden,),
        "q": (queries, hidden),
        "q_bias": (queries,),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "k_norm": (head_dim,),
        "o": (hidden, queries),
        "o_bias": (hidden,),
        "post_attention_norm": (hidden,),
        "gate": (intermediate, hidden),
        "up": (intermediate, hidden),
        "down": (hidden, intermediate),
    }
    if experts:
        each = 24 if hidden == 64 else 23
        sizes |= {"router": (experts, hidden), "shared_gate": (1, hidden), "experts_down": (experts, hidden, each)}
        sizes |= dict.fromkeys(("experts_gate", "experts_up"), (experts, each, hidden))
    if traits:
        sizes |= {"q_norm": (queries,), "attention_output_norm": (hidden,), "feed_forward_output_norm": (hidden,)}

    def scaled(*shape: int, seed: int, dtype: torch.dtype = dtype) -> Tensor:
        return make(*shape, dtype=dtype, seed=seed, scale=shape[-1] ** -0.5)

    def weight(*shape: int, seed: int = 20) -> Any:
        if len(shape) == 1:
            return scaled(*shape, seed=seed, dtype=beside or dtype)
        matrix = scaled(*shape, seed=seed)
        return Packed(*quantize(matrix, bits=bits, group_size=group_size)) if bits else matrix

    ids = torch.arange(batch * steps).view(batch, steps)
    model: dict[str, Any] = {
        "embedding": weight(vocabulary, hidden),
        "layers": [weight(*sizes[name], seed=i) if name in sizes else None for i, name in enumerate(LAYER_PARTS)],
        "norm": weight(hidden, seed=23),
        "head": weight(vocabulary, hidden, seed=24),
        "heads": heads,
        "eps": 1e-5,
        "scaling": head_dim**-0.5,
        "windows": [length - 11],
        **(TRAITS if traits else {}),
        **({"experts_per_token": 2, "normalise_experts": True} if experts else {}),
    }
    if traits:  # the gate's adapter makes gating a separate step
        shapes = {"gate": (intermediate, hidden), "o": (hidden, queries)}
        model["adapters"] = [
            Adapter(LAYER_PARTS.index(name), scaled(4, cols, seed=27), scaled(rows, 4, seed=28), 0.5)
            for name, (rows, cols) in shapes.items()
        ]
    arguments: dict[str, Any] = {
        "token_ids": ids,
        "positions": ids,
        "starts": torch.tensor([0, 15])[:batch],
        "cos": scaled(30, head_dim, seed=21),
        "sin": scaled(30, head_dim, seed=22),
        "keys": [scaled(batch, 2, length + steps, head_dim, seed=25)],
        "values": [scaled(batch, 2, length + steps, head_dim, seed=26)],
        "length": length,
    }
    exact_model = DecoderParts(*decoder_arguments(**in_float64(model, group_size)))
    exact = decode_reference(exact_model, **in_float64(arguments), logits_to_keep=steps)
    matrices = f"{bits} bits" if bits else "dense matrices"
    what = f"decode_ of {hidden} columns and heads of {head_dim} after {length}, {matrices}"
    what += ", norms of outputs" if traits else f", {experts} experts" if experts else ""
    moved = on(device, model)
    logits = decode_(make_decoder(**moved, int8_products=False), **on(device, arguments))
    compare(what, [logits.to(dtype)], [exact])
    if bits:  # on a CPU with vectors rounded to int8, elsewhere the same as above
        error = relative_error(decode_(make_decoder(**moved), **on(device, arguments)), exact)
        assert error < INT8_TOLERANCE, f"{what}, as integers: relative error {error:.3g}"


def on(device: str, value: Any) -> Any:
    return map_tensors(lambda tensor: tensor.to(device), value)


def in_float64(value: Any, group_size: int = 32) -> Any:
    """Packed matrices are unpacked."""

    def unpacked(matrix: Packed) -> Tensor:
        bits = matrix.weight.shape[1] * 32 // (matrix.scales.shape[1] * group_size)
        return dequantize_reference(*matrix, bits=bits, group_size=group_size, dtype=torch.float64)

    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, value, unpacked)


def map_tensors(
    function: Callable[[Tensor], Tensor], value: Any, of_packed: Callable[[Packed], Any] | None = None
) -> Any:
    if isinstance(value, dict):
        return {name: map_tensors(function, item, of_packed) for name, item in value.items()}
    if isinstance(value, Adapter):
        return value._replace(a=function(value.a), b=function(value.b))
    if isinstance(value, list):
        return [map_tensors(function, item, of_packed) for item in value]
    if isinstance(value, Packed):
        return of_packed(value) if of_packed else Packed(*map(function, value))
    return function(value) if isinstance(value, Tensor) else value


CHECKS: dict[str, Callable[[str], None]] = {
    "rms_norm": check_rms_norm,
    "add_rms_norm": check_add_rms_norm,
    "rms_norm_backward": check_rms_norm_backward,
    "layer_norm": check_layer_norm,
    "layer_norm_backward": check_layer_norm_backward,
    "softmax": check_softmax,
    "softmax_backward": check_softmax_backward,
    "cross_entropy_": check_cross_entropy,
    "linear_cross_entropy": check_linear_cross_entropy,
    "silu_mul": check_silu_mul,
    "silu_mul_backward": check_silu_mul_backward,
    "gelu_mul": check_gelu_mul,
    "gelu_mul_backward": check_gelu_mul_backward,
    "apply_rotary_pos_emb": check_rotary,
    "apply_rotary_pos_emb_backward": check_rotary_backward,
    "adamw_": check_adamw,
    "sum_of_squares": check_sum_of_squares,
    "kv_append_": check_kv_append,
    "decode_": check_decode,
    "dequantize": check_dequantize,
    "quantized_linear": check_quantized_linear,
    "greedy": check_greedy,
    "filter_logits": check_filter_logits,
    "sample": check_sample,
}
