"""The emulator: correct kernels give torch's results, and every kind of wrong kernel is caught at its line."""

import threading

import pytest
import torch

from torch_fused.metal import MetalError, compile_shader, emulate

SCHEDULES = ("sequential", "reversed", "random", "preemptive")
HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"


def shader(body: str):
    return compile_shader(HEADER + body, "test.metal")


def bug_lines(body: str) -> list[str]:
    """The places in test.metal marked // BUG; a race is found at the second of its two accesses."""
    lines = (HEADER + body).split("\n")
    return [f"[test.metal:{number}]" for number, line in enumerate(lines, 1) if "// BUG" in line]


def ints(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


# Correct kernels

REVERSE = """
kernel void reverse(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                    uint i [[thread_position_in_grid]], uint t [[thread_position_in_threadgroup]],
                    uint n [[threads_per_threadgroup]]) {
  threadgroup float tile[256];
  tile[t] = x[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = tile[n - 1 - t];
}
"""

ROW_SUM = """
kernel void row_sum(device const float* x, device float* y, constant uint& columns,
                    uint row [[threadgroup_position_in_grid]], uint t [[thread_position_in_threadgroup]],
                    uint n [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                    uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float partial[32];
  float sum = 0.0f;
  for (uint c = t; c < columns; c += n) sum += x[row * columns + c];
  sum = simd_sum(sum);
  if (lane == 0) partial[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    sum = simd_sum(lane < simdgroups ? partial[lane] : 0.0f);
    if (lane == 0) y[row] = sum;
  }
}
"""


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_correct_kernels_give_the_same_result_in_every_schedule(schedule, checked):
    library = shader(REVERSE + ROW_SUM)
    x, y = torch.arange(512.0), torch.empty(512)
    rows, sums = torch.randint(-9, 9, (3, 500)).float(), torch.empty(3)
    for seed in range(2):
        with emulate(checked=checked, schedule=schedule, seed=seed):
            library.reverse(x, y, threads=512, group_size=128)
            library.row_sum(rows, sums, 500, threads=3 * 96, group_size=96)
        assert torch.equal(y, x.view(4, 128).flip(1).flatten())
        assert torch.equal(sums, rows.sum(1))


def test_builtins_of_a_grid_with_partial_threadgroups():
    """A 5 x 3 grid in 4 x 2 groups: groups at the edge are smaller, as with Metal's dispatchThreads."""
    library = shader("""
    kernel void everything(device uint* o [[buffer(0)]], uint2 g [[thread_position_in_grid]],
                    ushort2 t [[thread_position_in_threadgroup]], uint index [[thread_index_in_threadgroup]],
                    uint3 group [[threadgroup_position_in_grid]], uint2 size [[threads_per_threadgroup]],
                    uint2 full [[dispatch_threads_per_threadgroup]], uint2 groups [[threadgroups_per_grid]],
                    uint2 n [[threads_per_grid]], uint lane [[thread_index_in_simdgroup]],
                    uint width [[threads_per_simdgroup]]) {
      device uint* p = o + 10 * (g.x + n.x * g.y);
      p[0] = t.x; p[1] = t.y; p[2] = index; p[3] = group.x; p[4] = group.y; p[5] = size.x * 10 + size.y;
      p[6] = full.x * 10 + full.y; p[7] = groups.x * 10 + groups.y; p[8] = lane; p[9] = width;
    }""")
    out = ints(150)
    library.everything(out, threads=(5, 3), group_size=(4, 2))
    for y in range(3):
        for x in range(5):
            width, height = (4 if x < 4 else 1), (2 if y < 2 else 1)
            index = x % 4 + width * (y % 2)
            expected = [x % 4, y % 2, index, x // 4, y // 2, width * 10 + height, 42, 22, index, 32]
            assert out.view(3, 5, 10)[y, x].tolist() == expected


def test_arguments_bind_as_torch_mps_binds_them():
    library = shader("""
    struct Triple { float a, b, c; };
    kernel void bind(device float* o, constant float& f, constant long& i, constant Triple& t, constant half& h,
                     constant int* ints) {
      o[0] = f; o[1] = float(i); o[2] = t.a + 10.0f * t.b + 100.0f * t.c; o[3] = float(h); o[4] = float(ints[1]);
    }""")
    out = torch.empty(5)
    library.bind(out, 0.5, 7, [1.0, 2.0, 3.0], 1.5, (8, 9), threads=1, arg_casts={4: "fp16", 5: "int32"})
    assert out.tolist() == [0.5, 7.0, 321.0, 1.5, 9.0]
    with pytest.raises(AttributeError, match=r"test.metal has no kernel 'missing'; it has \['bind'\]"):
        library.missing  # noqa: B018
    with pytest.raises(ValueError, match="group_size must be 1 to 1024 threads in total, got"):
        library.bind(out, threads=2048, group_size=2048)
    with pytest.raises(TypeError, match="bind: argument 1 must be a tensor, a number or a list of numbers, got None"):
        library.bind(out, None)


def test_simdgroup_functions():
    library = shader("""
    kernel void everything(device float* o, uint i [[thread_position_in_grid]]) {
      const float v = float((i * 7) % 32);
      device float* p = o + 13 * i;
      p[0] = simd_sum(v); p[1] = simd_max(v); p[2] = simd_min(v);
      p[3] = simd_shuffle(v, ushort(31 - i)); p[4] = simd_shuffle_xor(v, 1); p[5] = simd_broadcast(v, 3);
      p[6] = simd_shuffle_down(v, 4); p[7] = simd_shuffle_up(v, 4);
      p[8] = simd_prefix_inclusive_sum(v); p[9] = simd_prefix_exclusive_sum(v); p[10] = simd_broadcast_first(v);
      p[11] = simd_any(v > 30.0f) && !simd_all(v > 30.0f) ? 1.0f : 0.0f;
      p[12] = float(popcount(uint(ulong(simd_ballot(v < 5.0f)))));
    }""")
    out = torch.empty(32, 13)
    library.everything(out, threads=32)
    lane = torch.arange(32)
    v = (lane * 7) % 32
    expected = [
        v.sum().expand(32), v.max().expand(32), v.min().expand(32), v.flip(0), v[lane ^ 1], v[3].expand(32),
        torch.where(lane < 28, v[(lane + 4) % 32], v), torch.where(lane >= 4, v[lane - 4], v),
        v.cumsum(0), v.cumsum(0) - v, v[0].expand(32), torch.ones(32), torch.full((32,), 5),
    ]  # fmt: skip
    assert torch.equal(out, torch.stack([e.float() for e in expected], 1))


def test_atomics():
    library = shader("""
    kernel void count(device atomic_uint* o, uint i [[thread_position_in_grid]],
                      uint t [[thread_position_in_threadgroup]]) {
      threadgroup atomic_uint bins[4];
      if (t < 4) atomic_store_explicit(&bins[t], 0u, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      atomic_fetch_add_explicit(&bins[i % 4], 1u, memory_order_relaxed);
      atomic_fetch_max_explicit(&o[4], i, memory_order_relaxed);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (t < 4) {
        const uint n = atomic_load_explicit(&bins[t], memory_order_relaxed);
        atomic_fetch_add_explicit(&o[t], n, memory_order_relaxed);
      }
    }""")
    for schedule in SCHEDULES:
        out = ints(5)
        with emulate(schedule=schedule):
            library.count(out, threads=203, group_size=64)
        assert out.tolist() == [51, 51, 51, 50, 202]


@pytest.mark.parametrize("metal, dtype", [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_sixteen_bit_floats_round_as_torch_rounds(metal, dtype):
    """All 65536 patterns widen to the same float; floats of every size narrow to the same pattern."""
    library = shader(f"""
    kernel void widen(device const {metal}* x, device float* y, uint i [[thread_position_in_grid]]) {{ y[i] = x[i]; }}
    kernel void narrow(device const float* x, device {metal}* y, uint i [[thread_position_in_grid]]) {{
      y[i] = {metal}(x[i]);
    }}""")
    patterns = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    wide = torch.empty(65536)
    # Between any two neighbours of the 16-bit type: random bits, and exact ties.
    bits = torch.randint(-(2**31), 2**31, (65536,), generator=torch.Generator().manual_seed(0)).int()
    ties = (patterns.float().view(torch.int32) + (0x1000 if dtype == torch.float16 else 0x8000)).int()
    floats = torch.cat([bits, ties]).view(torch.float32)
    narrow = torch.empty(floats.numel(), dtype=dtype)
    with emulate(checked=False):
        library.widen(patterns, wide)
        library.narrow(floats, narrow)
    assert torch.equal(wide.isnan(), patterns.isnan())
    assert torch.equal(wide.nan_to_num(), patterns.float().nan_to_num())
    assert torch.equal(narrow.isnan(), floats.isnan())
    number = ~floats.isnan()
    assert torch.equal(narrow[number].view(torch.int16), floats[number].to(dtype).view(torch.int16))


def test_traffic_of_a_copy():
    library = shader("""
    kernel void copy(device const float4* x, device float4* y, device const float* scale,
                     uint i [[thread_position_in_grid]]) { y[i] = x[i] * scale[0]; }""")
    x, y, scale = torch.randn(256), torch.empty(256), torch.ones(1)
    with emulate() as run:
        library.copy(x, y, scale, threads=64, group_size=32)
    (launch,) = run.launches
    assert (launch.kernel, launch.threadgroups, launch.threads) == ("copy", 2, 32)
    traffic = [(b.read, b.written, b.distinct_read, b.distinct_written) for b in launch.buffers]
    assert traffic == [(1024, 0, 1024, 0), (0, 1024, 0, 1024), (256, 0, 4, 0)]
    run.clear()
    assert run.launches == []


# Wrong kernels

WRONG = {
    "race within a threadgroup": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[64];
          a[t] = float(t);
          o[t] = a[63 - t];  // BUG
        }""",
        r"read of uninitialised threadgroup memory|data race on threadgroup memory \(read-after-write",
    ),
    "reuse without a barrier": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[64];
          a[t] = float(t);
          threadgroup_barrier(mem_flags::mem_threadgroup);
          if (t < 32) o[t] = a[63 - t];  // BUG
          if (t >= 32) a[t] = 0.0f;  // BUG
        }""",
        r"data race on threadgroup memory",
    ),
    "the wrong memory in a barrier": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[64];
          if (t == 0) a[0] = 1.0f;
          threadgroup_barrier(mem_flags::mem_device);
          o[t] = a[0];  // BUG
        }""",
        r"data race on threadgroup memory \(read-after-write, against thread 0 of threadgroup 0\), by thread \d+ of",
    ),
    "a simdgroup barrier between simdgroups": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[64];
          a[t] = 1.0f;
          simdgroup_barrier(mem_flags::mem_threadgroup);
          o[t] = a[(t + 32) % 64];  // BUG
        }""",
        r"data race on threadgroup memory|read of uninitialised threadgroup memory",
    ),
    "two threads write one element": (
        "kernel void k(device float* o, uint i [[thread_position_in_grid]]) {\n  o[i / 2] = float(i);  // BUG\n}",
        r"data race on buffer 0 \(write-after-write, against thread \d+ of threadgroup 0\), by thread \d+ of",
    ),
    "lost update": (
        "kernel void k(device int* o, uint i [[thread_position_in_grid]]) {\n  o[0] += 1;  // BUG\n}",
        r"data race on buffer 0 \((read-after-write|write-after-read)",
    ),
    "a plain read of an atomic": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup atomic_uint n[2];
          if (t == 0) atomic_store_explicit(&n[0], 0u, memory_order_relaxed);
          threadgroup_barrier(mem_flags::mem_threadgroup);
          if (t == 63) o[t] = float(*(threadgroup uint*)&n[0]);  // BUG
          else atomic_fetch_add_explicit(&n[0], 1u, memory_order_relaxed);  // BUG
        }""",
        r"data race on threadgroup memory \((read-after-write|write-after-read)",
    ),
    "past the end": (
        "kernel void k(device float* o, uint i [[thread_position_in_grid]]) {\n  o[i + 1] = 1.0f;  // BUG\n}",
        r"out-of-bounds device write of 4 bytes \(0 bytes past the end of buffer 0\), by thread 63 of threadgroup 0",
    ),
    "before the start": (
        "kernel void k(device float* o, uint i [[thread_position_in_grid]]) {\n  o[int(i) - 1] = 1.0f;  // BUG\n}",
        r"out-of-bounds device write of 4 bytes \(4 bytes before buffer 0\)",
    ),
    "across the end": (
        """kernel void k(device float* o, uint i [[thread_position_in_grid]]) {
          if (i == 0) *(device float4*)(o + 62) = float4(1.0f);  // BUG
        }""",
        r"out-of-bounds device write of (16|8) bytes \((across|8 bytes past) the end of buffer 0\)",
    ),
    "threadgroup array too small": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[60];
          a[t] = 1.0f;  // BUG
          o[t] = a[t];
        }""",
        r"out-of-bounds index of an array, by thread 6\d of threadgroup 0",
    ),
    "misaligned vector": (
        """kernel void k(device float* o, uint i [[thread_position_in_grid]]) {
          if (i == 0) *(device float4*)(o + 1) = float4(1.0f);  // BUG
        }""",
        r"misaligned write of \d+ bytes at byte 4 of buffer 0",
    ),
    "uninitialised threadgroup memory": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup float a[64];
          if (t != 5) a[t] = 1.0f;
          o[t] = a[t];  // BUG
        }""",
        r"read of uninitialised threadgroup memory, by thread 5 of threadgroup 0",
    ),
    "uninitialised atomic": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          threadgroup atomic_uint n;
          o[t] = float(atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed));  // BUG
        }""",
        r"read of uninitialised threadgroup memory",
    ),
    "write through device const": (
        "kernel void k(device const float* o, uint i [[thread_position_in_grid]]) {\n"
        "  ((device float*)o)[i] = 1.0f;  // BUG\n}",
        r"write to read-only buffer 0",
    ),
    "barrier in a branch": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          if (t < 32) {
            threadgroup_barrier(mem_flags::mem_none);  // BUG
          } else {
            threadgroup_barrier(mem_flags::mem_none);
          }
          o[t] = 1.0f;
        }""",
        r"divergent threadgroup_barrier: thread 0 of threadgroup 0 waits at \[test.metal:5\], thread 32 of",
    ),
    "return before a barrier": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          if (t >= 50) return;
          threadgroup_barrier(mem_flags::mem_none);  // BUG
          o[t] = 1.0f;
        }""",
        r"threadgroup_barrier reached by 50 of the 64 threads of threadgroup 0, the others have returned",
    ),
    "divergent simd_sum": (
        """kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
          float v = 1.0f;
          if (t != 3) v = simd_sum(v);  // BUG
          threadgroup_barrier(mem_flags::mem_none);
          o[t] = v;
        }""",
        r"divergent simdgroup operation: thread 0 of threadgroup 0 waits at \[test.metal:5\], thread 3 of",
    ),
    "shuffle from a lane that is not there": (
        "kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {\n"
        "  o[t] = simd_shuffle(1.0f, ushort(t + 1));  // BUG\n}",
        r"simdgroup function reads a lane that is not active, by thread 31 of threadgroup 0",
    ),
}


@pytest.mark.parametrize("schedule", ["sequential", "preemptive"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_is_caught_at_its_line(case, schedule):
    body, message = WRONG[case]
    with emulate(schedule=schedule), pytest.raises(RuntimeError, match=message) as caught:
        shader(body).k(torch.zeros(64), threads=64)
    text = str(caught.value)
    assert text.startswith("torch_fused emulator: k: ")
    assert any(line in text for line in bug_lines(body))


def test_threadgroups_may_not_see_each_others_writes():
    """Nothing orders threadgroups within a launch, not even a device barrier."""
    library = shader("""
    kernel void k(device float* o, uint g [[threadgroup_position_in_grid]]) {
      o[g] = 1.0f;
      threadgroup_barrier(mem_flags::mem_device);
      o[g + 4] = o[3 - g];
    }""")
    with pytest.raises(RuntimeError, match=r"data race on buffer 0 .*threadgroup [01]\), by thread 0 of threadgroup 2"):
        library.k(torch.zeros(8), threads=4, group_size=1)


@pytest.mark.parametrize("reader", [0, 1])
def test_threadgroups_may_count_together_but_not_read_the_count(reader):
    """Atomic updates commute, so all threadgroups may do them; the result of a load depends on their order."""
    library = shader("""
    kernel void k(device atomic_uint* count, device uint* o, constant uint& reader,
                  uint g [[threadgroup_position_in_grid]]) {
      if (g != reader) atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
      else o[0] = atomic_load_explicit(count, memory_order_relaxed);
    }""")
    library.k(ints(1), ints(1), 9, threads=4, group_size=1)
    with pytest.raises(RuntimeError, match="data race on buffer 0"):
        library.k(ints(1), ints(1), reader, threads=4, group_size=1)


def test_a_thread_that_waits_for_another_is_stopped():
    library = shader("""
    kernel void k(device atomic_uint* flag) {
      while (atomic_load_explicit(flag, memory_order_relaxed) == 0) {}
    }""")
    with pytest.raises(RuntimeError, match=r"endless wait for another thread.* \[test.metal:5\]"):
        library.k(ints(1))


def test_two_names_for_one_memory():
    """A write through one binding and a read through another is a race like any other."""
    library = shader("""
    kernel void shift(device const float* x, device float* y, uint i [[thread_position_in_grid]]) { y[i] = x[i]; }""")
    x = torch.arange(64.0)
    library.shift(x, x)  # each thread its own element: in place is fine
    with pytest.raises(RuntimeError, match=r"data race on buffer \d"):
        library.shift(x[:63], x[1:])


def test_a_view_ends_where_its_elements_end():
    """Memory that belongs to the storage but not to the view is out of bounds; gaps between rows are not checked."""
    library = shader("""
    kernel void fill(device float* o, constant int& n, uint i [[thread_position_in_grid]]) {
      for (int j = 0; j < n; j++) o[int(i) * 8 + j] = 1.0f;
    }""")
    storage = torch.zeros(4, 8)
    library.fill(storage[1:3, :5], 5, threads=2, arg_casts="int32")
    assert storage.sum() == 10
    with pytest.raises(RuntimeError, match=r"0 bytes past the end of buffer 0\), by thread 1 of threadgroup 0 \[test"):
        library.fill(storage[1:3, :5], 6, threads=2, arg_casts="int32")


@pytest.mark.parametrize("distance", [-64, 64])
def test_a_neighbour_in_memory_is_another_buffer(distance):
    """Memory past a buffer's end is out of bounds, even if it is another buffer of the kernel."""
    library = shader("""
    kernel void copy(device float* o, device const float* x, constant int& distance,
                     uint i [[thread_position_in_grid]]) {
      o[i] = x[int(i) + distance];
    }""")
    storage = torch.arange(192.0)
    parts = [storage[:64], storage[64:128], storage[128:]]
    library.copy(parts[1 - distance // 64], parts[1], 0, threads=64, arg_casts="int32")
    assert parts[1 - distance // 64].equal(parts[1])
    with pytest.raises(RuntimeError, match=r"out-of-bounds device read of 4 bytes .* buffer 1"):
        library.copy(parts[1 + distance // 64], parts[1], distance, threads=64, arg_casts="int32")


def test_arguments_that_do_not_fit():
    library = shader("""
    struct Params { int a, b, c, d; };
    kernel void k(device int* o [[buffer(0)]], constant Params& p [[buffer(1)]]) { o[0] = p.d; }""")
    with pytest.raises(RuntimeError, match="k: buffer 1 has 8 bytes, the kernel's parameter takes 16"):
        library.k(ints(1), 1, threads=1)
    with pytest.raises(RuntimeError, match="k: buffer 1 is not bound"):
        library.k(ints(1), threads=1)


def test_threadgroup_memory_is_limited():
    body = """
    kernel void k(device float* o, uint t [[thread_position_in_threadgroup]]) {
      threadgroup float a[8192];
      threadgroup float b[1];
      a[t] = b[t] = o[t] = 1.0f;
    }"""
    with pytest.raises(RuntimeError, match="k: threadgroup memory of 32772 bytes exceeds the limit of 32768"):
        shader(body).k(torch.zeros(1))


def test_a_source_that_does_not_compile_names_its_line():
    with pytest.raises(MetalError, match=r"test.metal:4.*rsqrrt"):
        shader("kernel void k(device float* o) {\n  o[0] = rsqrrt(2.0f);\n}").k(torch.zeros(1))


def test_libraries_are_kept_for_the_next_process(tmp_path, monkeypatch):
    """One folder per source and mode, not readable by other users, and no unfinished folders."""
    for checked in (True, False):
        with emulate(checked=checked):
            pass  # this process has the project's own kernels already in memory
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(tmp_path))
    library = shader("kernel void cached(device float* o) { o[0] = 2.0f; }")
    for _ in range(2):
        for checked in (True, False):
            with emulate(checked=checked):
                out = torch.zeros(1)
                library.cached(out)
                assert out.item() == 2.0
    folder = tmp_path / "emulator"
    assert folder.stat().st_mode & 0o777 == 0o700
    names = [path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()]
    assert (
        sorted(name for _, *name in names if name) == [["kernels.so"]] * 2 and (".lock",) in names and len(names) == 3
    )


def test_unknown_settings():
    with pytest.raises(ValueError, match=r"schedule must be one of .*, got 'backwards'"), emulate(schedule="backwards"):
        pass
    with pytest.raises(ValueError, match="no source named 'missing'"), emulate(sources={"missing": ""}):
        pass


def test_launches_from_several_threads():
    """Autograd runs backward on threads of its own."""
    library = shader(REVERSE)
    failures = []

    def work(seed: int) -> None:
        x, y = torch.randn(512, generator=torch.Generator().manual_seed(seed)), torch.empty(512)
        for _ in range(10):
            library.reverse(x, y, threads=512, group_size=256)
            if not torch.equal(y, x.view(2, 256).flip(1).flatten()):
                failures.append(seed)

    with emulate() as run:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(run.launches) == 40


def test_ops_run_their_kernels_backward_included():
    x = torch.randn(3, 65, requires_grad=True)
    weight = torch.randn(65, requires_grad=True)
    with emulate() as run:
        torch.ops.torch_fused.rms_norm(x, [65], weight, 1e-6).sum().backward()
    kernels = [launch.kernel for launch in run.launches]
    assert kernels == ["rms_norm_f32_1", "rms_norm_backward_f32_1", "column_sum_f32"]
    before = len(run.launches)
    torch.ops.torch_fused.rms_norm(x, [65], weight, 1e-6)
    assert len(run.launches) == before  # outside, the CPU kernel runs


def test_an_ops_source_can_be_replaced():
    names, texts = torch.ops.torch_fused._metal_sources()
    source = texts[names.index("rms_norm")]
    call = "rsqrt(threadgroup_sum(squares, scratch, place) / float(p.cols) + p.eps)"
    assert call in source
    planted = source.replace(call, f"{call} + scratch[31]")
    x = torch.randn(2, 64)
    expected = torch.nn.functional.rms_norm(x, [64], None, 1e-6)
    with emulate(sources={"rms_norm": planted}):
        with pytest.raises(RuntimeError, match=r"rms_norm_f32_1: read of uninitialised .* \[rms_norm.metal:\d+\]"):
            torch.ops.torch_fused.rms_norm(x, [64], None, 1e-6)
        with emulate():  # the innermost counts
            result = torch.ops.torch_fused.rms_norm(x, [64], None, 1e-6)
    torch.testing.assert_close(result, expected)
