"""The Metal front end: parsing, errors with their lines, and the translated sources."""

import re

import pytest

from torch_fused.metal.cuda_dialect import emit_cuda
from torch_fused.metal.errors import MetalError
from torch_fused.metal.flatten import flatten
from torch_fused.metal.host_dialect import emit_host
from torch_fused.metal.lexer import tokenize
from torch_fused.metal.lint_dialect import emit_lint
from torch_fused.metal.parser import parse

HEADER = """#pragma once
inline float twice(float in_header) { return in_header + in_header; }
"""
SOURCE = """#include <metal_stdlib>
#include "common/twice.metal.h"
#include "twice.metal.h"
using namespace metal;
struct Params { uint n; float scale; };
constant uint WIDTH = 32;
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(256)]] void scale(
    device const T* x [[buffer(0)]], device T* y [[buffer(2)]], constant Params& p [[buffer(1)]],
    uint3 group [[threadgroup_position_in_grid]], ushort lane [[thread_index_in_simdgroup]]) {
  threadgroup float part[WIDTH * N], last;
  threadgroup vec<float, 4> rows[2];
  threadgroup float* in_main = part;
  y[lane] = T(twice(float(x[lane])) * 2.0 + 1.5h + in_main[0] + rows[0].x + last);
}
#define INSTANTIATE(name, T) \\
  template [[host_name("scale_" #name)]] [[kernel]] void scale<T, 4>( \\
      device const T*, device T*, constant Params&, uint3, ushort);
INSTANTIATE(f32, float)
template [[host_name("scale_f16")]] [[kernel]] decltype(scale<half, 2>) scale<half, 2>;
kernel void fill(device float* y, constant const float* values, device uint& n, uint i [[thread_position_in_grid]]) {
  if (i < n) y[i] = values[i];
}
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "op").mkdir()
    (tmp_path / "common" / "twice.metal.h").write_text(HEADER)
    (tmp_path / "op" / "scale.metal").write_text(SOURCE)
    return flatten(tmp_path / "op" / "scale.metal", [tmp_path, tmp_path / "common"])


@pytest.fixture
def program(source):
    return parse(source, "scale.metal")


def errors(text):
    with pytest.raises(MetalError) as error:
        parse(text, "bad.metal")
    return str(error.value).splitlines()


def place_of(word, text):
    """(file, line) that a compiler would report for the first `word`, by the #line directives above it."""
    file, number = "", 0
    for line in text.splitlines():
        directive = re.match(r'#line (\d+) "(.*)"', line)
        if directive:
            file, number = directive[2], int(directive[1]) - 1
        elif re.search(rf"\b{word}\b", line):
            return file, number
        number += not directive or 0
        if directive:
            number += 1
    raise AssertionError(f"{word} not found")


# flatten


def test_flatten_inlines_a_header_once_and_keeps_apples_headers(source):
    assert source.count("inline float twice") == 1
    assert "#include <metal_stdlib>" in source
    assert '#include "' not in source and "#pragma once" not in source


def test_flatten_names_the_missing_header(tmp_path):
    (tmp_path / "a.metal").write_text('\n#include "nowhere.metal.h"\n')
    with pytest.raises(MetalError, match=r'^a\.metal:2: error: no file "nowhere\.metal\.h" to include$'):
        parse(flatten(tmp_path / "a.metal"))
    (tmp_path / "a.metal").write_text('#if 0\n#include "nowhere.metal.h"\n#endif\n')
    assert parse(flatten(tmp_path / "a.metal")).kernels == []


def test_our_own_sources_are_ascii_comments_included(tmp_path):
    (tmp_path / "h.metal.h").write_text("// one\n// caf\u00e9\n", encoding="utf-8")
    (tmp_path / "a.metal").write_text('#include "h.metal.h"\n')
    with pytest.raises(MetalError, match=r"^h\.metal\.h:2: error: non-ASCII character"):
        parse(flatten(tmp_path / "a.metal"), own=True)
    assert parse(flatten(tmp_path / "a.metal")).kernels == []


# parse


def test_kernels_are_the_instantiations_and_the_plain_functions(program):
    found = {k.name: (k.function, k.template_args, k.max_threads, k.line) for k in program.kernels}
    assert found == {
        "scale_f32": ("scale", "<float, 4>", 256, 19),
        "scale_f16": ("scale", "<half, 2>", 256, 20),
        "fill": ("fill", "", None, 21),
    }


def test_buffers_have_their_index_and_address_space(program):
    buffers = {k.name: [(b.name, b.index, b.address_space, b.is_pointer) for b in k.buffers] for k in program.kernels}
    assert buffers["scale_f32"] == [
        ("x", 0, "device", True),
        ("p", 1, "constant", False),
        ("y", 2, "device", True),
    ]
    assert [(name, index) for name, index, *_ in buffers["fill"]] == [("y", 0), ("values", 1), ("n", 2)]


def test_buffers_without_an_index_get_free_ones():
    program = parse("kernel void k(device float* a, device float* b [[buffer(0)]], device float* c) {}")
    assert [p.index for p in program.kernels[0].params] == [1, 0, 2]


def test_only_threadgroup_variables_are_found(program):
    assert [(v.type, v.declarators) for v in program.threadgroup_variables] == [
        ("float", (("part", "[WIDTH * N]"), ("last", ""))),
        ("vec<float, 4>", (("rows", "[2]"),)),
    ]


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        ("1.0", ("1.0", "")),
        (".5e-3F", (".5e-3", "f")),
        ("2h", ("2.0", "h")),
        ("1.5bf", ("1.5", "bf")),
        ("0x1p-3f", ("0x1p-3", "f")),
        ("12u", None),
        ("0xffffffffu", None),
        ("0xdeadbeef", None),
    ],
)
def test_floating_point_literals_are_distinguished_from_integers(text, literal):
    assert tokenize(text)[0].float_literal() == literal


KERNEL = "kernel void k(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]])"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nfloat f(double x);", "2: error: type 'double' is not supported in Metal"),
        (KERNEL + " {\n  goto end; end: ; }", "2: error: goto is not supported in Metal"),
        (KERNEL + " {\n\n  x[i] = std::max(x[i], 0.0f); }", "3: error: the C++ standard library is not available"),
        (KERNEL + " {\n  float* p = new float; }", "2: error: operator new"),
        ("struct S { virtual void f(); };", "1: error: virtual functions"),
        (KERNEL + " { try { } catch (...) { } }", "1: error: exceptions"),
        (
            KERNEL + " {\n  atomic_thread_fence(mem_flags::mem_device); }",
            "2: error: fences and device scope are not supported",
        ),
        (KERNEL + " {\n  f(memory_order_seq_cst); }", "2: error: fences and device scope are not supported"),
        ("constant bool flag [[function_constant(N)]];", "1: error: function_constant must be an integer, got 'N'"),
        ("kernel void k(texture2d<float> t [[texture(0)]]) {}", "1: error: textures and samplers are not supported"),
        ("vertex float4 v(uint i [[vertex_id]]) { return 0; }", "1: error: vertex functions are not supported"),
        ("#include <metal_logging>", "1: error: <metal_logging> is not supported"),
        (
            "kernel void k(\n uint n [[buffer(2)]]) {}",
            "2: error: kernel argument 'n' with [[buffer]] must be a pointer",
        ),
        (
            "int f(device int* x) { return 1; }\nint f(constant int* x) { return 2; }\n"
            "int f(threadgroup int* x) { return 3; }",
            "3: error: 'f' differs from the one in line 1 in address spaces only, and in what it does",
        ),
        ("kernel void k(device float* x [[buffer(31)]]) {}", "1: error: buffer index of 'x' must be 0 to 30, got 31"),
        (
            "kernel void k(device float* x [[buffer(N)]]) {}",
            "1: error: buffer index of 'x' must be an integer, got 'N'",
        ),
        (
            "kernel void k(device int* x [[buffer(1)]],\n device int* y [[buffer(1)]]) {}",
            "2: error: [[buffer(1)]] is used",
        ),
        ("kernel void k(float* x [[buffer(0)]]) {}", "1: error: kernel argument 'x' must point to device or constant"),
        (
            "kernel void k(thread float* x) {}",
            "1: error: kernel argument 'x' must point to device or constant memory, not",
        ),
        ("kernel void k(uint i) {}", "1: error: kernel argument 'i' needs an attribute"),
        (
            "kernel void k(\n uint i [[thread_position_in_gird]]) {}",
            "2: error: unknown attribute [[thread_position_in_gird]]",
        ),
        ("struct A { device float* x [[id(0)]]; };", "1: error: argument buffers ([[id]]) are not supported"),
        ("kernel int k() { return 0; }", "1: error: a kernel must return void"),
        (KERNEL + ";", "1: error: kernel 'k' is declared without a body"),
        (KERNEL + " {}\n" + KERNEL + " {}", "2: error: kernel 'k' is defined twice"),
        (
            'template [[host_name("a")]] [[kernel]] void f<float>(device float*);',
            "1: error: instantiation of unknown kernel",
        ),
        (
            "[[kernel, max_total_threads_per_threadgroup(2048)]] void k() {}",
            "1: error: max_total_threads_per_threadgroup",
        ),
        ("threadgroup float a[4];", "1: error: threadgroup variables can only be declared in a kernel"),
        (KERNEL + " {\n  x[i] = 1.0l; }", "2: error: literal 1.0l: Metal's floating-point suffixes are f, h and bf"),
        ("\nkernel void k(device float* x", "2: error: '(' is never closed"),
        ("// caf\u00e9\nint caf\u00e9;", "2: error: non-ASCII character"),
        ('\n#include "other.metal.h"', "2: error: "),
        ("#if 1\n", "1: error: "),
    ],
)
def test_forbidden_words_are_errors_on_their_line(text, message):
    assert errors(text)[0].startswith("bad.metal:" + message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel void k(device atomic_float* x) {}", "1: error: float atomics"),
        ("kernel void k(device atomic<ulong>* x) {}", "1: error: 64-bit atomics"),
    ],
)
def test_rules_for_our_own_kernels(text, message):
    assert len(parse(text, "bad.metal").kernels) == 1
    with pytest.raises(MetalError, match=f"^bad.metal:{message}"):
        parse(text, "bad.metal", own=True)


def test_all_errors_are_reported_at_once():
    text = KERNEL + " {\n  double a;\n  goto b;\n}"
    assert [line.split(":")[1] for line in errors(text)] == ["2", "3"]


# emit


@pytest.mark.parametrize("emit", [emit_host, emit_cuda, emit_lint])
@pytest.mark.parametrize(
    ("word", "place"),
    [("in_header", ("twice.metal.h", 2)), ("WIDTH", ("scale.metal", 6)), ("in_main", ("scale.metal", 13))],
)
def test_every_dialect_keeps_lines(program, emit, word, place):
    assert place_of(word, emit(program)) == place


def test_host_entries_have_the_index_of_each_argument(program):
    host = emit_host(program)
    assert '\n#include "metal_stdlib"\n' in host
    assert (
        "void msl_k_scale_f32(const msl_args* a) { msl_bind::call<0, 2, 1, 1003, 1008>(&scale<float, 4>, *a); }" in host
    )
    assert "void msl_k_fill(const msl_args* a) { msl_bind::call<0, 1, 2, 1000>(&fill, *a); }" in host


def test_host_has_plain_cpp_instead_of_metal(program):
    host = emit_host(program)
    assert "MSL_TG_VAR(0, 11, part, float, [WIDTH * N]); MSL_TG_VAR(1, 11, last, float, )" in host
    assert "using msl_type_2 = vec<float, 4>; MSL_TG_VAR(2, 12, rows, msl_type_2, [2])" in host
    assert "2.0f + half(1.5f)" in host
    assert "const uint WIDTH = 32;" in host
    assert not re.search(r"\b(device|constant|threadgroup|kernel|template \[\[|const\s+const)\b", host)


def test_cuda_parameters_are_the_buffers_in_order_and_references_to_constants_by_value(program):
    cuda = emit_cuda(program)
    entry = next(line for line in cuda.splitlines() if " scale_f32(" in line)
    assert entry.startswith('extern "C" __global__ void __launch_bounds__(256) scale_f32(')
    assert re.findall(r"b\d\b", entry) == ["b0", "b1", "b2", "b0", "b2", "b1"]  # declared in order, passed as written
    assert "const __grid_constant__ msl_cuda::referred<decltype(&metal::scale<float, 4>), 2> b1," in entry
    assert "msl_cuda::builtin<3, " in entry and "msl_cuda::builtin<8, " in entry
    fill = next(line for line in cuda.splitlines() if " fill(" in line and "extern" in line)
    assert "__launch_bounds__(1024)" in fill and "* b2)" in fill and "(b0, b1, *b2," in fill


def test_cuda_includes_nothing(program):
    cuda = emit_cuda(program)
    assert "#include" not in cuda and "#pragma once" not in cuda


def test_unroll_survives_translation():
    text = KERNEL + " {\n#pragma unroll\n  for (int j = 0; j < 4; j++) x[j] = 0.0f;\n}"
    assert "\n#pragma unroll\n" in emit_host(parse(text)) and "\n#pragma unroll\n" in emit_cuda(parse(text))
