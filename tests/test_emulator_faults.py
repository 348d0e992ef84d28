"""Kernels that would crash the process: each raises a Python exception that names kernel, thread and line."""

import json
import subprocess
import sys

import pytest

from torch_fused.metal import MetalError
from torch_fused.metal.host import compile_host

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
INDEX = "uint i [[thread_position_in_grid]]"
# The kernel's source, the tensors' sizes, and the message after the kernel's name. // BUG marks the line.
FAULTS = {
    "division by zero": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = 7 / o[i];  // BUG\n}}",
        [4],
        "integer division by zero, by thread 0 of threadgroup 0",
    ),
    "remainder by zero": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = 7 % o[i];  // BUG\n}}",
        [4],
        "integer division by zero, by thread 0",
    ),
    "unsigned division by zero": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = 7u / uint(o[i]);  // BUG\n}}",
        [4],
        "integer division by zero",
    ),
    "long remainder by zero": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = int(7l % long(o[i]));  // BUG\n}}",
        [4],
        "integer division by zero",
    ),
    "vector division by zero": (
        f"kernel void k(device int4* o, {INDEX}) {{\n  if (i == 0) o[i] = o[i] / o[i];  // BUG\n}}",
        [4],
        "integer division by zero, by thread 0",
    ),
    "compound division by zero": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] /= 0;  // BUG\n}}",
        [4],
        "integer division by zero, by thread 0",
    ),
    "the smallest number by -1": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = (o[i] + INT_MIN) / (o[i] - 1);  // BUG\n}}",
        [4],
        "integer division out of range",
    ),
    "its remainder": (
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = (o[i] + INT_MIN) % (o[i] - 1);  // BUG\n}}",
        [4],
        "integer division out of range",
    ),
    "element 0 of nothing": (
        f"kernel void k(device int* o, device int* x, {INDEX}) {{\n  o[i] = x[0];  // BUG\n}}",
        [4, 0],
        "out-of-bounds device read of 4 bytes",
    ),
    "a reference to nothing": (
        f"kernel void k(device int* o, device int& x, {INDEX}) {{\n  o[i] = x;\n}}",
        [4, 0],
        "buffer 1 has 0 bytes",
    ),
    "large thread memory": (
        f"kernel void k(device int* o, {INDEX}) {{  // BUG\n  int a[500000];  // BUG\n"
        "  for (int j = 0; j < 500000; j++) a[j] = int(i) + j;  // BUG\n  o[i] = a[o[i]];  // BUG\n}",
        [4],
        "no memory is left for thread variables",
    ),
    "endless recursion": (
        f"int deeper(int x) {{  // BUG\n  return x + deeper(x * 3 + 1);  // BUG\n}}\n"
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = deeper(o[i]);\n}}",
        [4],
        "no memory is left for thread variables",
    ),
    "endless tail recursion": (
        f"int deeper(int x) {{  // BUG\n  return deeper(x * 3 + 1);  // BUG\n}}\n"
        f"kernel void k(device int* o, {INDEX}) {{\n  o[i] = deeper(o[i]);\n}}",
        [4],
        "no memory is left for thread variables",
    ),
    "past a thread's array": (
        f"kernel void k(device int* o, {INDEX}) {{\n  int a[4] = {{}};\n"
        "  for (int j = 0; j <= 4 + o[i]; j++) a[j] = j;  // BUG\n  o[i] = a[1];\n}",
        [4],
        "out-of-bounds index of an array",
    ),
    "a wild pointer": (
        f"kernel void k(device int* o, {INDEX}) {{\n  device int* p = (device int*)(ulong(o[i]) + 64);\n"
        "  *p = 1;  // BUG\n}",
        [4],
        "out-of-bounds device write",
    ),
    "an array of arguments as long as Metal's": ("kernel void k(device int* o) { o[0] = 1; }", [1] * 40, "40 buffers"),
    "a grid without end": ("kernel void k(device int* o) { o[0] = 1; }", [1], "the grid has more than"),
}
UNCHECKED = {
    "division by zero": "integer division by zero",
    "the smallest number by -1": "integer division out of range",
    "element 0 of nothing": "access to no buffer's memory",
    "large thread memory": "no memory is left for thread variables",
    "endless recursion": "no memory is left for thread variables",
    "a wild pointer": "access to no buffer's memory",
}
CHILD = """
import json, sys, torch
from torch_fused.metal import compile_shader, emulate
for name, checked, text, sizes, threads in json.load(sys.stdin):
    tensors = [torch.zeros(size, dtype=torch.int32) for size in sizes]
    try:
        with emulate(checked=checked):
            compile_shader(text, "test.metal").k(*tensors, threads=threads, group_size=[1] * len(threads))
        message = "no exception"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    print(json.dumps([name, checked, message]), flush=True)
"""


@pytest.fixture(scope="module")
def messages():
    """The messages of a separate process for each fault; the process survives them all."""
    cases = [
        (name, checked, HEADER + FAULTS[name][0], FAULTS[name][1], [1 << 31] * 3 if "grid" in name else [4])
        for checked, names in ((True, FAULTS), (False, UNCHECKED))
        for name in names
    ]
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(cases), capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return {(name, checked): message for name, checked, message in map(json.loads, child.stdout.splitlines())}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_an_exception(messages, name):
    text, _, expected = FAULTS[name]
    message = messages[name, True]
    assert message.startswith(f"RuntimeError: torch_fused emulator: k: {expected}"), message
    lines = [number for number, line in enumerate((HEADER + text).split("\n"), 1) if "// BUG" in line]
    assert not lines or any(f"[test.metal:{number}]" in message for number in lines), message


@pytest.mark.parametrize("checked", [True, False])
def test_an_initialiser_is_computed_apart(checked):
    """It runs when the library is loaded, where no fault can be caught."""
    kernel = "kernel void k(device float4* o) {{ o[0] = value; }}"
    good = HEADER + "constant float4 value = float4(1, 2, 3, 4) * 2;\n" + kernel.format()
    bad = HEADER + "constant int zero = 0;\nconstant float4 value = float4(1 / zero);\n" + kernel.format()
    compile_host(good, "test.metal", checked)
    with pytest.raises(MetalError, match="the initialiser of a constant has no value"):
        compile_host(bad, "test.metal", checked)


@pytest.mark.parametrize("name", UNCHECKED)
def test_a_fault_is_an_exception_without_checks(messages, name):
    message = messages[name, False]
    assert message.startswith(f"RuntimeError: torch_fused emulator: k: {UNCHECKED[name]}"), message
