"""The Metal lint: it reports errors that Apple's compiler would reject, with lines, and accepts good kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

from torch_fused.metal import lint as metal_lint
from torch_fused.metal.errors import MetalError
from torch_fused.metal.flatten import flatten
from torch_fused.metal.lint import lint

ROOT = Path(__file__).parents[1]

ROW_SUM = """#include <metal_stdlib>
using namespace metal;
struct Params { uint cols; float eps; };
template <typename T>
struct Row { device const T* data; constant Params* params; };

inline float row_sum(float v, threadgroup float* scratch, uint lane, uint simdgroup, uint simdgroups) {
  v = simd_sum(v);
  if (lane == 0) scratch[simdgroup] = v;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return simd_sum(lane < simdgroups ? scratch[lane] : 0.0f);
}
inline void scale(thread float4& v, float by) { v *= by; }

template <typename T>
[[kernel]] void normalise(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], constant Params& p [[buffer(2)]],
                          uint row [[threadgroup_position_in_grid]], uint tid [[thread_position_in_threadgroup]],
                          uint threads [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                          uint simdgroup [[simdgroup_index_in_threadgroup]],
                          uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float scratch[32];
  threadgroup atomic_uint count;
  using T4 = vec<T, 4>;
  const Row<T> in = {x + size_t(row) * p.cols, &p};
  device T* out = y + size_t(row) * p.cols;
  float sum = 0.0f;
  for (uint i = tid; i < p.cols / 4; i += threads) {
    float4 v = float4(((device const T4*)in.data)[i]);
    scale(v, 2.0f);
    sum += dot(v, v);
  }
  if (tid == 0) atomic_store_explicit(&count, 0u, memory_order_relaxed);
  const float factor = metal::precise::rsqrt(row_sum(sum, scratch, lane, simdgroup, simdgroups) + in.params->eps);
  for (uint i = tid; i < p.cols / 4; i += threads) {
    *(device T4*)(out + 4 * i) = T4(float4(*(device const T4*)(in.data + 4 * i)) * factor);
  }
}
#define INSTANTIATE(name, T) \\
  template [[host_name("normalise_" #name)]] [[kernel]] void normalise<T>( \\
      device const T*, device T*, constant Params&, uint, uint, uint, uint, uint, uint);
INSTANTIATE(f32, float)
INSTANTIATE(f16, half)
INSTANTIATE(bf16, bfloat)
"""


NO_SPACE = "pointer or reference without an address space"
NO_SIMD_SUM = "no matching function for call to 'simd_sum'"


def line_of(part):
    return next(n for n, line in enumerate(ROW_SUM.splitlines(), 1) if part in line)


def test_a_good_kernel_is_clean():
    assert lint(ROW_SUM, "good.metal") == []


def test_a_vector_as_template_argument_is_not_a_constructor():
    cast = "in.data + 4 * i)) * factor"
    assert cast in ROW_SUM
    text = ROW_SUM.replace(cast, "in.data + 4 * i)) * as_type<vec<float, 4>>(uint4(1u, 2u, 3u, 4u))")
    assert lint(text, "good.metal") == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threadgroup float* scratch, uint lane", "float* scratch, uint lane", NO_SPACE),
        ("row_sum(sum, scratch,", "row_sum(sum, out,", "no matching function for call to 'row_sum'"),
        ("((device const T4*)in.data)", "((const T4*)in.data)", NO_SPACE),
        ("((device const T4*)in.data)", "((threadgroup const T4*)in.data)", "mismatching address spaces"),
        ("device T* out", "T* out", NO_SPACE),
        ("float sum = 0.0f;", "p.eps = 1.0f; float sum = 0.0f;", "read-only variable is not assignable"),
        ("thread float4& v", "float4& v", NO_SPACE),
        ("constant Params* params; }", "Params* params; }", NO_SPACE),
        ("    scale(v, 2.0f);", "    scale(*(device float4*)y, 2.0f);", "no matching function for call to 'scale'"),
        ("scale(v, 2.0f)", "scale(v, 2.0)", "literal 2.0 has no suffix: write 2.0f"),
        ("float sum = 0.0f;", "double sum = 0.0f;", "type 'double' is not supported in Metal"),
    ],
)
def test_an_error_is_reported_on_its_line(old, new, message):
    assert ROW_SUM.count(old) == 1
    found = lint(ROW_SUM.replace(old, new), "bad.metal")
    assert any(error.startswith(f"bad.metal:{line_of(old)}: error: ") and message in error for error in found), found


BODY = "kernel void k(device float* x, constant uint& n, uint i [[thread_position_in_grid]])\n"


def lint_lines(code):
    return lint("#include <metal_stdlib>\nusing namespace metal;\n" + code, "bad.metal")


@pytest.mark.parametrize(
    ("before", "body", "line", "message"),
    [
        ("", "{ x[i] = max(1, n); }", 4, "call to 'max' is ambiguous"),
        ("", "{ x[i] = exp(n); }", 4, "call to 'exp' is ambiguous"),
        ("", "{ x[i] = float4(1.0f).q; }", 4, "illegal vector component name 'q'"),
        ("", "{ x[i] = float4(1.0f, 2.0f).x; }", 4, "no matching function"),
        ("", "{ half4 h = half4(1.0h); half4 g = h * x[i]; x[i] = g.x; }", 4, "greater rank"),
        ("", "{ half4 h = half4(1.0h); float4 g = h; x[i] = g.x; }", 4, "cannot initialize"),
        ("", "{ bfloat b = bfloat(x[i]); x[i] = float(simd_sum(b)); }", 4, NO_SIMD_SUM),
        ("", "{ x[i] = float(simd_sum(ulong(n))); }", 4, NO_SIMD_SUM),
        ("struct P { float a; };\n", "{ P p = {x[i]}; x[i] = simd_sum(p).a; }", 5, NO_SIMD_SUM),
        ("", "{ float a[n]; x[i] = a[0]; }", 4, "array size is not a constant expression"),
        ("float g = 1.0f;\n", "{ x[i] = g; }", 3, "'g' must be in the constant address space"),
        ("", "{ static int c = 0; x[i] = c; }", 4, "'c' must be in the constant address space"),
        ("", "{ auto f = [](float a) { return a; }; x[i] = f(1.0f); }", 4, "lambda expressions are not supported"),
        ("float f(float a) { return a; }\n", "{ float (*p)(float) = f; x[i] = p(1.0f); }", 5, "pointers to functions"),
        (
            "",
            "{ atomic_uint a; atomic_fetch_add_explicit(&a, 1u, memory_order_relaxed); x[i] = 1; }",
            4,
            "no matching function for call to 'atomic_fetch_add_explicit'",
        ),
        (
            "inline float f(float a) { return a > 2.0f ? f(a - 1.0f) : a; }\n",
            "{ x[i] = f(x[i]); }",
            3,
            "recursive call of 'f'",
        ),
        (
            "template <class T> T g(T a);\n"
            "template <class T> T f(T a) { if (a > T(2)) return g(a - T(1)); return a; }\n"
            "template <class T> T g(T a) { return f<T>(a); }\n",
            "{ x[i] = f(x[i]); }",
            4,
            "recursive call of 'f'",
        ),
        ("struct A { virtual void f() {} };\n", "{ x[i] = 1; }", 3, "virtual functions are not supported"),
        ("", "{ if (n == 0) throw 1; x[i] = 1; }", 4, "exceptions are not supported"),
    ],
)
def test_what_metal_lacks_is_reported_on_its_line(before, body, line, message):
    found = lint_lines(before + BODY + body)
    assert any(error.startswith(f"bad.metal:{line}: error: ") and message in error for error in found), found


def test_an_instantiation_must_match_its_template():
    template = "template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) { x[0] = T(0); }\n"
    found = lint_lines(template + 'template [[host_name("k_f32")]] [[kernel]] void k<float>(constant float*);')
    assert found and found[0].startswith("bad.metal:4: error: explicit instantiation")


def test_overloads_that_call_one_another_are_not_recursion():
    overloads = "inline float f(float a) { return a; }\ninline float2 f(float2 a) { return float2(f(a.x), f(a.y)); }\n"
    assert lint_lines(overloads + BODY + "{ x[i] = f(float2(x[i])).x; }") == []


def test_messages_use_metals_words():
    found = lint_lines(BODY + "{ threadgroup float* p = (threadgroup float*)x; x[i] = p[0]; }")
    assert "threadgroup float *" in found[0] and "__" not in found[0]


def test_a_missing_clang_says_what_to_install(monkeypatch):
    monkeypatch.setattr(metal_lint, "CLANG", "clang-of-nowhere")
    with pytest.raises(MetalError, match="the lint needs clang-of-nowhere: apt-get install"):
        lint(ROW_SUM)


def test_the_command_needs_no_torch_and_finds_headers(tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "op").mkdir()
    (tmp_path / "common" / "f.metal.h").write_text("inline float f(float a) {\n  return a * 2.0;\n}\n")
    (tmp_path / "op" / "op.metal").write_text(
        '#include <metal_stdlib>\n#include "common/f.metal.h"\nkernel void k(device float* x) { x[0] = f(x[0]); }\n'
    )
    result = subprocess.run(
        [sys.executable, "-m", "metal.lint", str(tmp_path / "op" / "op.metal")],
        capture_output=True,
        text=True,
        cwd=ROOT / "torch_fused",
        check=False,
    )
    assert result.stdout == "f.metal.h:2: error: literal 2.0 has no suffix: write 2.0f\n", result.stderr
    assert result.returncode == 1


# Bugs planted in a copy of a real kernel that only the lint can find: (old, new, file, message).
PLANTED = [
    (
        "void load(device const T* row,",
        "void load(const T* row,",
        "common/pack.metal.h",
        NO_SPACE,
    ),
    ("float squares = 0.0f;", "float squares = 0.0;", "rms_norm/rms_norm.metal", "has no suffix"),
    ("float squares = 0.0f;", "double squares = 0.0f;", "rms_norm/rms_norm.metal", "double"),
    (
        "SHARED_CONSTANT uint32_t ALIGNED = 1;",
        "constexpr uint32_t ALIGNED = 1;",
        "rms_norm/rms_norm_params.h",
        "must be in the constant address space",
    ),
]


@pytest.mark.parametrize(("old", "new", "file", "message"), PLANTED)
def test_a_bug_planted_in_a_real_kernel_is_reported_at_its_line(old, new, file, message):
    sources = ROOT / "csrc_mps"
    text = flatten(sources / "rms_norm/rms_norm.metal", [sources])
    assert old in text and lint(text, "rms_norm.metal") == []
    errors = lint(text.replace(old, new, 1), "rms_norm.metal")
    line = next(n for n, line in enumerate((sources / file).read_text().splitlines(), 1) if old in line)
    assert any(error.startswith(f"{Path(file).name}:{line}: ") and message in error for error in errors), errors
