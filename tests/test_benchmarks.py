"""The benchmarks' timer, records, report and predictions; nothing here asserts a time."""

import contextlib
import csv
import itertools
import re
import sys
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import apple  # noqa: E402
import decode  # noqa: E402
import generate  # noqa: E402
import linear_cross_entropy  # noqa: E402
import metal_candle  # noqa: E402
import ops  # noqa: E402
import peers  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402

from torch_fused.sampling import greedy  # noqa: E402

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

KEYS = {name: {"op": "x", "contender": name} for name in "ab"}


@pytest.fixture
def results(tmp_path):
    def make(again: bool = False) -> record.Results:
        return record.Results("some", ("op", "contender"), ("ms",), tmp_path, "cpu", again)

    return make


def measured(ms: float = 1.0):
    return {name: {"ms": ms} for name in KEYS}


def unexpected():
    raise AssertionError("measured again")


def test_rows_are_kept(results, tmp_path):
    rows = results()
    rows.rows({"a": KEYS["a"]}, lambda: {"a": {"ms": 9.0}})
    rows.rows(KEYS, partial(measured, 1.23456))
    (path,) = tmp_path.glob("*/some.csv")
    with path.open() as file:
        assert next(csv.reader(file)) == ["op", "contender", "ms", "waited", *record.STAMP]
    assert [(row["contender"], row["ms"]) for row in record.read(path)] == [("a", "1.235"), ("b", "1.235")]
    assert not list(tmp_path.glob("*/*.part"))


def test_an_interrupted_run_goes_on(results, monkeypatch):
    monkeypatch.setattr(record, "waited", lambda: 0.0)  # whatever else this machine does
    results().rows({"a": KEYS["a"]}, measured)
    assert results().rows({"a": KEYS["a"]}, unexpected)["a"]["ms"] == "1"
    assert set(results().rows(KEYS, measured)) == {"a", "b"}  # "b" is missing, so both are measured
    with pytest.raises(AssertionError, match="measured again"):
        results(again=True).rows(KEYS, unexpected)


def test_disturbed_rows_are_measured_again(results, monkeypatch):
    waits = itertools.count(0, 10**9)
    monkeypatch.setattr(record, "waited", lambda: next(waits))
    rows = results().rows(KEYS, measured)
    assert float(rows["a"]["waited"]) > record.DISTURBED
    assert results().current(**KEYS["a"]) is None


@pytest.mark.parametrize("change", ["torch", "threads", "date"])
def test_rows_of_something_else_are_measured_again(results, monkeypatch, change):
    results().rows(KEYS, measured)
    if change == "date":
        later = datetime.now(timezone.utc) + timedelta(seconds=5)
        monkeypatch.setattr(record, "changed", lambda: later)
    else:
        now = record.stamp("cpu") | {change: "another"}
        monkeypatch.setattr(record, "stamp", lambda device: now)
    assert results().current(**KEYS["a"]) is None


def test_committed_rows_have_their_columns():
    columns = {
        "generate": (*generate.KEYS, *generate.VALUES[:-1]),  # the H100's rows have no weights_mb
        "linear_cross_entropy": (*linear_cross_entropy.KEYS, *linear_cross_entropy.VALUES),
        "metal_candle": (*metal_candle.KEYS, *metal_candle.VALUES),
        "apple_counted": (*apple.KEYS, *apple.COUNTED),
    }
    paths = list((ROOT / "benchmarks/results").glob("*/*.csv"))
    assert paths
    for path in paths:
        for row in record.read(path):
            assert {*columns.get(path.stem, (*ops.KEYS, *ops.VALUES)), *record.STAMP} <= row.keys(), path
            assert record.slug(row["device"]) == path.parent.name


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bench", ops.benches())
def test_every_committed_row_is_still_a_case(bench, device):
    """Names are unique, and what was recorded can be measured again."""
    cases = ops.benches()[bench](device, False)
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    shown = {
        (case.op, case.shape, ops.NAMES[case.dtype], case.kind, contender)
        for case in cases
        for contender in case.contenders
    }
    for folder in record.machines():
        if folder.name.startswith("nvidia") == (device == "cuda"):
            for row in record.read(folder / f"{bench}.csv"):
                key = tuple(row[key] for key in ops.KEYS)
                assert key in shown or row["contender"] in tables.NO_RIVALS, key


def test_a_case_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ops.py", "softmax", "--device", "cpu", "--results", str(tmp_path)])
    (case,) = (case for case in ops.softmax("cpu", False) if case.name == "softmax (64, 1024) bf16")
    monkeypatch.setattr(ops, "benches", lambda: {"softmax": lambda device, full: [case]})
    monkeypatch.setattr(ops, "interleave", partial(timing.interleave, rounds=2, calls=1))
    ops.main()
    printed = capsys.readouterr().out
    assert "GB/s" in printed and "of copy" in printed
    (path,) = tmp_path.glob("*/softmax.csv")
    assert [row["contender"] for row in record.read(path)] == ["torch_fused", "torch.softmax", "torch composed"]


def test_peers_in_the_rows_of_metal_candle(monkeypatch):
    """Other libraries' kernels are timed in the rows of ops that they have, where they are installed."""
    makes = {
        "softmax": lambda: metal_candle.softmax_of((2, 3, 8), "cpu"),
        "rms_norm": lambda: metal_candle.norm_of("rms_norm", (4, 8), True, "cpu"),
        "top-p 0.9": lambda: metal_candle.sample_honest("top-p 0.9", 100, "cpu"),
    }
    shapes = []
    found: dict = {}
    monkeypatch.setattr(peers, "_installed", lambda: found)
    for op, make in makes.items():
        assert "a library" not in make()
        found[op] = {"a library": lambda *args: shapes.append([a.shape for a in args]) or 1}
        make()["a library"]()
    assert shapes == [[(6, 8)], [(4, 8), (8,)], [(1, 100)]]


@pytest.mark.parametrize("row", ["KV cache, single layer", "greedy, vocabulary 1000", "softmax", "AdamW"])
def test_rows_of_metal_candle_are_measured(monkeypatch, row):
    monkeypatch.setattr(metal_candle, "SAMPLES", 1)
    (chosen,) = (each for each in metal_candle.rows() if each.name == row)
    for waits, (_, make) in enumerate((chosen.published, chosen.honest)):
        contenders = make("cpu")
        assert "torch_fused" in contenders
        for timed in metal_candle.measure(contenders, "cpu", bool(waits)).values():
            columns = metal_candle.columns(timed)
            assert columns.keys() == set(metal_candle.VALUES) and float(columns["ms"]) > 0


# ---- the timer ------------------------------------------------------------------------------------------------------


def test_timing():
    found = timing.Timing([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.seconds == 3.0
    assert found.spread == pytest.approx(2 / 3)
    assert metal_candle.columns(timing.Timing([1.0, 1.1, 1.0, 1.1, 9.0]))["outliers"] == "1"


def test_contenders_are_interleaved():
    calls: list[str] = []
    contenders = {name: [partial(calls.append, f"{name}{i}") for i in range(2)] for name in "ab"}
    found = timing.interleave(contenders, "cpu", rounds=3, calls=2)
    measured = [["a0", "a1"], ["b0", "b1"]] * 3
    assert calls == ["a0", "a0", "b0", "b0", *itertools.chain(*measured)]  # twice first, to warm up and to plan
    assert all(len(each.samples) == 3 for each in found.values())


def test_contexts_are_entered_around_samples():
    seen: list[str] = []

    @contextlib.contextmanager
    def enter():
        seen.append("in")
        yield
        seen.append("out")

    timing.interleave({"a": [lambda: seen.append("call")]}, "cpu", rounds=1, calls=1, around={"a": enter})
    assert seen == ["in", "call", "out"] * 3


def test_generation_is_measured():
    calls: list[tuple[str, int]] = []
    setting = generate.Setting(torch.bfloat16, "greedy", 2, 5, 8)

    def run(name: str, ids: torch.Tensor, count: int) -> None:
        assert ids.shape == (2, 5)
        calls.append((name, count))

    found = {name: generate.Contender(partial(run, name)) for name in "ab"}
    columns = generate.measure(setting, found, 100, "cpu")
    assert calls[8:] == [("a", 1), ("a", 8), ("b", 1), ("b", 8)] * generate.ROUNDS
    assert columns["a"]["tokens_s"] > 0 and columns["b"].keys() == {"tokens_s", "spread", "ms_token", "ttft_ms"}


def test_contenders_of_the_loss_are_interleaved():
    """Each in a process of its own, which says how long a step took and how much memory."""
    found = linear_cross_entropy.measure((64, 64), torch.float32, ["torch_fused", "torch"], "cpu", 1, 2)
    for samples in found.values():
        assert len(samples) == 2
        for seconds, peak, weight_grad in samples:
            assert seconds > 0 and peak > weight_grad == 151936 * 64 * 4 / 1e6


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_pages_are_those_of_the_rows():
    """Byte for byte, so that no number in them differs from the CSV files."""
    assert report.page() == report.REPORT.read_text()
    assert report.readme() == report.README.read_text()


def test_no_number_is_measured_elsewhere():
    """Outside of what the report writes, no page states a speed."""
    units = r"\d(\.\d+)? ?(us|ms|tokens? (a|per) second|GB/s|times as fast|x as fast)\b"
    pages = [report.README, *(path for path in (ROOT / "docs").glob("*.md") if path != report.REPORT)]
    for page in pages:
        text = re.sub(f"{report.BEGIN}.*?{report.END}", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(units, text), (page.name, re.search(units, text))


def test_readme_is_short():
    assert len(report.README.read_text().splitlines()) <= 120


def test_every_row_of_metal_candle_is_there_twice():
    rows = metal_candle.rows()
    assert {row.name: row.quoted for row in rows} == PUBLISHED
    lines = report.REPORT.read_text().splitlines()
    for row in rows:
        published, honest = (
            [line for line in lines if line.startswith(f"| {row.name} |") and f"| {kind}: " in line]
            for kind in (metal_candle.PUBLISHED, metal_candle.HONEST)
        )
        assert published and len(published) == len(honest)
        assert all(f"| {row.quoted} |" in line or not row.quoted for line in published)


def test_a_row_that_was_not_run_says_so():
    page = "\n".join(tables.metal_candle_tables([]))
    assert page.count("| not run | not run |") == 2 * len(metal_candle.rows())


@pytest.mark.parametrize(
    "spread, share, reason",
    [("0.01", "0.5", ""), ("0.9", "0.5", "within the spread of both"), ("0.01", "0.9", "bound by memory, at 0.90")],
)
def test_slower_rows_have_the_reasons_that_the_rows_show(spread, share, reason):
    row = {"spread": spread, "copy_share": share}
    rows = [row | {"contender": name, "ms": ms} for name, ms in (("torch_fused", "2"), ("torch.softmax", "1"))]
    page = "\n".join(tables.slower_table({"softmax (1, 1) f32": rows}))
    assert f"| softmax (1, 1) f32 | 2 ms | torch.softmax 1 ms | 0.50 | {reason}" in page
    assert not list(tables.slower_table({"softmax (1, 1) f32": rows[:1]}))


def test_a_share_beside_a_plain_read_is_of_that_read():
    ours = {"contender": "torch_fused", "ms": "28.6", "copy_share": "1.08"}
    assert tables.share(ours, [ours]) == "1.08"
    assert tables.share(ours, [ours, {"contender": tables.READ, "ms": "15.2"}]) == "0.53 of a read"


@pytest.mark.parametrize("script", [run, ops, metal_candle, generate, apple], ids=lambda script: script.__name__)
def test_the_options_are_explained(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.main()
    assert "--device" in capsys.readouterr().out


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_prediction():
    low, high = apple.predicted(1e9, 3, gb_s=100)
    fast, slow = apple.LAUNCH_SECONDS
    assert low == pytest.approx(0.01 + 3 * fast)
    assert high == pytest.approx(0.01 / apple.SHARE_REACHED[1] + 3 * slow)


def test_what_is_counted_for_a_prediction():
    op = next(op for op in apple.ops() if op.name == "rms_norm")
    launches, moved = op.counted()
    operands = 3 * 896 * torch.bfloat16.itemsize  # x, weight, result
    assert launches == 1 and operands <= moved < operands + 256


@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_counted_for_a_token(bits):
    """Of parts of a model; here the whole is small enough to be counted too."""
    sizes = decode.Sizes("", 3, 128, 2, 1, 64, 192, 3 * apple.PART)
    op = apple.token(sizes, bits)
    launches, moved = op.counted()
    assert launches == 5 * sizes.layers + 2 + apple.counted(lambda: greedy(torch.zeros(1, 3072)))[0]
    assert (launches, moved) == apple.counted(op.make("cpu"))
    shape = (1, 1, apple.CONTEXT)
    assert decode.nbytes(sizes, bits, shape, torch.bfloat16) < moved
