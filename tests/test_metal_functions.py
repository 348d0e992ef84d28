"""Metal's functions: each matches its definition in numpy, for every type and width it supports."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from torch_fused.metal import MetalError, compile_shader

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
NAN, INF = np.nan, np.inf


class Format:
    """A floating-point type: how float64 rounds to it."""

    def __init__(self, metal, dtype, digits, lowest_exponent, highest_exponent):
        self.metal, self.dtype = metal, dtype
        self.digits, self.lowest, self.highest = digits, lowest_exponent, highest_exponent

    def ulp(self, x):
        exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))[1]
        return np.ldexp(1.0, np.maximum(exponent - self.digits, self.lowest))

    def round(self, x):
        with np.errstate(all="ignore"):
            unit = self.ulp(x)
            rounded = np.where(np.isfinite(x), np.rint(x / unit) * unit, x)
            return np.where(np.abs(rounded) >= 2.0**self.highest, np.copysign(INF, rounded), rounded)


FLOATS = [
    Format("float", torch.float32, 24, -149, 128),
    Format("half", torch.float16, 11, -24, 16),
    Format("bfloat", torch.bfloat16, 8, -133, 128),
]
INTEGERS = {
    "char": torch.int8, "uchar": torch.uint8, "short": torch.int16, "ushort": torch.uint16,
    "int": torch.int32, "uint": torch.uint32, "long": torch.int64, "ulong": torch.uint64,
}  # fmt: skip


def fmax(x, y):
    return np.fmax(x, y)


def fmin(x, y):
    return np.fmin(x, y)


def median(x, y, z):
    return fmax(fmin(x, y), fmin(fmax(x, y), z))


def turns(function, x):
    """sin or cos of pi x, exact at multiples of a half."""
    turn = np.fmod(x, 2.0)
    value = function(turn * np.pi)
    exact = np.where(turn * 2 == np.rint(turn * 2), np.rint(value), value)
    return exact


def nextafter(f, x, y):
    """The next number of a format."""
    step = np.where(y > x, 1.0, -1.0)
    unit = f.ulp(x)
    shrinks = (np.abs(np.frexp(x)[0]) == 0.5) & (np.sign(x) * step < 0)  # from a power of 2 downwards
    unit = np.where(shrinks, np.maximum(unit / 2, 2.0**f.lowest), unit)
    largest = 2.0**f.highest * (1 - 2.0**-f.digits)
    moved = np.where(np.isinf(x), np.copysign(largest, x), np.where(x == 0, step * 2.0**f.lowest, x + step * unit))
    return np.where(np.isnan(x) | np.isnan(y), NAN, np.where(x == y, y, moved))


# {name: (arguments, definition in float64, allowed error in units in the last place)}. Definitions with the format,
# f, compute in that format.
EXACT, CLOSE, LOOSE = 0.0, 2.0, 5.0
FLOAT_FUNCTIONS = {
    "acos": (1, np.arccos, CLOSE), "acosh": (1, np.arccosh, CLOSE), "asin": (1, np.arcsin, CLOSE),
    "asinh": (1, np.arcsinh, CLOSE), "atan": (1, np.arctan, CLOSE), "atanh": (1, np.arctanh, CLOSE),
    "ceil": (1, np.ceil, EXACT), "cos": (1, np.cos, CLOSE), "cosh": (1, np.cosh, CLOSE), "exp": (1, np.exp, CLOSE),
    "cospi": (1, lambda x: turns(np.cos, x), CLOSE), "sinpi": (1, lambda x: turns(np.sin, x), CLOSE),
    "tanpi": (1, lambda x: turns(np.sin, x) / turns(np.cos, x), LOOSE),
    "exp2": (1, np.exp2, CLOSE), "exp10": (1, lambda x: 10.0**x, CLOSE), "fabs": (1, np.abs, EXACT),
    "abs": (1, np.abs, EXACT), "floor": (1, np.floor, EXACT), "log": (1, np.log, CLOSE), "log2": (1, np.log2, CLOSE),
    "log10": (1, np.log10, CLOSE), "rint": (1, np.rint, EXACT), "trunc": (1, np.trunc, EXACT),
    "round": (1, lambda x: np.trunc(x + np.copysign(0.5, x) * (np.abs(x) < 2.0**30)), EXACT),
    "rsqrt": (1, lambda x: 1 / np.sqrt(x), CLOSE), "sin": (1, np.sin, CLOSE), "sinh": (1, np.sinh, CLOSE),
    "sqrt": (1, np.sqrt, EXACT), "tan": (1, np.tan, CLOSE), "tanh": (1, np.tanh, CLOSE),
    "sign": (1, lambda x: np.nan_to_num(np.sign(x)), EXACT),
    "saturate": (1, lambda x: fmin(fmax(x, 0.0), 1.0), EXACT),
    "atan2": (2, np.arctan2, CLOSE), "copysign": (2, np.copysign, EXACT), "divide": (2, np.divide, EXACT),
    "fdim": (2, lambda x, y: np.where(np.isnan(x) | np.isnan(y), NAN, np.where(x > y, x - y, 0.0)), EXACT),
    "fmax": (2, fmax, EXACT), "fmin": (2, fmin, EXACT), "max": (2, fmax, EXACT), "min": (2, fmin, EXACT),
    "fmod": (2, np.fmod, EXACT), "pow": (2, np.power, LOOSE), "nextafter": (2, nextafter, EXACT),
    "powr": (2, lambda x, y: np.where(x < 0, NAN, np.power(np.abs(x), y)), LOOSE),
    "step": (2, lambda edge, x: np.where(x < edge, 0.0, 1.0), EXACT),
    "fma": (3, lambda x, y, z: x * y + z, EXACT),
    "fmax3": (3, lambda x, y, z: fmax(x, fmax(y, z)), EXACT), "max3": (3, lambda x, y, z: fmax(x, fmax(y, z)), EXACT),
    "fmin3": (3, lambda x, y, z: fmin(x, fmin(y, z)), EXACT), "min3": (3, lambda x, y, z: fmin(x, fmin(y, z)), EXACT),
    "fmedian3": (3, median, EXACT), "median3": (3, median, EXACT),
    "clamp": (3, lambda x, low, high: fmin(fmax(x, low), high), EXACT),
    "mix": (3, lambda f, x, y, a: f.round(x + f.round(f.round(y - x) * a)), EXACT),
}  # fmt: skip
RELATIONS = {
    "isfinite": (1, np.isfinite), "isinf": (1, np.isinf), "isnan": (1, np.isnan), "signbit": (1, np.signbit),
    "isordered": (2, lambda x, y: ~np.isnan(x) & ~np.isnan(y)),
    "isunordered": (2, lambda x, y: np.isnan(x) | np.isnan(y)),
}  # fmt: skip


def call(name, arity, type_name, vector):
    arguments = ["x[i]", "y[i]", "z[i]"][:arity]
    if vector:  # three elements, with one number as argument
        arguments = [f"{type_name}3({a})" if n == 0 else a for n, a in enumerate(arguments)]
    return f"{name}({', '.join(arguments)})" + (".y" if vector else "")


def run_functions(type_name, functions, out_type, inputs, out_dtype, vectors=True):
    """The results of each function over the inputs, of numbers and of vectors: (functions, 2, values)."""
    count = inputs[0].numel()
    lines = [
        f"  o[{2 * n + vector} * {count} + i] = {out_type}({call(name, arity, type_name, vector and vectors)});\n"
        for n, (name, arity) in enumerate(functions)
        for vector in (0, 1)
    ]
    body = f"kernel void k(device const {type_name}* x, device const {type_name}* y, device const {type_name}* z,\n"
    body += f"  device {out_type}* o, uint i [[thread_position_in_grid]]) {{\n{''.join(lines)}}}"
    out = torch.zeros(len(functions), 2, count, dtype=out_dtype)
    compile_shader(HEADER + body, "functions.metal").k(*inputs, out, threads=count)
    return out


@pytest.fixture(scope="module", params=FLOATS, ids=lambda f: f.metal)
def floats(request):
    """A format and three arguments of it: all pairs of special values, and numbers of every size."""
    special = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 300.0, -300.0, 65504.0, 1e-7, 3e38, INF, -INF, NAN]
    generator = np.random.default_rng(0)
    x, y = (a.ravel() for a in np.meshgrid(special, special))
    numbers = generator.normal(size=(3, 768)) * np.exp2(generator.integers(-8, 6, size=(3, 768)))
    values = np.stack([np.concatenate([a, b]) for a, b in zip((x, y, np.roll(y, 7)), numbers, strict=True)])
    with np.errstate(all="ignore"):
        tensors = [torch.from_numpy(v.astype(np.float32)).to(request.param.dtype) for v in values]
    return request.param, tensors, [t.double().numpy() for t in tensors]


def result_of(f):
    """The format of a function's result; for a bfloat, which Metal converts to float, it is a float."""
    return FLOATS[0] if f.metal == "bfloat" else f


def test_functions_of_floats(floats):
    argument, tensors, values = floats
    f = result_of(argument)
    functions = [(name, arity) for name, (arity, *_) in FLOAT_FUNCTIONS.items()]
    results = run_functions(argument.metal, functions, f.metal, tensors, f.dtype, f is argument).double().numpy()
    wrong = []
    for (name, arity), (numbers, vectors) in zip(functions, results, strict=True):
        _, definition, allowed = FLOAT_FUNCTIONS[name]
        with np.errstate(all="ignore"):
            of_format = {"mix": [f], "nextafter": [argument]}.get(name, [])
            expected = f.round(definition(*of_format, *values[:arity]).astype(np.float64))
            near = np.abs(numbers - expected) <= allowed * f.ulp(expected)
            # A value that overflows in one may round to the largest number in the other.
            near |= (
                (np.abs(numbers) >= 2.0**f.highest * 0.99) & (np.abs(expected) >= 2.0**f.highest * 0.99) & (allowed > 0)
            )
        same = (numbers == expected) | (np.isnan(numbers) & np.isnan(expected)) | near
        for i in np.flatnonzero(~same)[:2]:
            arguments = [v[i] for v in values[:arity]]
            wrong.append(f"{name}({', '.join(map(str, arguments))}) is {numbers[i]}, not {expected[i]}")
        if not np.array_equal(numbers, vectors, equal_nan=True):
            wrong.append(f"{name} of vectors differs")
    assert not wrong, "\n".join(wrong)


def test_relations_and_second_results(floats):
    f, tensors, values = floats
    functions = [(name, arity) for name, (arity, _) in RELATIONS.items()]
    results = run_functions(f.metal, functions, "bool", tensors, torch.bool).numpy()
    for (name, arity), (numbers, vectors) in zip(functions, results, strict=True):
        expected = RELATIONS[name][1](*values[:arity])
        assert np.array_equal(numbers, expected) and np.array_equal(numbers, vectors), name
    t, r = f.metal, result_of(f)
    body = f"""
    kernel void k(device const {t}* x, device const {t}* y, device {r.metal}* o, uint i [[thread_position_in_grid]]) {{
      device {r.metal}* p = o + 8 * i;
      {r.metal} whole, cosine;
      int exponent;
      p[0] = modf(x[i], whole); p[1] = whole;
      p[2] = frexp(x[i], exponent); p[3] = {r.metal}(exponent);
      p[4] = sincos(x[i], cosine); p[5] = cosine;
      p[6] = ldexp(x[i], 3); p[7] = isnormal(x[i]) ? select(x[i], y[i], x[i] < y[i]) : {t}(ilogb({t}(40)));
    }}"""
    finite = np.isfinite(values[0])
    out = torch.zeros(len(finite), 8, dtype=r.dtype)
    compile_shader(HEADER + body).k(tensors[0], tensors[1], out, threads=len(finite))
    got, x, y = out.double().numpy()[finite].T, values[0][finite], values[1][finite]
    with np.errstate(all="ignore"):
        exact = [np.modf(x)[0], np.modf(x)[1], *np.frexp(x), np.sin(x), np.cos(x), r.round(x * 8)]
        normal = np.abs(x) >= 2.0 ** (f.lowest + f.digits - 1)
        exact.append(np.where(normal, np.where(x < y, y, x), 5.0))
    for row, expected in enumerate(exact):
        allowed = CLOSE * r.ulp(expected) if row in (4, 5) else 0.0
        same = (got[row] == expected) | (np.abs(got[row] - expected) <= allowed)
        assert same.all(), (row, got[row][~same][:3], expected[~same][:3])


def test_arithmetic_of_halves_rounds_after_every_operation(floats):
    f, tensors, (x, y, z) = floats
    t = f.metal
    body = f"""kernel void k(device const {t}* x, device const {t}* y, device const {t}* z, device {t}* o,
                       uint i [[thread_position_in_grid]]) {{
      device {t}* p = o + 6 * i;
      p[0] = x[i] * y[i] + z[i]; p[1] = x[i] - y[i] * 3; p[2] = (x[i] + y[i]) / z[i];
      {t} v = x[i]; v *= y[i]; v += 2; p[3] = v;
      p[4] = x[i] < y[i] ? x[i] * x[i] : 0; p[5] = -x[i] + 70000;
    }}"""
    out = torch.zeros(len(x), 6, dtype=f.dtype)
    compile_shader(HEADER + body).k(*tensors, out, threads=len(x))
    r = f.round
    with np.errstate(all="ignore"):
        expected = [
            r(r(x * y) + z), r(x - r(y * 3.0)), r(r(x + y) / z), r(r(x * y) + 2.0), np.where(x < y, r(x * x), 0.0),
            r(-x + r(np.float64(70000.0))),
        ]  # fmt: skip
    for row, (got, want) in enumerate(zip(out.double().numpy().T, expected, strict=True)):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        assert same.all(), (row, x[~same][:3], y[~same][:3], z[~same][:3], got[~same][:3], want[~same][:3])


# Integers: the definitions are over Python's


def integer_functions(bits, signed):
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    mask = (1 << bits) - 1

    def wrap(x):
        x &= mask
        return x - (1 << bits) if signed and x >> (bits - 1) else x

    def saturate(x):
        return min(max(x, low), high)

    def rotate(x, by):
        by %= bits
        return wrap((x & mask) << by | (x & mask) >> (bits - by))

    def field(x, offset, count):
        value = (x & mask) >> offset & ((1 << count) - 1)
        return value - (1 << count) if signed and count and value >> (count - 1) else value

    def insert(base, value, offset, count):
        hole = ((1 << count) - 1) << offset
        return wrap((base & ~hole) | (value << offset & hole))

    offset, count = bits // 4, bits // 2
    return {
        "abs({x})": lambda x, y, z: wrap(abs(x)),
        "absdiff({x}, {y})": lambda x, y, z: wrap(abs(x - y)),
        "addsat({x}, {y})": lambda x, y, z: saturate(x + y),
        "subsat({x}, {y})": lambda x, y, z: saturate(x - y),
        "clamp({x}, {y}, {z})": lambda x, y, z: min(max(x, y), z),
        "clz({x})": lambda x, y, z: bits - (x & mask).bit_length(),
        "ctz({x})": lambda x, y, z: ((x & -x) & mask).bit_length() - 1 if x else bits,
        f"extract_bits({{x}}, {offset}u, {count}u)": lambda x, y, z: field(x, offset, count),
        "extract_bits({x}, 0u, 0u)": lambda x, y, z: 0,
        f"insert_bits({{x}}, {{y}}, {offset}u, {count}u)": lambda x, y, z: insert(x, y, offset, count),
        "hadd({x}, {y})": lambda x, y, z: (x + y) >> 1,
        "rhadd({x}, {y})": lambda x, y, z: (x + y + 1) >> 1,
        "max({x}, {y})": lambda x, y, z: max(x, y),
        "min({x}, {y})": lambda x, y, z: min(x, y),
        "max3({x}, {y}, {z})": lambda x, y, z: max(x, y, z),
        "min3({x}, {y}, {z})": lambda x, y, z: min(x, y, z),
        "median3({x}, {y}, {z})": lambda x, y, z: sorted((x, y, z))[1],
        "mulhi({x}, {y})": lambda x, y, z: wrap(x * y >> bits),
        "madhi({x}, {y}, {z})": lambda x, y, z: wrap((x * y >> bits) + z),
        "madsat({x}, {y}, {z})": lambda x, y, z: saturate(x * y + z),
        "popcount({x})": lambda x, y, z: (x & mask).bit_count(),
        "reverse_bits({x})": lambda x, y, z: wrap(int(f"{x & mask:0{bits}b}"[::-1], 2)),
        "rotate({x}, {y})": lambda x, y, z: rotate(x, y),
        "select({x}, {y}, {condition})": lambda x, y, z: y if x < z else x,
        "({x} + {y} * {z})": lambda x, y, z: wrap(x + y * z),
        "(({x} ^ {y}) & ~{z} | {y})": lambda x, y, z: (x ^ y) & ~z | y,
    }  # fmt: skip


@pytest.mark.parametrize("type_name", INTEGERS)
def test_functions_of_integers(type_name):
    dtype = INTEGERS[type_name]
    bits, signed = dtype.itemsize * 8, dtype.is_signed
    limits = torch.iinfo(dtype)
    special = [limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 2, 3, bits, 85]
    generator = np.random.default_rng(1)
    drawn = [
        int(v)
        for v in generator.integers(
            limits.min, limits.max, size=180, dtype=np.uint64 if bits == 64 and not signed else np.int64, endpoint=True
        )
    ]
    rows = [(x, y, special[(i + j) % 10]) for i, x in enumerate(special) for j, y in enumerate(special)]
    rows += [tuple(drawn[i : i + 3]) for i in range(0, 180, 3)]
    tensors = [
        torch.tensor(np.array(column, dtype=np.uint64 if not signed else np.int64)).to(dtype)
        for column in zip(*rows, strict=True)
    ]
    functions = integer_functions(bits, signed)
    if bits == 32:
        functions["mul24({x} & 0xffff, {y} & 0xff)"] = lambda x, y, z: (x & 0xFFFF) * (y & 0xFF)
        functions["mad24({x} & 0xffff, {y} & 0xff, {z} & 7)"] = lambda x, y, z: (x & 0xFFFF) * (y & 0xFF) + (z & 7)
    lines = []
    for n, text in enumerate(functions):
        number = text.format(x="x[i]", y="y[i]", z="z[i]", condition="x[i] < z[i]")
        v = f"{type_name}3"
        vector = text.format(x=f"{v}(x[i])", y=f"{v}(y[i])", z=f"{v}(z[i])", condition=f"{v}(x[i]) < {v}(z[i])")
        lines += [
            f"o[{(2 * n + k) * len(rows)} + i] = {type_name}({e});" for k, e in enumerate((number, f"({vector}).z"))
        ]
    body = f"kernel void k(device const {type_name}* x, device const {type_name}* y, device const {type_name}* z,\n"
    body += f"device {type_name}* o, uint i [[thread_position_in_grid]]) {{\n" + "\n".join(lines) + "\n}"
    out = torch.zeros(len(functions), 2, len(rows), dtype=dtype)
    compile_shader(HEADER + body, "integers.metal").k(*tensors, out, threads=len(rows))
    results = out.numpy().tolist()
    wrong = []
    for text, definition, got in zip(functions, functions.values(), results, strict=True):
        expected = torch.tensor([definition(*row) & (1 << bits) - 1 for row in rows], dtype=torch.uint64)
        expected = expected.view(torch.int64).to(dtype).numpy().tolist() if bits < 64 else expected.view(dtype).tolist()
        for row, number, vector, want in zip(rows, *got, expected, strict=True):
            if number != want or vector != want:
                wrong.append(f"{text} of {row} is {number}, of vectors {vector}, not {want}")
                break
    assert not wrong, "\n".join(wrong)


SIMD_TYPES = {"float": torch.float32, "half": torch.float16} | {k: v for k, v in INTEGERS.items() if "long" not in k}


@pytest.mark.parametrize("type_name", SIMD_TYPES)
def test_simdgroup_and_quadgroup_functions(type_name):
    dtype = SIMD_TYPES[type_name]
    is_float = dtype.is_floating_point
    lane = np.arange(32)
    v = (lane * 7 + 3) % 11 + 1 - (4 if dtype.is_signed else 0)
    small = np.where(lane % 16 == 5, 3, 1)  # whose product stays small
    quad = lane // 4 * 4
    last = {"simd": 31, "quad": 3}
    cases = {
        "{g}_sum(v)": lambda g: g(v, np.sum), "{g}_max(v)": lambda g: g(v, np.max),
        "{g}_min(v)": lambda g: g(v, np.min),
        "{g}_product(small)": lambda g: g(small, np.prod),
        "{g}_broadcast(v, 2)": lambda g: g(v, lambda a: a[2]), "{g}_broadcast_first(v)": lambda g: g(v, lambda a: a[0]),
        "{g}_prefix_inclusive_sum(v)": lambda g: g(v, np.cumsum),
        "{g}_prefix_exclusive_sum(v)": lambda g: g(v, lambda a: np.cumsum(a) - a),
        "{g}_prefix_inclusive_product(small)": lambda g: g(small, np.cumprod),
        "{g}_prefix_exclusive_product(small)": lambda g: g(small, lambda a: np.cumprod(a) // a),
        "{g}_shuffle(v, ushort(LAST - i % (LAST + 1)))": lambda g: g(v, lambda a: a[::-1]),
        "{g}_shuffle_xor(v, 1)": lambda g: g(v, lambda a: a.reshape(-1, 2)[:, ::-1].ravel()),
        "{g}_shuffle_down(v, 1)": lambda g: g(v, lambda a: np.append(a[1:], a[-1])),
        "{g}_shuffle_up(v, 1)": lambda g: g(v, lambda a: np.append(a[0], a[:-1])),
        "{g}_shuffle_rotate_down(v, 1)": lambda g: g(v, lambda a: np.roll(a, -1)),
        "{g}_shuffle_rotate_up(v, 1)": lambda g: g(v, lambda a: np.roll(a, 1)),
        "{g}_shuffle_and_fill_down(v, small, 1)": lambda g: g(
            np.stack([v, small], 1), lambda a: np.append(a[1:, 0], a[0, 1])),
        "{g}_shuffle_and_fill_up(v, small, 1)": lambda g: g(
            np.stack([v, small], 1), lambda a: np.append(a[-1, 1], a[:-1, 0])),
    }  # fmt: skip
    if not is_float:
        cases["{g}_or(v)"] = lambda g: g(v, np.bitwise_or.reduce)
        cases["{g}_and(v)"] = lambda g: g(v, np.bitwise_and.reduce)
        cases["{g}_xor(v)"] = lambda g: g(v, np.bitwise_xor.reduce)

    def grouped(size):
        def apply(values, function):
            results = [
                np.broadcast_to(function(group), size) for group in values.reshape(32 // size, size, *values.shape[1:])
            ]
            return np.concatenate(results)

        return apply

    lines, expected = [], []
    for group, size in (("simd", 32), ("quad", 4)):
        for text, definition in cases.items():
            expected.append(definition(grouped(size)))
            code = text.format(g=group).replace("LAST", str(last[group]))
            vector = code.replace("(v", f"({type_name}2(v)").replace("(small", f"({type_name}2(small)")
            lines.append(f"o[{2 * len(lines)} * 32 + i] = {code}; o[{2 * len(lines) + 1} * 32 + i] = {vector}.y;")
    body = f"""
    kernel void k(device const {type_name}* a, device const {type_name}* b, device {type_name}* o, device uint* u,
                  uint i [[thread_position_in_grid]]) {{
      const {type_name} v = a[i], small = b[i];
      {" ".join(lines)}
      device uint* p = u + 10 * i;
      p[0] = uint(ulong(simd_ballot(i % 3 == 0)));
      p[1] = simd_any(i == 7); p[2] = simd_all(i < 32); p[3] = simd_all(i < 31);
      p[4] = simd_is_first(); p[5] = uint(ulong(simd_active_threads_mask()));
      p[6] = uint(ulong(quad_ballot(i % 3 == 0)));
      p[7] = quad_any(i % 8 == 1); p[8] = quad_all(i % 8 < 4); p[9] = quad_is_first();
    }}"""
    out, votes = torch.zeros(len(lines), 2, 32, dtype=dtype), torch.zeros(32, 10, dtype=torch.int32)
    compile_shader(HEADER + body, "simd.metal").k(
        torch.from_numpy(v).to(dtype), torch.from_numpy(small).to(dtype), out, votes, threads=32
    )
    names = [f"{group}: {text}" for group in last for text in cases]
    for name, got, want in zip(names, out, expected, strict=True):
        want = torch.from_numpy(np.ascontiguousarray(want)).to(dtype)
        assert torch.equal(got[0], want) and torch.equal(got[1], want), (name, got, want)
    third = lane % 3 == 0
    ballot = np.array([sum(1 << k for k in range(4) if third[q + k]) for q in quad])
    columns = [
        np.int64(sum(1 << int(n) for n in lane[third])),
        1,
        1,
        0,
        lane == 0,
        -1,
        ballot,
        lane % 8 < 4,
        lane % 8 < 4,
        lane % 4 == 0,
    ]
    for column, want in enumerate(columns):
        want = np.broadcast_to(want, 32).astype(np.int64).astype(np.int32)
        assert np.array_equal(votes[:, column].numpy(), want), column


def test_atomics_of_every_type():
    body = """
    template <typename T> void sums(device T* o, T x) {
      device atomic<T>* a = (device atomic<T>*)o;
      atomic_store_explicit(a, T(10), memory_order_relaxed);
      o[1] = atomic_fetch_add_explicit(a, x, memory_order_relaxed);
      o[2] = atomic_fetch_sub_explicit(a, T(1), memory_order_relaxed);
      T expected = T(0);
      o[3] = T(atomic_compare_exchange_weak_explicit(a, &expected, T(99), memory_order_relaxed, memory_order_relaxed));
      o[4] = expected;
      o[5] = T(atomic_compare_exchange_weak_explicit(a, &expected, T(50), memory_order_relaxed, memory_order_relaxed));
      o[6] = atomic_exchange_explicit(a, T(20), memory_order_relaxed);
      o[7] = atomic_load_explicit(a, memory_order_relaxed);
    }
    template <typename T> void bits(device T* o) {
      device atomic<T>* a = (device atomic<T>*)o;
      o[1] = atomic_fetch_max_explicit(a, T(30), memory_order_relaxed);
      o[2] = atomic_fetch_min_explicit(a, T(21), memory_order_relaxed);
      o[3] = atomic_fetch_or_explicit(a, T(10), memory_order_relaxed);
      o[4] = atomic_fetch_and_explicit(a, T(28), memory_order_relaxed);
      o[5] = atomic_fetch_xor_explicit(a, T(7), memory_order_relaxed);
    }
    kernel void k(device int* i, device uint* u, device float* f, device int* ib, device uint* ub,
                  device atomic_bool* b, device bool* seen, device atomic_ulong* l) {
      sums(i, 5); sums(u, 5u); sums(f, 5.5f); bits(ib); bits(ub);
      atomic_store_explicit(b, true, memory_order_relaxed);
      seen[0] = atomic_exchange_explicit(b, false, memory_order_relaxed);
      seen[1] = atomic_load_explicit(b, memory_order_relaxed);
      atomic_max_explicit(l, 1ul << 40, memory_order_relaxed);
      atomic_min_explicit(l + 1, 3ul, memory_order_relaxed);
    }"""
    sums = [torch.zeros(8, dtype=dtype) for dtype in (torch.int32, torch.uint32, torch.float32)]
    bits = [torch.tensor([20, 0, 0, 0, 0, 0], dtype=dtype) for dtype in (torch.int32, torch.uint32)]
    flag, seen = torch.zeros(1, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    longs = torch.tensor([7, 7], dtype=torch.int64)
    compile_shader(HEADER + body).k(*sums, *bits, flag, seen, longs, threads=1)
    for t, x in zip(sums, (5, 5, 5.5), strict=True):
        assert t.tolist() == [20, 10, 10 + x, 0, 9 + x, 1, 50, 20]
    for t in bits:
        assert t.tolist() == [((21 | 10) & 28) ^ 7, 20, 30, 21, 31, 28]
    assert seen.tolist() == [True, False] and not flag.item()
    assert longs.tolist() == [1 << 40, 3]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("atomic_fetch_max_explicit((device atomic_float*)o, 1.0f, memory_order_relaxed);", "type is not in Metal"),
        ("atomic_fetch_add_explicit((device atomic_ulong*)o, 1ul, memory_order_relaxed);", "type is not in Metal"),
        ("o[0] = float(simd_sum(1ul));", "numbers of up to 32 bits"),
        ("atomic_thread_fence(mem_flags::mem_device);", "fences and device scope are not supported"),
        ("o[0] = max(1, 2.0f);", "ambiguous"),
        ("o[0] = exp(1);", "ambiguous"),
        ("o[0] = float(popcount(1.0f));", "popcount"),
        ("bfloat b = 1.0f; o[0] = b;", "bfloat"),
        ("int3 v = int3(1) * 2.5f; o[0] = v.x;", "operator"),
        ("o[0] = float(exp(bfloat2(1.0bf)).x);", "exp"),
        ("o[0] = simd_shuffle(o[0] == 0, 1);", "no bool"),
        ("o[0] = pack_float_to_unorm4x8(float4(1));", "packing of normalised numbers is not supported"),
    ],
)  # fmt: skip
def test_unsupported_functions_are_named(statement, message):
    """With their line, also if a header of the emulator detects them."""
    with pytest.raises(MetalError, match=f"(?s)test.metal:4: error: [^\n]*{message}"):
        compile_shader(HEADER + f"kernel void k(device float* o) {{\n{statement} }}", "test.metal").k(torch.zeros(4))


def test_variants_are_of_single_precision():
    body = """
    kernel void k(device float* o, device const half* x, device const bfloat* b) {
      o[0] = precise::exp(x[0]); o[1] = fast::max(x[0], x[1]); o[2] = exp(x[0]); o[3] = exp(b[0]);
      int exponent; float cosine;
      o[4] = precise::frexp(x[0], exponent) * exponent; o[5] = fast::sincos(0.0f, cosine) + cosine;
      o[6] = precise::length(float2(3, 4)); o[7] = fast::distance(float3(1), float3(2, 1, 1));
      o[8] = fast::normalize(float2(0, 3)).y; o[9] = precise::pow(float4(2).xy, 3).x;
    }"""
    out, x = torch.zeros(10), torch.tensor([12.0, 3.0])
    compile_shader(HEADER + body).k(out, x.half(), torch.tensor([1.5]).bfloat16(), threads=1)
    want = [np.exp(12.0), 12, INF, np.exp(1.5), 0.75 * 4, 1, 5, 1, 1, 8]
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-6)


def test_geometric_functions_and_matrices():
    body = """
    kernel void k(device float* o, device const packed_float3* p, device const float4* q) {
      const float3 a = p[0], b = p[1];
      o[0] = length(a); o[1] = distance(a, b); o[2] = dot(a, b); o[3] = length_squared(a);
      *(device packed_float3*)(o + 4) = cross(a, b);
      *(device packed_float3*)(o + 7) = normalize(a);
      *(device packed_float3*)(o + 10) = reflect(a, normalize(b));
      float3x3 m = float3x3(a, b, float3(1, 0, 2));
      *(device packed_float3*)(o + 13) = m * a;
      *(device packed_float3*)(o + 16) = a * transpose(m);
      o[19] = determinant(m);
      float4x4 i = float4x4(2.0f);
      *(device packed_float4*)(o + 20) = (i * i + i) * q[0].wzyx;
      o[24] = (m * m)[1][2]; o[25] = smoothstep(0.0f, 4.0f, 1.0f); o[26] = fract(-1.25f);
      float4 v = q[0]; v.xz = v.zx; v.yw *= 2.0f; o[27] = v.x + 10 * v.y + 100 * v.z + 1000 * v.w;
      o[28] = all(v == v) && any(v > 3.0f) && !all(v > 3.0f); o[29] = faceforward(a, b, a).x;
      o[30] = any(v.x == v.x) && !all(v.x != v.x); o[31] = q[0].wzyx.yz.x; packed_float3 c = a; c.yz = c.zy;
      o[32] = c.y; o[33] = c.zyx.xy.y; m *= m; o[34] = (-m)[1][2]; o[35] = (m != -m) && !(m != m);
    }"""  # fmt: skip
    a, b, q = np.array([1.0, 2, -2]), np.array([3.0, 0, 4]), np.array([1.0, 2, 3, 4])
    out = torch.zeros(36)
    compile_shader(HEADER + body).k(out, torch.tensor(np.stack([a, b])).float(), torch.tensor(q).float(), threads=1)
    m = np.stack([a, b, [1.0, 0, 2]], 1)
    n = b / 5
    want = [3, np.linalg.norm(a - b), a @ b, 9, *np.cross(a, b), *(a / 3), *(a - 2 * (n @ a) * n), *(m @ a), *(m @ a)]
    want += [np.linalg.det(m), *(6 * q[::-1]), (m @ m)[2, 1], 0.15625, 0.75, 3 + 40 + 100 + 8000, 1, a[0]]
    want += [1, 3, a[2], a[2], -(m @ m)[2, 1], 1]
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-5)


def test_simdgroup_matrices_multiply():
    body = """
    kernel void k(device const float* a, device const half* b, device float* c, device half* t) {
      simdgroup_float8x8 x, sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
      simdgroup_half8x8 y;
      simdgroup_load(x, a, 16, ulong2(8, 0));
      simdgroup_load(y, b, 8, 0, true);
      simdgroup_multiply_accumulate(sum, x, y, sum);
      simdgroup_store(sum, c, 8);
      y.thread_elements()[0] *= 2.0h;
      simdgroup_store(y, t, 8, 0, true);
    }"""
    a, b = torch.randn(8, 16), torch.randn(8, 8).half()
    c, t = torch.zeros(8, 8), torch.zeros(8, 8).half()
    compile_shader(HEADER + body).k(a, b, c, t, threads=32)
    torch.testing.assert_close(c, a[:, 8:] @ b.float().T + 1)
    doubled = b.clone()
    doubled.T[:, ::2] *= 2
    assert torch.equal(t, doubled)


def test_integers_convert_to_bfloat_in_one_rounding():
    """Via float, this would round twice: up to a tie, then away from the nearest."""
    x = torch.tensor([(1 << 40) + (1 << 32) + 1, (1 << 25) + (1 << 17) + 1, -((1 << 40) + (1 << 32) + 1)])
    out = torch.zeros(3, dtype=torch.bfloat16)
    body = """
    kernel void k(device const long* x, device bfloat* o, uint i [[thread_position_in_grid]]) {
      o[i] = bfloat(x[i]);
    }"""
    compile_shader(HEADER + body).k(x, out)
    expected = [
        float(Fraction(int(v) // abs(int(v)) * ((abs(int(v)) >> k) + 1 << k)))
        for v, k in zip(x, (33, 18, 33), strict=True)
    ]
    assert out.tolist() == expected
