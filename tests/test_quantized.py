"""Packed weights: the format bit by bit, values, gradients and contracts, on every backend."""

import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import torch_fused
from torch_fused.functional import dequantize, quantize, quantized_linear
from torch_fused.metal import emulate
from torch_fused.ops.quantized import dequantize_reference, quantized_linear_reference
from torch_fused.testing import make, relative_error

FORMATS = [(bits, group_size) for bits in (4, 8) for group_size in (32, 64, 128)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MATRICES = {
    "normal": lambda: make(48, 512, dtype=torch.float32),
    "grid": lambda: torch.round(make(64, 512, dtype=torch.float32) * 8) / 4,
    "ties": lambda: torch.arange(-256.0, 256).repeat(4, 1) / 34,
    "constant": lambda: torch.full((2, 256), 0.3),
    "negative constant": lambda: torch.full((2, 256), -0.3),
    "zero": lambda: torch.zeros(2, 256),
    "negative": lambda: -make(16, 512, dtype=torch.float32).abs() - 0.1,
    "positive": lambda: make(16, 512, dtype=torch.float32).abs() + 0.1,
    "large": lambda: make(16, 512, dtype=torch.float32).clamp(-3, 3) * 2e4,
    "small": lambda: make(16, 512, dtype=torch.float32) * 1e-7,
    "denormal": lambda: make(2, 256, dtype=torch.float32) * 1e-39,
    "one outlier": lambda: torch.where(torch.arange(512) % 100 == 7, -9.0, make(4, 512, dtype=torch.float32)),
}


def bit_level(packed, scales, biases, bits, group_size, wide=np.float32):
    """Unpacks a matrix weight by weight from the bytes of its rows."""
    rows = np.ascontiguousarray(packed.cpu().view(torch.int32).numpy()).view(np.uint8)
    scales, biases = (t.cpu().float().numpy().astype(wide) for t in (scales, biases))
    columns = rows.shape[-1] * 8 // bits
    out = np.zeros((*rows.shape[:-1], columns), wide)
    for j in range(columns):
        byte = rows[..., j * bits // 8]
        code = byte if bits == 8 else byte >> 4 if j % 2 else byte & 15
        out[..., j] = scales[..., j // group_size] * code.astype(wide) + biases[..., j // group_size]
    return torch.from_numpy(out)


def from_mlx(array):
    mx = pytest.importorskip("mlx.core")
    if array.dtype == mx.uint32:
        return torch.from_numpy(np.array(array).view(np.int32)).view(torch.uint32)
    dtype = {mx.float32: torch.float32, mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}[array.dtype]
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def to_mlx(tensor):
    mx = pytest.importorskip("mlx.core")
    dtype = {torch.float32: mx.float32, torch.float16: mx.float16, torch.bfloat16: mx.bfloat16}[tensor.dtype]
    return mx.array(tensor.float().numpy()).astype(dtype)


def same(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == torch.uint32:
        actual, expected = actual.view(torch.int32), expected.view(torch.int32)
    assert torch.equal(actual, expected)


# ---- the format -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("name", MATRICES)
def test_quantize_is_mlx(name, bits, group_size):
    """Codes, scales and biases are those of mlx.core.quantize, bit for bit."""
    mx = pytest.importorskip("mlx.core")
    for dtype in DTYPES:
        weight = MATRICES[name]().to(dtype)
        expected = mx.quantize(to_mlx(weight), group_size=group_size, bits=bits)
        for a, e in zip(quantize(weight, bits=bits, group_size=group_size), expected, strict=True):
            same(a, from_mlx(e))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("name", MATRICES)
def test_quantize_by_hand(name, bits, group_size):
    """Codes, scales and biases computed group by group in numpy."""
    for dtype in DTYPES:
        weight = MATRICES[name]()[:4].to(dtype)
        packed, scales, biases = quantize(weight, bits=bits, group_size=group_size)
        most = 2**bits - 1
        one = [torch.ones(s.shape) for s in (scales, biases)]
        codes = bit_level(packed, one[0], one[1] * 0, bits, group_size).numpy()
        for row, values in enumerate(weight.float().numpy()):
            for group in range(len(values) // group_size):
                w = values[group * group_size : (group + 1) * group_size]
                edge = w.min() if abs(w.min()) > abs(w.max()) else w.max()
                scale = max((w.max() - w.min()) / np.float32(most), np.float32(1e-7))
                scale = scale if abs(w.min()) > abs(w.max()) else -scale
                steps = np.rint(edge / scale)
                scale, bias = (edge / steps, edge) if steps != 0 else (scale, np.float32(0))
                assert scales[row, group] == torch.tensor(scale).to(dtype)
                assert biases[row, group] == torch.tensor(bias).to(dtype)
                expected = np.clip(np.rint((w - bias) / scale), 0, most)
                assert (codes[row, group * group_size : (group + 1) * group_size] == expected).all()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_layout(backend, bits, group_size):
    """Any codes and scales unpack exactly to the values in the bytes, in every dtype of scales and result."""
    words = torch.randint(-(2**31), 2**31, (5, 3 * group_size * bits // 32)).to(torch.int32).view(torch.uint32)
    for dtype in DTYPES:
        scales, biases = (make(5, 3, dtype=dtype, seed=seed) for seed in range(2))
        exact = bit_level(words, scales, biases, bits, group_size)
        packed = [t.to(backend.device) for t in (words, scales, biases)]
        for result in (None, *DTYPES):
            actual = dequantize(*packed, bits=bits, group_size=group_size, dtype=result)
            same(actual.cpu(), exact.to(result or dtype))
    scales, biases = (make(5, 3, dtype=torch.float32, seed=seed) for seed in range(2))
    if torch.float64 in backend.dtypes:
        actual = dequantize(words, scales, biases, bits=bits, group_size=group_size, dtype=torch.float64)
        same(actual, bit_level(words, scales, biases, bits, group_size, np.float64))


def test_quantize_in_blocks(monkeypatch):
    """Processing in blocks of rows, which limits memory, and leading dimensions do not change the result."""
    weight = make(7, 3, 64, dtype=torch.bfloat16)
    expected = [quantize(row) for row in weight.flatten(0, 1)]
    monkeypatch.setattr(torch_fused.ops.quantized, "_BLOCK", 256)
    for i, actual in enumerate(quantize(weight)):
        same(actual, torch.stack([e[i].view(torch.int32) if i == 0 else e[i] for e in expected]).view(7, 3, -1)
             .view(actual.dtype))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (64,), (2, 0, 128)])
def test_quantize_shapes(shape):
    """No rows, no columns, one row."""
    packed, scales, biases = quantize(torch.ones(shape))
    assert packed.shape == (*shape[:-1], shape[-1] // 8)
    assert scales.shape == biases.shape == (*shape[:-1], shape[-1] // 64)
    assert dequantize(packed, scales, biases, bits=4, group_size=64).shape == shape


def test_quantize_not_finite():
    """A group with NaN or infinity is NaN; its neighbours are right."""
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(2, 128)
        weight[0, 70] = value
        result = dequantize(*quantize(weight), bits=4, group_size=64)
        assert result[0, 64:].isnan().all() and torch.equal(result[0, :64], weight[0, :64])
        assert torch.equal(result[1], weight[1])


# ---- products -------------------------------------------------------------------------------------------------------

# One group; a tail after whole registers and blocks; models' sizes; more groups than are read at once.
COLUMNS = {32: [32, 96, 576, 896, 2144], 64: [64, 192, 576, 896, 4864], 128: [128, 384, 896, 8320]}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def matrix(rows, columns, bits=4, group_size=64, dtype=torch.float32, device="cpu", seed=0):
    packed = quantize(make(rows, columns, dtype=dtype, seed=seed), bits=bits, group_size=group_size)
    return [t.to(device) for t in packed]


def exact_product(x, packed, bias=None, *, bits=4, group_size=64):
    wide = [t if t is None or t.dtype == torch.uint32 else t.detach().cpu().double() for t in (x, *packed, bias)]
    wide[1] = wide[1].cpu()
    return quantized_linear_reference(*wide, bits=bits, group_size=group_size)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_matches_float64(backend, bits, group_size):
    """Every dtype, odd numbers of columns, few and many vectors, with and without a bias."""
    for columns in COLUMNS[group_size]:
        for dtype in backend.dtypes:
            scale_dtype = torch.float32 if dtype == torch.float64 else dtype
            packed = matrix(7, columns, bits, group_size, scale_dtype, backend.device)
            for shape, bias in (((), True), ((1,), False), ((3,), True), ((2, 4), False), ((9,), True)):
                x = make(*shape, columns, dtype=dtype, device=backend.device, seed=1)
                b = make(7, dtype=dtype, device=backend.device, seed=2) if bias else None
                actual = quantized_linear(x, *packed, b, bits=bits, group_size=group_size)
                assert actual.dtype == dtype and actual.shape == (*shape, 7) and actual.is_contiguous()
                exact = exact_product(x, packed, b, bits=bits, group_size=group_size)
                assert relative_error(actual, exact) < TOLERANCE[dtype], (columns, dtype, shape)


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_scales_of_another_dtype(backend, scale_dtype):
    """Files have float16 scales, for any dtype of the model."""
    packed = matrix(7, 192, dtype=scale_dtype, device=backend.device)
    for dtype in backend.dtypes:
        for vectors in (1, 8, 9):
            x = make(vectors, 192, dtype=dtype, device=backend.device, seed=1)
            actual = quantized_linear(x, *packed, bits=4, group_size=64)
            assert relative_error(actual, exact_product(x, packed)) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 8195])
def test_rows(backend, rows):
    """Fewer rows than a threadgroup handles, tails, and so many that simdgroups do not share them."""
    packed = matrix(rows, 64, device=backend.device)
    for vectors in (1, 2, 8):
        x = make(vectors, 64, device=backend.device, seed=1)
        assert relative_error(quantized_linear(x, *packed, bits=4, group_size=64), exact_product(x, packed)) < 5e-6


# One group; half a tile; more than is staged at once.
MANY_ROWS = [(32, 32), (32, 96), (64, 64), (64, 192), (128, 128), (128, 896)]
MANY_ROWS = [(*sizes, dtype) for dtype in (torch.float16, torch.bfloat16) for sizes in MANY_ROWS]
MANY_ROWS += [(32, 2080, torch.float16), (64, 2112, torch.bfloat16)]


@pytest.mark.parametrize(("group_size", "columns", "dtype"), MANY_ROWS)
def test_many_rows(backend, group_size, columns, dtype):
    """A GPU has kernels of its own for one vector and many rows of four bits; they end with part of a tile here."""
    packed = matrix(8192 + 13, columns, 4, group_size, dtype, backend.device)
    x = make(columns, dtype=dtype, device=backend.device, seed=1)
    bias = make(8192 + 13, dtype=dtype, device=backend.device, seed=2)
    for b in (None, bias):
        actual = quantized_linear(x, *packed, b, bits=4, group_size=group_size)
        exact = exact_product(x, packed, b, group_size=group_size)
        assert relative_error(actual, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [32, 64, 96, 192])
def test_so_many_rows_that_a_simdgroup_takes_several_tiles(backend, columns):
    """Of a row with one tile it takes one only. Results that are no numbers are computed again, each with its row."""
    packed = matrix(42240 + 13, columns, 4, 32, torch.bfloat16, backend.device)
    x = make(columns, dtype=torch.bfloat16, device=backend.device, seed=1)
    bias = make(42240 + 13, dtype=torch.bfloat16, device=backend.device, seed=2)
    actual = quantized_linear(x, *packed, bias, bits=4, group_size=32)
    assert relative_error(actual, exact_product(x, packed, bias, group_size=32)) < TOLERANCE[torch.bfloat16]
    x[7] = torch.inf
    actual = quantized_linear(x, *packed, bits=4, group_size=32)
    weights = dequantize(*packed, bits=4, group_size=32)[:, 7]
    assert torch.equal(actual.nan_to_num(0), (weights * x[7]).nan_to_num(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows_of_parts_of_larger_tensors(backend, dtype):
    """Rows of every tensor lie apart, scales and biases differently."""
    weight, scales, biases = matrix(8200, 192, dtype=dtype, device=backend.device)

    def apart(tensor, columns):
        wide = torch.full((len(tensor), columns), 7, device=tensor.device).to(tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    parts = [apart(weight.view(torch.int32), 28).view(torch.uint32), apart(scales, 5), apart(biases, 4)]
    x = make(192, dtype=dtype, device=backend.device, seed=1)
    actual = quantized_linear(x, *parts, bits=4, group_size=64)
    assert torch.equal(actual, quantized_linear(x, weight, scales, biases, bits=4, group_size=64))


def check_int8(seed=0):
    """Integer products are within the rounding of the vector to int8, for any columns and number of vectors."""
    for bits, group_size in FORMATS:
        for columns in COLUMNS[group_size]:
            packed = matrix(9, columns, bits, group_size, torch.bfloat16)
            for vectors in (1, 2, 3, 4, 7, 8):
                x = make(vectors, columns, seed=seed + vectors)
                # The same in plain torch with the rounded vector, except for the order of sums.
                blocks = x.view(vectors, -1, 8)
                step = blocks.abs().amax(-1, keepdim=True) / 127
                rounded = (torch.round(blocks / step) * step).view(x.shape)
                options = {"bits": bits, "group_size": group_size}
                actual = torch.ops.torch_fused._quantized_linear_int8(x, *packed, **options)
                assert relative_error(actual, exact_product(rounded, packed, **options)) < 2e-4, (options, columns)
                error = relative_error(actual, exact_product(x, packed, **options))
                assert error < 1.5e-2, (options, columns, vectors, error)
                actual = quantized_linear(x, *packed, **options)
                assert relative_error(actual, exact_product(x, packed, **options)) < 5e-6


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability):
    """Integer and float products of every instruction set that this machine has."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import test_quantized; test_quantized.check_int8()"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=os.path.dirname(__file__))


def test_int8_of_special_values():
    """Zeros give the bias of the sum, tiny vectors nothing, and NaN or infinity gives NaN."""
    packed = matrix(5, 192)
    run = lambda x: torch.ops.torch_fused._quantized_linear_int8(x, *packed, bits=4, group_size=64)  # noqa: E731
    assert torch.equal(run(torch.zeros(192)), torch.zeros(5))
    assert run(torch.full((192,), 1e-40)).abs().max() < 1e-30
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(192)
        x[70] = value
        assert run(x).isnan().all()
    with pytest.raises(RuntimeError, match="_quantized_linear_int8: x must have 1 to 8 vectors"):
        run(torch.zeros(9, 192))


def test_extreme_codes(backend):
    """All codes at either end, against vectors of the largest int8: no sum overflows."""
    for bits in (4, 8):
        for word in (0, 2**32 - 1):
            weight = torch.full((3, 128 * bits // 32), word, dtype=torch.int64).to(torch.uint32)
            scales, biases = torch.ones(3, 2), torch.full((3, 2), -(2.0 ** (bits - 1)))
            packed = [t.to(backend.device) for t in (weight, scales, biases)]
            for sign in (1, -1):
                x = torch.full((128,), 127.0 * sign, device=backend.device)
                exact = exact_product(x, packed, bits=bits)
                assert torch.equal(quantized_linear(x, *packed, bits=bits, group_size=64).cpu().double(), exact)
                if backend.name == "cpu":
                    actual = torch.ops.torch_fused._quantized_linear_int8(x, *packed, bits=bits, group_size=64)
                    torch.testing.assert_close(actual.double(), exact)


def test_nan_and_inf(backend):
    """NaN and infinities in x, and sums that overflow, give the same as the unpacked matrix."""
    for bits in (4, 8):
        packed = matrix(9, 128, bits, device=backend.device)
        for value in (torch.nan, torch.inf, -torch.inf, 3e38, -3e38):
            for vectors in (1, 3):
                x = torch.zeros(vectors, 128)
                x[0, 77] = value
                actual = quantized_linear(x.to(backend.device), *packed, bits=bits, group_size=64).cpu()
                dense = dequantize(*packed, bits=bits, group_size=64).cpu()
                expected = x[:, 77:78] * dense[:, 77] + (x * 0).sum(-1, keepdim=True).nan_to_num(posinf=0, neginf=0)
                exact = F.linear(x, dense) if x[0].isfinite().all() else expected
                torch.testing.assert_close(actual[1:], exact[1:])
                if value == value and abs(value) < torch.inf:
                    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5)
                else:
                    torch.testing.assert_close(actual[0], expected[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_and_inf_with_many_rows(backend, dtype):
    """The same for the kernels of many rows; scales that are no numbers reach their own rows only."""
    packed = matrix(8200, 128, dtype=dtype, device=backend.device)
    dense = dequantize(*packed, bits=4, group_size=64).cpu()
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.zeros(128, dtype=dtype)
        x[77] = value
        actual = quantized_linear(x.to(backend.device), *packed, bits=4, group_size=64).cpu()
        torch.testing.assert_close(actual, value * dense[:, 77], equal_nan=True)
    _, scales, biases = packed
    scales[8195, 1] = biases[3, 0] = torch.inf
    actual = quantized_linear(make(128, dtype=dtype).to(backend.device), *packed, bits=4, group_size=64).cpu()
    assert (~actual.isfinite()).nonzero().flatten().tolist() == [3, 8195]


def test_empty(backend):
    """No vectors, no rows, no columns."""
    for vectors, rows, columns in ((0, 3, 64), (2, 0, 64), (2, 3, 0)):
        packed = matrix(rows, columns, device=backend.device)
        x = torch.ones(vectors, columns, device=backend.device, requires_grad=True)
        bias = torch.ones(rows, device=backend.device, requires_grad=True)
        y = quantized_linear(x, *packed, bias, bits=4, group_size=64)
        assert torch.equal(y, torch.ones(vectors, rows, device=backend.device))
        y.sum().backward()
        assert x.grad.shape == x.shape and torch.equal(bias.grad, torch.full_like(bias, vectors))


def test_large_matrices_are_unpacked_in_blocks():
    """Unpacking in blocks of rows, which saves memory for a head, gives the same as the whole matrix."""
    rows, columns = (1 << 26) // 8192 + 3, 8192
    packed = [torch.zeros(1, columns // 8, dtype=torch.int32).view(torch.uint32).expand(rows, -1)]
    packed += [
        torch.zeros(1, columns // 64).expand(rows, -1),
        torch.arange(rows)[:, None].expand(-1, columns // 64) / 64,
    ]
    x = torch.ones(9, columns)
    bias = torch.arange(rows).float()
    y = quantized_linear(x, *packed, bias, bits=4, group_size=64)
    torch.testing.assert_close(y, (torch.arange(rows) * (columns / 64 + 1)).expand(9, -1))


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradcheck():
    """Analytic gradients of x and bias equal numeric ones in float64."""
    packed = matrix(5, 64, bits=8)
    for shape in ((64,), (3, 64), (9, 64)):
        x, bias = (make(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate((shape, (5,))))
        assert torch.autograd.gradcheck(lambda x, b: quantized_linear(x, *packed, b, bits=8, group_size=64), (x, bias))


def test_backward(backend):
    """The gradients are those of the unpacked matrix, for few vectors and many, of x and of bias alone."""
    for dtype in backend.dtypes:
        packed = matrix(7, 192, dtype=torch.float32 if dtype == torch.float64 else dtype, device=backend.device)
        for shape in ((192,), (2, 3, 192), (9, 192)):
            for needs in ((True, True), (True, False), (False, True)):
                x, bias = (make(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, (7,))))
                grad = make(*shape[:-1], 7, dtype=dtype, seed=2)
                ours = [
                    t.to(backend.device, copy=True).requires_grad_(n) for t, n in zip((x, bias), needs, strict=True)
                ]
                quantized_linear(ours[0], *packed, ours[1], bits=4, group_size=64).backward(grad.to(backend.device))
                exact = [t.double().requires_grad_() for t in (x, bias)]
                exact_packed = [t.cpu() for t in packed]
                dense = dequantize_reference(*exact_packed, bits=4, group_size=64, dtype=torch.float64)
                F.linear(exact[0], dense, exact[1]).backward(grad.double())
                for a, e, n in zip(ours, exact, needs, strict=True):
                    assert (a.grad is not None) == n
                    assert not n or relative_error(a.grad, e.grad) < 2 * TOLERANCE[dtype]


def linear_of(bits, group_size):
    options = {"bits": bits, "group_size": group_size}
    packed = quantize(make(5, 64, scale=0.2), **options)
    dense = dequantize_reference(*packed, **options, dtype=torch.float64)

    def op(x, bias):
        return quantized_linear(x, *(t.to(x.device) for t in packed), bias, **options)

    return op, lambda x, bias: F.linear(x, dense.to(x.dtype), bias), [(3, 64), (5,)]


DIFFERENTIATED = {"4 bits": linear_of(4, 64)}  # the derivatives' code is the same for any bits

PACKED = matrix(5, 64)


def product_of(x, **options):
    return quantized_linear(x, *(t.to(x.device) for t in PACKED), **{"bits": 4, "group_size": 64, **options})


BAD_ARGUMENTS = [
    (product_of, "quantized_linear: x must have weight's 64 columns"),
    (lambda x: product_of(x, bits=5), "quantized_linear: bits must be 4 or 8, got 5"),
]


# ---- GPU kernels ----------------------------------------------------------------------------------------------------


SCHEDULES = [("sequential", 0), ("reversed", 0), ("preemptive", 0), ("random", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize(("schedule", "seed"), SCHEDULES)
def test_kernels_are_clean_in_every_schedule(schedule, seed):
    """No check fires, and no bit depends on the order of threads and threadgroups."""

    def run():
        for bits in (4, 8):
            packed = matrix(9, 2112, bits, dtype=torch.bfloat16)
            options = {"bits": bits, "group_size": 64}
            for vectors in (1, 3, 9):
                yield quantized_linear(make(vectors, 2112, dtype=torch.bfloat16), *packed, **options)
            yield quantized_linear(make(2, 2113)[:, 1:], *packed, **options)
            yield dequantize(*packed, **options)
        for group_size, columns in ((32, 96), (64, 192)):
            packed = matrix(8200, columns, 4, group_size, torch.bfloat16)
            yield quantized_linear(make(columns, dtype=torch.bfloat16), *packed, bits=4, group_size=group_size)

    with emulate(checked=False):
        expected = list(run())
    with emulate(checked=True, schedule=schedule, seed=seed):
        assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_traffic(bits):
    """The codes are read once and every result is written once; no operand is read past its end."""
    packed = matrix(64, 896, bits, dtype=torch.bfloat16)
    for vectors in (1, 8):
        x, bias = make(vectors, 896, dtype=torch.bfloat16), make(64, dtype=torch.bfloat16)
        with emulate() as run:
            y = quantized_linear(x, *packed, bias, bits=bits, group_size=64)
        (launch,) = run.launches
        assert launch.buffers[0].read == packed[0].nbytes and launch.buffers[5].written == y.nbytes
        distinct = [buffer.distinct_read + buffer.distinct_written for buffer in launch.buffers[:-1]]
        assert distinct == [t.nbytes for t in (*packed, x, bias, y)]
    many = matrix(8200, 896, bits, dtype=torch.bfloat16)
    x, bias = make(896, dtype=torch.bfloat16), make(8200, dtype=torch.bfloat16)
    with emulate() as run:
        y = quantized_linear(x, *many, bias, bits=bits, group_size=64)
    (launch,) = run.launches
    distinct = [buffer.distinct_read + buffer.distinct_written for buffer in launch.buffers[:-1]]
    assert [n for n in distinct if n] == [t.nbytes for t in (*many, *((bias, x) if bits == 4 else (x, bias)), y)]
    with emulate() as run:
        y = dequantize(*packed, bits=bits, group_size=64)
    buffers = run.launches[0].buffers
    assert buffers[0].read == packed[0].nbytes and buffers[3].written == y.nbytes
    assert [b.distinct_read + b.distinct_written for b in buffers[:-1]] == [t.nbytes for t in (*packed, y)]


# ---- torch's machinery ----------------------------------------------------------------------------------------------


def test_opcheck(backend):
    """Schema, fake tensors, autograd registration and AOT dispatch are consistent."""
    packed = matrix(5, 128, device=backend.device)
    options = {"bits": 4, "group_size": 64}
    for vectors in (2, 9):
        x = make(vectors, 128, device=backend.device, requires_grad=True)
        bias = make(5, device=backend.device, requires_grad=True)
        opcheck(torch.ops.torch_fused.quantized_linear.default, (x, *packed, bias), options)
        opcheck(torch.ops.torch_fused.quantized_linear.default, (x, *packed), options)
    opcheck(torch.ops.torch_fused.dequantize.default, tuple(packed), options)
    opcheck(torch.ops.torch_fused.dequantize.default, tuple(packed), options | {"dtype": torch.float16})


def test_compile_fullgraph(backend):
    """torch.compile traces forward and backward without a graph break and gives the same numbers."""
    linear = torch_fused.nn.QuantizedLinear.from_linear(torch.nn.Linear(128, 5)).to(backend.device)
    embedding = torch_fused.nn.QuantizedEmbedding.from_embedding(torch.nn.Embedding(9, 128)).to(backend.device)
    ids = torch.tensor([[1, 2], [8, 0]], device=backend.device)

    def run(ids):
        x = embedding(ids).requires_grad_() if not torch.compiler.is_compiling() else embedding(ids)
        return linear(x), embedding.as_linear(x)

    for a, e in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(ids), run(ids), strict=True):
        torch.testing.assert_close(a, e)
    x = make(3, 128, device=backend.device, requires_grad=True)
    torch.compile(linear, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled, x.grad = x.grad, None
    linear(x).square().sum().backward()
    torch.testing.assert_close(compiled, x.grad)


def test_autocast(backend):
    """Under autocast it computes in the same dtype as torch's linear."""
    device = torch.device(backend.device).type
    packed = matrix(5, 64, device=backend.device)
    x, bias = make(3, 64, device=backend.device), make(5, device=backend.device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = quantized_linear(x, *packed, bias, bits=4, group_size=64)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, quantized_linear(x.bfloat16(), *packed, bias.bfloat16(), bits=4, group_size=64))


def test_vmap(backend):
    """torch.func.vmap over vectors, biases and matrices."""
    options = {"bits": 4, "group_size": 64}
    close = partial(torch.testing.assert_close, rtol=2e-5, atol=5e-5)
    packed = [torch.stack(t) for t in zip(*(matrix(5, 64, seed=i) for i in range(3)), strict=True)]
    packed = [t.to(backend.device) for t in packed]
    first = [t[0] for t in packed]
    x, bias = make(3, 2, 64, device=backend.device), make(3, 5, device=backend.device)
    run = lambda x, *t: quantized_linear(x, *t, **options)  # noqa: E731
    close(torch.func.vmap(run, (0, None, None, None))(x, *first), run(x, *first))
    close(torch.func.vmap(run, (1, None, None, None))(x, *first), run(x.movedim(1, 0), *first))
    every = torch.stack([run(x[i], *first, bias[i]) for i in range(3)])
    close(torch.func.vmap(run, (0, None, None, None, 0))(x, *first, bias), every)
    every = torch.stack([run(x[0], *(t[i] for t in packed)) for i in range(3)])
    close(torch.func.vmap(run, (None, 0, 0, 0))(x[0], *packed), every)
    unpack = lambda *t: dequantize(*t, **options)  # noqa: E731
    close(torch.func.vmap(unpack)(*packed), unpack(*packed))


def test_a_packed_matrix_has_no_gradient(backend):
    """Scales that require a gradient raise an error that names them, instead of getting none."""
    weight, scales, biases = matrix(5, 64, device=backend.device)
    x = make(2, 64, device=backend.device)
    with pytest.raises(RuntimeError, match=r"quantized_linear: scales is differentiated.*pass scales.detach\(\)"):
        quantized_linear(x, weight, scales.clone().requires_grad_(), biases, bits=4, group_size=64)
    with pytest.raises(RuntimeError, match="dequantize: biases is differentiated"):
        dequantize(weight, scales, biases.clone().requires_grad_(), bits=4, group_size=64)


def wrong(**other):
    def call(device):
        names = ("weight", "scales", "biases")
        arguments = dict(zip(names, matrix(5, 128, device=device), strict=True))
        arguments |= {"x": make(2, 128, device=device), "bits": 4, "group_size": 64}
        for name, value in other.items():
            arguments[name] = value(arguments) if callable(value) else value
        x = arguments.pop("x")
        return dequantize(**arguments) if x is None else quantized_linear(x, **arguments)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (wrong(bits=3), "quantized_linear: bits must be 4 or 8, got 3"),
        (wrong(group_size=16), "quantized_linear: group_size must be 32, 64 or 128, got 16"),
        (wrong(bits=8), r"quantized_linear: scales must have the shape \[5, 1\], .*got \[5, 2\]"),
        (wrong(weight=lambda a: a["weight"].view(torch.int32)), "quantized_linear: weight must be a uint32.*got Int"),
        (
            wrong(weight=lambda a: a["weight"][:, 1:]),
            r"weight must have rows of whole groups.*8 words, got .*\[5, 15\]",
        ),
        (
            wrong(weight=lambda a: a["weight"][0]),
            r"quantized_linear: weight must have two dimensions, got shape \[16\]",
        ),
        (wrong(scales=lambda a: a["scales"][:4]), r"scales must have the shape \[5, 2\].*got \[4, 2\]"),
        (wrong(scales=lambda a: a["scales"].int()), "scales must be float32, float16 or bfloat16, got Int"),
        (wrong(biases=lambda a: a["biases"].half()), "biases must have scales's dtype Float, got Half"),
        (wrong(x=lambda a: a["x"][:, 1:]), r"x must have weight's 128 columns as its last.*\[2, 127\]"),
        (wrong(x=lambda a: a["x"].int()), "quantized_linear: x must be float32.*got Int"),
        (wrong(bias=lambda a: a["x"][0]), r"quantized_linear: bias must have the shape \[5\], got \[128\]"),
        (wrong(bias=lambda a: a["x"][0, :5].half()), "quantized_linear: bias must have x's dtype Float, got Half"),
        (wrong(x=None, dtype=torch.int8), "dequantize: dtype must be float32.*got Char"),
        (wrong(x=None, bits=2), "dequantize: bits must be 4 or 8, got 2"),
    ],
)
def test_bad_arguments(backend, call, message):
    """A bad argument raises before anything runs; the error names the op and the argument."""
    with pytest.raises(RuntimeError, match=message):
        call(backend.device)


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_module(dtype):
    """A packed linear layer has MLX's tensor names, the values of the unpacked one, and a state dict that loads."""
    linear = torch.nn.Linear(64, 5, dtype=dtype).eval()
    packed = torch_fused.nn.QuantizedLinear.from_linear(linear, bits=8, group_size=32)
    assert not packed.training and packed.bias is linear.bias
    assert {name: (t.dtype, tuple(t.shape)) for name, t in packed.state_dict().items()} == {
        "weight": (torch.uint32, (5, 16)),
        "scales": (dtype, (5, 2)),
        "biases": (dtype, (5, 2)),
        "bias": (dtype, (5,)),
    }
    assert [name for name, _ in packed.named_parameters()] == ["bias"]
    x = make(3, 64, dtype=dtype)
    matrix = dequantize(packed.weight, packed.scales, packed.biases, bits=8, group_size=32)
    exact = F.linear(x.double(), matrix.double(), linear.bias.double())
    assert relative_error(packed(x), exact) < 2 * TOLERANCE[dtype]
    again = torch_fused.nn.QuantizedLinear(64, 5, bits=8, group_size=32, dtype=dtype)
    assert torch.equal(again(x), torch.zeros(3, 5, dtype=dtype))
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    assert "bits=8" in repr(again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_module(dtype):
    """A packed embedding looks up unpacked rows; tied, it multiplies with them."""
    embedding = torch.nn.Embedding(11, 64, dtype=dtype)
    packed = torch_fused.nn.QuantizedEmbedding.from_embedding(embedding)
    matrix = dequantize(packed.weight, packed.scales, packed.biases, bits=4, group_size=64)
    ids = torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(packed(ids), matrix[ids])
    x = make(2, 64, dtype=dtype)
    assert relative_error(packed.as_linear(x), x.double() @ matrix.double().T) < 2 * TOLERANCE[dtype]
    assert sorted(packed.state_dict()) == ["biases", "scales", "weight"] and not list(packed.parameters())
    packed.output_dtype = torch.float32
    assert packed(ids).dtype == torch.float32
    assert "bits=4" in repr(packed)


def test_modules_on_meta():
    """A module without memory, as loaders create it."""
    module = torch_fused.nn.QuantizedLinear(64, 5, device="meta", dtype=torch.bfloat16)
    assert module.weight.is_meta and module(torch.ones(2, 64, device="meta")).shape == (2, 5)
    module.to_empty(device="cpu")
    assert module.weight.dtype == torch.uint32 and module.scales.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(2, 64), bits=3), "quantize: bits must be 4 or 8, got 3"),
        (lambda: quantize(torch.ones(2, 64), group_size=16), "quantize: group_size must be 32, 64 or 128, got 16"),
        (lambda: quantize(torch.ones(2, 96)), r"quantize: weight must .* group_size \(64\) .* \[2, 96\]"),
        (lambda: quantize(torch.ones(2, 64).int()), "quantize: weight must be float32.*got torch.int32"),
        (lambda: quantize(torch.ones(2, 64).double()), "quantize: weight must be float32.*got torch.float64"),
        (lambda: torch_fused.nn.QuantizedLinear(96, 2), r"QuantizedLinear: the columns must be .*64\), got 96"),
        (lambda: torch_fused.nn.QuantizedEmbedding(2, 64, bits=5), "QuantizedEmbedding: bits must be 4 or 8, got 5"),
    ],
)
def test_bad_matrices(call, message):
    """Matrices that cannot be packed raise an error that names the problem."""
    with pytest.raises(RuntimeError, match=message):
        call()
