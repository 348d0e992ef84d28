"""Generated kernels with arithmetic of all types, against numpy: all results must have the same bits."""

import random

import numpy as np
import pytest
import torch

from torch_fused.metal import compile_shader, emulate

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
INTEGERS = {
    "char": np.int8, "uchar": np.uint8, "short": np.int16, "ushort": np.uint16,
    "int": np.int32, "uint": np.uint32, "long": np.int64, "ulong": np.uint64,
}  # fmt: skip
TORCH = {
    "char": torch.int8, "uchar": torch.uint8, "short": torch.int16, "ushort": torch.uint16, "int": torch.int32,
    "uint": torch.uint32, "long": torch.int64, "ulong": torch.uint64, "float": torch.float32, "half": torch.float16,
    "bfloat": torch.bfloat16,
}  # fmt: skip
FLOATS = ("float", "half", "bfloat")
RANKS = ("int", "uint", "long", "ulong")  # of what arithmetic makes of integers
VALUES = 24


def to_bfloat(x):
    """Rounds to 8 bits; the values are kept as float32."""
    with np.errstate(all="ignore"):
        wide = np.asarray(x).astype(np.longdouble)
        unit = np.ldexp(np.longdouble(1), np.maximum(np.frexp(wide)[1] - 8, -133))
        rounded = np.where(np.isfinite(wide), np.rint(wide / unit) * unit, wide)
        return rounded.astype(np.float32)


def convert(x, source, target):
    """A conversion that both define: numbers to floats, and integers to integers."""
    with np.errstate(all="ignore"):
        if target == "bfloat":
            return x if source == "bfloat" else to_bfloat(x)
        if target == "half":
            return x.astype(np.float16)
        return x.astype(np.float32 if target == "float" else INTEGERS[target])


def common(a, b):
    """The type of arithmetic on two scalars, or None if Metal has none."""
    if a in FLOATS or b in FLOATS:
        floats = {t for t in (a, b) if t in FLOATS}
        return None if floats == {"half", "bfloat"} else "float" if "float" in floats else floats.pop()
    return max((t if t in RANKS else "int" for t in (a, b)), key=RANKS.index)


def arithmetic(operator, a, b, type_name):
    with np.errstate(all="ignore"):
        result = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}[operator](a, b)
    return to_bfloat(result) if type_name == "bfloat" else result


def quotient(a, b):
    """Division towards zero, as in C; the operands do not overflow."""
    return ((a - np.fmod(a, b)) // b).astype(a.dtype)


class Generator:
    """Draws an expression of scalars as (text, type, values); inputs are named after their types."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        numbers = np.random.default_rng(seed)
        self.inputs = {}
        for name, dtype in INTEGERS.items():
            limits = np.iinfo(dtype)
            drawn = numbers.integers(limits.min, limits.max, VALUES, dtype=dtype, endpoint=True)
            self.inputs[name] = np.where(numbers.random(VALUES) < 0.3, numbers.integers(0, 5, VALUES), drawn).astype(
                dtype
            )
        drawn = (numbers.normal(size=VALUES) * np.exp2(numbers.integers(-4, 12, VALUES))).astype(np.float32)
        self.inputs["float"], self.inputs["half"] = drawn, drawn.astype(np.float16)
        self.inputs["bfloat"] = to_bfloat(drawn)

    def expression(self, depth):
        if depth == 0 or self.random.random() < 0.15:
            name = self.random.choice(list(self.inputs))
            return f"{name}_in[i]", name, self.inputs[name]
        make = self.random.choice(
            [self.binary, self.binary, self.bits, self.shift, self.choice, self.function, self.cast, self.divide]
        )
        return make(depth - 1)

    def operands(self, depth):
        while True:
            a, b = self.expression(depth), self.expression(depth)
            if type_name := common(a[1], b[1]):
                return a, b, type_name, convert(a[2], a[1], type_name), convert(b[2], b[1], type_name)

    def integer(self, depth):
        text, name, values = self.expression(depth)
        if name in FLOATS:
            name = self.random.choice(list(INTEGERS))
            return f"{name}_in[i]", name, self.inputs[name]
        return text, name, values

    def binary(self, depth):
        a, b, name, x, y = self.operands(depth)
        operator = self.random.choice("+-*" if name not in FLOATS else "+-*/")
        return f"({a[0]} {operator} {b[0]})", name, arithmetic(operator, x, y, name)

    def divide(self, depth):
        a, b = self.integer(depth), self.integer(depth)
        name = common(a[1], b[1])
        x, y = convert(a[2], a[1], name), convert(b[2], b[1], name)
        one = np.array(1, y.dtype)
        divisor = np.maximum(y & np.array(0x7FFF, y.dtype), one)
        text = f"max({name}({b[0]}) & {name}(0x7fff), {name}(1))"
        if self.random.random() < 0.5:
            return f"({a[0]} / {text})", name, quotient(x, divisor)
        return f"({a[0]} % {text})", name, np.fmod(x, divisor)

    def bits(self, depth):
        a, b = self.integer(depth), self.integer(depth)
        name = common(a[1], b[1])
        operator = self.random.choice("&|^")
        function = {"&": np.bitwise_and, "|": np.bitwise_or, "^": np.bitwise_xor}[operator]
        return f"({a[0]} {operator} {b[0]})", name, function(convert(a[2], a[1], name), convert(b[2], b[1], name))

    def shift(self, depth):
        text, name, values = self.integer(depth)
        name = name if name in RANKS else "int"
        values = values.astype(INTEGERS[name])
        by, _, counts = self.integer(0)
        counts = counts.astype(np.int64) & (8 * values.dtype.itemsize - 1)  # as in Metal
        operator, function = self.random.choice([("<<", np.left_shift), (">>", np.right_shift)])
        return f"({text} {operator} {by})", name, function(values, counts.astype(values.dtype))

    def choice(self, depth):
        a, b, _, x, y = self.operands(depth)
        c, d, name, u, v = self.operands(depth)
        if "bfloat" in (c[1], d[1]) and c[1] != d[1]:  # not every compiler supports the mixture
            return a
        operator, function = self.random.choice([("<", np.less), (">=", np.greater_equal), ("==", np.equal)])
        return f"({a[0]} {operator} {b[0]} ? {c[0]} : {d[0]})", name, np.where(function(x, y), u, v)

    def function(self, depth):
        a, b, name, x, y = self.operands(depth)
        text = f"{name}({a[0]}), {name}({b[0]})"
        name_of, function = self.random.choice([("max", np.fmax), ("min", np.fmin)])
        result = (
            "float" if name == "bfloat" else name
        )  # bfloats convert to it, because Metal has no such function for them
        return f"{name_of}({text})", result, function(x, y)

    def cast(self, depth):
        text, name, values = self.expression(depth)
        targets = FLOATS if name in FLOATS else (*FLOATS, *INTEGERS)
        target = self.random.choice(targets)
        return f"{target}({text})", target, convert(values, name, target)

    def vector(self, depth, name):
        """An expression of four elements without promotion or mixed types."""
        if depth == 0 or self.random.random() < 0.15:
            shift = self.random.randrange(4)
            swizzle = "".join("xyzw"[(k + shift) % 4] for k in range(4))
            rows = self.inputs[name].reshape(-1, 4)
            return f"{name}_vector[i / 4].{swizzle}", np.roll(rows, -shift, 1)
        a, x = self.vector(depth - 1, name)
        b, y = self.vector(depth - 1, name)
        operator = self.random.choice("+-*" if name not in FLOATS else "+-*/")
        return f"({a} {operator} {b})", arithmetic(operator, x, y, name)


def kernels(count, seed):
    """The source of `count` kernels, their names, result types and expected results."""
    generator = Generator(seed)
    parameters = ", ".join(f"device const {name}* {name}_in" for name in generator.inputs)
    text, expected = [HEADER], []
    for n in range(count):
        if n % 5 == 4:
            name = generator.random.choice(list(generator.inputs))
            expression, values = generator.vector(3, name)
            vector = f"device const {name}4* {name}_vector = (device const {name}4*){name}_in; "
            body, values = f"{vector}o[i] = {name}4({expression})[i % 4];", values.ravel()
        else:
            expression, name, values = generator.expression(3)
            body = f"o[i] = {expression};"
        text.append(
            f"kernel void k{n}({parameters}, device {name}* o, uint i [[thread_position_in_grid]]) {{ {body} }}\n"
        )
        expected.append((f"k{n}", name, expression, values))
    return "".join(text), generator.inputs, expected


def as_tensor(name, values):
    dtype = TORCH[name]
    return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)


def check(count, seed):
    text, inputs, expected = kernels(count, seed)
    library = compile_shader(text, "fuzz.metal")
    tensors = [as_tensor(name, values) for name, values in inputs.items()]
    for kernel, name, expression, values in expected:
        out = torch.zeros(VALUES, dtype=TORCH[name])
        getattr(library, kernel)(*tensors, out, threads=VALUES)
        want = as_tensor(name, values)
        same = out.view(torch.uint8).view(VALUES, -1) == want.view(torch.uint8).view(VALUES, -1)
        wrong = [i for i in range(VALUES) if not same[i].all() and not (out[i] == want[i] == 0)]
        if name in FLOATS:
            wrong = [i for i in wrong if not (out[i].isnan() and want[i].isnan())]
        assert not wrong, (
            f"seed {seed}: {expression} is {out[wrong[0]]}, not {want[wrong[0]]}, of "
            f"{ {name: values[wrong[0]] for name, values in inputs.items()} }"
        )


def test_generated_kernels_give_numpys_results():
    check(100, seed=0)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 41))
def test_ten_thousand_generated_kernels(seed):
    with emulate(checked=False):
        check(250, seed)
