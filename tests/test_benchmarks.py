"""The benchmarks' records, report and predictions; nothing here asserts a time."""

import contextlib
import csv
import importlib
import itertools
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import apple_prediction  # noqa: E402
import bench_decode  # noqa: E402
import bench_generate  # noqa: E402
import bench_linear_cross_entropy  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import seed_table  # noqa: E402

from torch_fused.sampling import greedy  # noqa: E402

OTHERS = {"bench_generate", "bench_linear_cross_entropy"}  # which run by themselves
BENCHES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py") if path.stem not in OTHERS)
PUBLISHED = {
    "KV cache, single layer": "11.6 ns",
    "KV cache, all 24 layers": "320 ns",
    "full sequence 512": "50.4 ms",
    "full sequence 2048": "559 ms",
    "KV allocation, Qwen 0.5B": "20.7 ns",
    "KV allocation, Qwen 1.5B": "20.7 ns",
    "KV allocation, Qwen 3B": "20.7 ns",
    "greedy": "109.5 us",
    "top-k 50": "469 us",
    "top-p 0.9": "611 us",
    "greedy, vocabulary 1000": "101 us",
    "greedy, vocabulary 10000": "112 us",
    "greedy, vocabulary 32000": "124 us",
    "greedy, vocabulary 100000": "161 us",
    "greedy, vocabulary 151936": "",
    "top-k 50, vocabulary 1000": "111 us",
    "top-k 50, vocabulary 10000": "224 us",
    "top-k 50, vocabulary 32000": "495 us",
    "top-k 50, vocabulary 100000": "1500 us",
    "top-k 50, vocabulary 151936": "",
    "top-p 0.9, vocabulary 1000": "115 us",
    "top-p 0.9, vocabulary 10000": "279 us",
    "top-p 0.9, vocabulary 32000": "630 us",
    "top-p 0.9, vocabulary 100000": "2210 us",
    "top-p 0.9, vocabulary 151936": "",
    "softmax": "43.6 us",
    "layer norm": "47.8 us",
    "RMS norm": "25.5 us",
    "full training step": "3.3 ms",
    "AdamW": "1.06 ms",
}


# ---- records --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    def make(again: bool = False) -> record.Results:
        return record.Results("some", ("op", "contender"), ("ms",), tmp_path, "cpu", again)

    return make


def test_rows_are_kept_as_they_come(results, tmp_path):
    rows = results()
    for contender, ms in (("a", 1.23456), ("b", 2.0), ("a", 3.0)):
        rows.add(op="x", contender=contender, ms=ms)
    (path,) = tmp_path.glob("*/some.csv")
    with path.open() as file:
        assert next(csv.reader(file)) == ["op", "contender", "ms", "waited", *record.STAMP]
    assert [(row["contender"], row["ms"]) for row in record.read(path)] == [("a", "3"), ("b", "2")]
    assert not list(tmp_path.glob("*/*.part"))


def test_an_interrupted_run_goes_on(results, monkeypatch):
    monkeypatch.setattr(record, "waited", lambda: 0.0)  # whatever else this machine does
    results().add(op="x", contender="a", ms=1.0)
    assert results().current(op="x", contender="a")["ms"] == "1"
    assert results().current(op="x", contender="b") is None
    assert results(again=True).current(op="x", contender="a") is None


def test_rows_that_were_disturbed_are_measured_again(results, monkeypatch):
    rows = results()
    assert rows.current(op="x", contender="a") is None
    monkeypatch.setattr(record, "waited", lambda: 1e9)
    assert float(rows.add(op="x", contender="a", ms=1.0)["waited"]) > record.DISTURBED
    assert results().current(op="x", contender="a") is None


@pytest.mark.parametrize("change", ["torch", "threads", "date"])
def test_rows_of_something_else_are_measured_again(results, monkeypatch, change):
    results().add(op="x", contender="a", ms=1.0)
    if change == "date":
        later = datetime.now(timezone.utc) + timedelta(seconds=5)
        monkeypatch.setattr(record, "changed", lambda: later)
    else:
        now = record.stamp("cpu") | {change: "another"}
        monkeypatch.setattr(record, "stamp", lambda device: now)
    assert results().current(op="x", contender="a") is None


def test_committed_rows_have_their_columns():
    columns = {
        "generate": ("model", "dtype", "mode", "batch", "prompt", "new", "contender", "tokens_s", "ms_token"),
        "linear_cross_entropy": (*bench_linear_cross_entropy.KEYS, *bench_linear_cross_entropy.VALUES),
        "seed": (*seed_table.KEYS, *seed_table.VALUES),
        "apple_counted": (*apple_prediction.KEYS, *apple_prediction.COUNTED),
    }
    of_ops = ("op", "shape", "dtype", "kind", "contender", "ms", "spread", "gb_s", "copy_share")
    paths = list((ROOT / "benchmarks/results").glob("*/*.csv"))
    assert paths
    for path in paths:
        for row in record.read(path):
            assert {*columns.get(path.stem, of_ops), *record.STAMP} <= row.keys(), path
            assert record.slug(row["device"]) == path.parent.name


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bench", BENCHES)
def test_cases_have_names_of_their_own(bench):
    for device in ("cpu", "cuda"):
        names = [case.name for case in importlib.import_module(bench).cases(device, full=True)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_cases_on_a_gpu(dtype):
    names = {case.name for bench in BENCHES for case in importlib.import_module(bench).cases("cuda", full=False)}
    ops = ("rms_norm", "add_rms_norm", "layer_norm", "silu_mul", "softmax", "rms_norm backward", "layer_norm backward")
    assert names >= {f"{op} (4096, 4096) {dtype}" for op in ops}
    assert names >= {f"softmax (64, 151936) {dtype}", f"adamw 494 million in 290 tensors {dtype}"}


def test_a_bench_runs_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_softmax.py", "-k", "64 and 1024 and bf16 and not 4096"]
    command = [*command, "--device", "cpu", "--results", str(tmp_path)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    rows = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GB/s" in done.stdout and "of copy" in done.stdout
        (path,) = tmp_path.glob("*/softmax.csv")
        rows.append(record.read(path))
    assert [row["contender"] for row in rows[0]] == ["torch_fused", "torch.softmax", "torch composed"]
    assert all(row in rows[1] for row in rows[0] if float(row["waited"]) <= record.DISTURBED)


def test_peers_of_the_seed(monkeypatch):
    """Other libraries' kernels stand in the seed's rows of ops that they have, where they are installed."""
    norm = seed_table.partial(seed_table.norm_of, "rms_norm", (4, 8), True, "cpu")
    makes = {
        "softmax": lambda: seed_table.softmax_of((2, 3, 8), "cpu"),
        "rms_norm": norm,
        "top-p 0.9": lambda: seed_table.sample_honest("top-p 0.9", 100, "cpu"),
    }
    shapes = []
    for op, make in makes.items():
        assert "a library" not in make()
        monkeypatch.setitem(peers.PEERS, op, {"a library": lambda *args: shapes.append([a.shape for a in args]) or 1})
        make()["a library"]()
    assert shapes == [[(6, 8)], [(4, 8), (8,)], [(1, 100)]]


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_timing():
    timing = harness.Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert timing.seconds == 3.0
    assert timing.spread == pytest.approx(2 / 3)
    assert seed_table.outliers([1.0, 1.1, 1.0, 1.1, 9.0]) == 1
    calls = []
    harness.measure([lambda: calls.append(0), lambda: calls.append(1)], "cpu", target=1e-5)
    assert abs(calls.count(0) - calls.count(1)) <= 1


def test_contenders_of_the_seed_take_turns():
    calls: list[str] = []
    found = seed_table.timed({name: lambda name=name: calls.append(name) for name in "ab"}, "cpu", True, 3, 0.0)
    assert [name for name, _ in itertools.groupby(calls)] == ["a", "b"] * 4  # once to see how long a call takes
    assert all(len(samples.runs) == 3 and float(samples.columns()["ms"]) > 0 for samples in found.values())


def test_contenders_of_generation_take_turns():
    calls: list[tuple[str, int]] = []
    setting = bench_generate.Setting(torch.bfloat16, "greedy", 2, 5, 8)

    def requests(name: str) -> bench_generate.Requests:
        def run(ids: torch.Tensor, count: int, sampled: bool) -> None:
            assert ids.shape == (2, 5) and not sampled
            calls.append((name, count))

        return bench_generate.Requests(lambda: contextlib.nullcontext(run), setting, 100, "cpu", False)

    contenders = [requests(name) for name in "ab"]
    for _ in range(2):
        for contender in contenders:
            contender.round()
    rounds = [[(name, count) for name in "ab" for count in (warm_up, 1, 8)] for warm_up in (8, 2)]
    assert calls == rounds[0] + rounds[1]
    assert contenders[0].columns()["tokens_s"] > 0


def test_contenders_of_the_loss_take_turns():
    """Each in a process of its own, which says how long a step took and how much memory."""
    found = bench_linear_cross_entropy.measure((8, 4), torch.float32, ["torch_fused", "torch"], "cpu", 1, 2)
    for samples in found.values():
        assert len(samples) == 2
        for seconds, peak, weight_grad in samples:
            assert seconds > 0 and peak > 0 and weight_grad == 151936 * 4 * 4


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_is_that_of_the_rows():
    assert report.generate() == report.REPORT.read_text()


def test_every_row_of_the_seed_is_there_twice():
    assert {row.name: row.quoted for row in seed_table.ROWS} == PUBLISHED
    lines = report.REPORT.read_text().splitlines()
    for row in seed_table.ROWS:
        published, honest = (
            [line for line in lines if line.startswith(f"| {row.name} |") and f"| {kind}: " in line]
            for kind in (seed_table.PUBLISHED, seed_table.HONEST)
        )
        assert published and len(published) == len(honest)
        assert all(f"| {row.quoted} |" in line or not row.quoted for line in published)


def test_a_row_that_was_not_run_says_so():
    page = "\n".join(report.seed_tables([]))
    assert page.count("| not run | not run |") == 2 * len(seed_table.ROWS)


def test_slower_rows_are_listed():
    row = {"op": "softmax", "shape": "(1, 1)", "dtype": "f32", "kind": "", "spread": "0.01", "device": "a CPU"}
    rows = [row | {"contender": name, "ms": ms} for name, ms in (("torch_fused", "2"), ("torch.softmax", "1"))]
    page = "\n".join(report.slower_table(rows, [], []))
    assert "| softmax (1, 1) f32 | 2 ms | torch.softmax 1 ms | 0.50 |  |" in page
    assert not list(report.slower_table(rows[:1], [], []))


def test_prediction():
    low, high = apple_prediction.predicted(1e9, 3, gb_s=100)
    fast, slow = apple_prediction.LAUNCH_SECONDS
    assert low == pytest.approx(0.01 + 3 * fast)
    assert high == pytest.approx(0.01 / apple_prediction.SHARE_REACHED[1] + 3 * slow)


def test_what_is_counted_for_a_prediction():
    op = next(op for op in apple_prediction.ops() if op.name == "rms_norm")
    launches, moved = op.counted()
    operands = 3 * 896 * torch.bfloat16.itemsize  # x, weight, result
    assert launches == 1 and operands <= moved < operands + 256


@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_counted_for_a_token(bits):
    """Of parts of a model; here the whole is small enough to be counted too."""
    sizes = bench_decode.Sizes("", 3, 128, 2, 1, 64, 192, 3 * apple_prediction.PART)
    op = apple_prediction.token(sizes, bits)
    launches, moved = op.counted()
    assert launches == 5 * sizes.layers + 2 + apple_prediction.counted(lambda: greedy(torch.zeros(1, 3072)))[0]
    assert (launches, moved) == apple_prediction.counted(op.make("cpu"))
    shape = (1, 1, apple_prediction.CONTEXT)
    assert bench_decode.nbytes(sizes, bits, shape, torch.bfloat16) < moved
