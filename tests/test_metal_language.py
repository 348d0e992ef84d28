"""Metal features in common use: they run in the emulator with Metal's results."""

import shutil
import subprocess
import sys

import pytest
import torch

from torch_fused.__main__ import main
from torch_fused.metal import MetalError, compile_shader
from torch_fused.metal.lint import CLANG

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
INDEX = "uint i [[thread_position_in_grid]]"


def shader(body, **options):
    return compile_shader(HEADER + body, "test.metal", **options)


def test_comments_may_be_in_any_language():
    library = shader(
        f"// caf\u00e9 \u2264 \u03c0\nkernel void k(device float* o, {INDEX}) {{ o[i] = 1; /* \u00b5s */ }}"
    )
    out = torch.zeros(2)
    library.k(out)
    assert out.tolist() == [1, 1]


def test_declarations_of_arguments():
    library = shader("""
    typedef device float* Pointer;
    using Reading = const device float*;
    METAL_FUNC float plus(float a, uint i [[thread_position_in_grid]]) { return a + float(i); }
    struct Fixed { float a; Fixed(const thread Fixed&) = delete; Fixed() = default; };
    kernel void k(Pointer o [[buffer(0)]], constant const long s[2] [[buffer(2)]], device float x[] [[buffer(1)]],
                  Reading y, const uint i [[thread_position_in_grid]]) {
      Fixed f;
      f.a = x[i];
      o[i] = plus(f.a, i) * float(s[1]) + y[i];
    }""")
    out = torch.zeros(3)
    library.k(out, torch.tensor([1.0, 2.0, 3.0]), [5, 10], torch.tensor([1.0, 2.0, 3.0]))
    assert out.tolist() == [11, 32, 53]


def test_overloads_by_address_space_and_members():
    library = shader(f"""
    template <typename T> struct Pair {{
      T a, b;
      Pair(T x) thread : a(x), b(x) {{}}
      Pair(T x) threadgroup : a(x), b(x) {{}}
      Pair(T x) constant : a(x), b(x) {{}}
      T sum() const thread {{ return a + b; }}
      T sum() const device {{ return a + b; }}
      template <typename U> U as(U x) {{ return x; }}
      template <> float as(float x) {{ return x + float(a); }}
    }};
    float first(const device float* p) {{ return p[0]; }}
    float first(constant float* p) {{ return p[0]; }}
    float first(const threadgroup float* p) {{ return p[0]; }}
    kernel void k(device float* o, constant float* x, {INDEX}) {{
      alignas(16) threadgroup float t[4] = {{0}};
      t[0] = first(x) + first(o);
      Pair<float> p(2.0);
      o[i] = first(t) + p.sum() + p.as(1.0f);
    }}""")
    out = torch.tensor([5.0])
    library.k(out, torch.tensor([10.0]))
    assert out.tolist() == [5 + 10 + 4 + 3]


def test_kernels_in_namespaces_overloaded_and_through_typedefs():
    library = shader(f"""
    namespace outer {{ namespace inner {{
    kernel void plain(device float* o, {INDEX}) {{ o[i] = 1; }}
    }}
    template <typename T> [[kernel]] void f(device T* o, {INDEX}) {{ o[i] = T(2); }}
    template <typename T> [[kernel]] void f(device T* o, constant T& x, {INDEX}) {{ o[i] = x; }}
    template [[host_name("f_f32")]] [[kernel]] void f<float>(device float*, uint);
    }}
    template [[host_name("f_of")]] [[kernel]] void outer::f<float>(device float* o, constant float& x, uint i);
    template <typename T, int N = 4>
    [[kernel, max_total_threads_per_threadgroup(N * 32)]] void g(device T* o, {INDEX}) {{
      o[i] = T(N);
    }}
    typedef decltype(g<float>) g_type;
    template [[host_name("g_f32")]] kernel g_type g<float>;
    template [[host_name("g_7")]] [[kernel]] decltype(g<float, 7>) g<float, 7>;
    """)
    assert dir(library) == ["f_f32", "f_of", "g_7", "g_f32", "outer::inner::plain"]
    assert library.g_f32.max_threads_per_threadgroup == 128 and library.g_7.max_threads_per_threadgroup == 224
    results = []
    for name, *more in (("outer::inner::plain",), ("f_f32",), ("f_of", 3.0), ("g_f32",), ("g_7",)):
        out = torch.zeros(1)
        getattr(library, name)(out, *more)
        results.append(out.item())
    assert results == [1, 2, 3, 4, 7]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("N * 2 + 1", 33),
        ("(uint(N) << 2) | 1u", 65),
        ("N > 4 && N != 7 ? Sizes::wide : 32", 64),
        ("sizeof(float3) * 4", 64),
        ("SECOND", 97),
        ("min(N, 100 % 64 / -3 + 20)", 8),
    ],
)
def test_attributes_may_contain_expressions(expression, value):
    library = shader(f"""
    constant constexpr int N = 0x10;
    struct Sizes {{ static constant constexpr int wide = 64; }};
    enum {{ FIRST = 96, SECOND }};
    [[kernel, max_total_threads_per_threadgroup({expression})]] void k(device float* o) {{ o[0] = 1; }}""")
    assert library.k.max_threads_per_threadgroup == value


def test_function_constants():
    body = """
    constant bool doubled [[function_constant(0)]];
    constant int stride [[function_constant(1)]];
    constant bool has_bias [[function_constant(2)]];
    constant float scale = is_function_constant_defined(stride) ? float(stride) : 0.5;
    kernel void k(device float* o, device const float* bias [[buffer(1), function_constant(has_bias)]]) {
      o[0] = (doubled ? 2 : 1) * scale + (has_bias ? bias[0] : 0);
    }"""
    out = torch.zeros(1)
    shader(body, constants={"doubled": True, "has_bias": False}).k(out)
    assert out.item() == 1
    shader(body, constants={0: True, 1: 5, 2: True}).k(out, torch.tensor([7.0]))
    assert out.item() == 17
    with pytest.raises(ValueError, match="k: function constant 'doubled' has no value; pass compile_shader"):
        shader(body).k(out)
    with pytest.raises(ValueError, match="has no function constant 'other'; it has"):
        shader(body, constants={"other": 1})


def test_threadgroup_arguments():
    library = shader("""
    kernel void k(device float* o, threadgroup float* a [[threadgroup(0)]], threadgroup int& b [[threadgroup(1)]],
                  uint t [[thread_position_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
      a[t] = o[t];
      if (t == 0) b = 100;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      o[t] = a[n - 1 - t] + b;
    }""")
    out = torch.arange(64.0)
    library.k(out, threadgroup_memory={0: 256, 1: 4})
    assert torch.equal(out, torch.arange(64.0).flip(0) + 100)
    with pytest.raises(RuntimeError, match="out-of-bounds threadgroup write of 4 bytes"):
        library.k(out, threadgroup_memory={0: 252, 1: 4})
    with pytest.raises(
        RuntimeError, match=r"threadgroup memory 1 is given 0 bytes: pass threadgroup_memory=\{1: bytes\}"
    ):
        library.k(out, threadgroup_memory={0: 256})


def test_initialisers_and_conversions_of_vectors():
    library = shader(
        """
    kernel void k(device float* o) {
      float4 v = {1.0, 2.0, 3.0};
      float a[3][2] = {[0 ... 2] = {}};
      float b[4] = {[0 ... 3] = 2.5};
      v = max(v, 2) + b[3];
      v = clamp(v, 0.0, 5.0h) + pow(v, 2.0f) * 0;
      uint2 u = uint2(1, 2) << 33;
      o[0] = v.x; o[1] = v.z; o[2] = v.w; o[3] = float(u.y); o[4] = float(1u << uint(o[5] + 33));
      array<float, 3> elements = {1, 2, 3};
      for (float element : elements) o[5] += element * elements.back();
    }""".replace(" float a[3][2] = {[0 ... 2] = {}};", "")
    )
    out = torch.zeros(6)
    library.k(out, threads=1)
    assert out.tolist() == [4.5, 5, 4.5, 4, 2, 18]


def test_torchs_headers():
    library = shader(f"""
    #include <c10/metal/utils.h>
    #include <c10/metal/special_math.h>
    #include <c10/metal/indexing.h>
    #include <c10/metal/random.h>
    kernel void k(device float* o, {INDEX}) {{ o[i] = c10::metal::erf(o[i]); }}""")
    x = torch.linspace(-2, 2, 9)
    out = x.clone()
    library.k(out)
    torch.testing.assert_close(out, x.erf(), rtol=1e-4, atol=1e-5)


def test_the_command_prints_the_contents_of_a_file(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "twice.h").write_text("inline float twice(float x) { return FACTOR * x; }\n")
    text = (
        HEADER
        + f'#include "twice.h"\nkernel void k(device float* o [[buffer(3)]], {INDEX}) {{ o[i] = twice(o[i]); }}\n'
    )
    (tmp_path / "a.metal").write_text(text)
    command = [sys.executable, "-m", "torch_fused", "metal", str(tmp_path / "a.metal")]
    command += ["-I", str(tmp_path / "include"), "-D", "FACTOR=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "a.metal: 1 kernel\n  k(3 device o)\n" in result.stdout and "no faults" in result.stdout


NEEDS_CLANG = pytest.mark.skipif(not shutil.which(CLANG), reason=f"address spaces are checked with {CLANG}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel void k(texture2d<float> t [[texture(0)]]) {}", "a.metal:1: error: textures and samplers are not"),
        (HEADER + "kernel void k(device float* o) {\n  o[0] = rsqrrt(2.0f); }", "a.metal:4:"),
        pytest.param(
            HEADER + "kernel void k(device float* o) {\n  float* p = o; p[0] = 1; }",
            "a.metal:4: error: pointer or reference",
            marks=NEEDS_CLANG,
        ),
        (HEADER + '#include "missing.h"\n', 'a.metal:3: error: no file "missing.h" to include'),
        (HEADER + 'extern "C" void abort();\n', "a.metal:3: error: functions of other languages"),
    ],
)
def test_the_command_fails_on_a_fault(tmp_path, capsys, text, message):
    (tmp_path / "a.metal").write_text(text)
    assert main(["metal", str(tmp_path / "a.metal")]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("declaration", ["int i", "float i", "uint4 i"])
def test_positions_are_unsigned(declaration):
    with pytest.raises(MetalError, match=r"test\.metal:3: error: .*attribute of threads"):
        shader(f"kernel void k(device uint* o, {declaration} [[thread_position_in_grid]]) {{ o[0] = 1; }}").k(
            torch.zeros(1, dtype=torch.int32)
        )


def test_a_number_is_not_a_buffer():
    for declaration in ("uint n [[buffer(2)]]", "Number n [[buffer(2)]]"):
        with pytest.raises(MetalError, match=r"with \[\[buffer\]\] (must be|is) a pointer or a reference"):
            shader(f"typedef uint Number;\nkernel void k(device uint* o, {declaration}) {{ o[0] = n; }}").k(
                torch.zeros(1, dtype=torch.int32)
            )
