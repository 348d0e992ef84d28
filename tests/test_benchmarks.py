"""The benchmarks' timer, records, report and predictions; nothing here asserts a time."""

import csv
import itertools
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import apple  # noqa: E402
import cases  # noqa: E402
import generate  # noqa: E402
import metal_candle  # noqa: E402
import models  # noqa: E402
import peers  # noqa: E402
import record  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
import train  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402

from torch_fused import sampling  # noqa: E402
from torch_fused.ops.decode import decode_token_  # noqa: E402

SMALL = {
    "model_type": "qwen2", "num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "intermediate_size": 192, "vocab_size": 3 * apple.PART,
}  # fmt: skip


# ---- records --------------------------------------------------------------------------------------------------------


class Some(cases.Case):
    """Contenders of which every one takes as many milliseconds."""

    def __init__(self, *names: str, ms: float | None = None) -> None:
        def measure(case, device):
            assert ms is not None, "measured again"
            return {name: {"ms": ms} for name in names}

        super().__init__("x", "(1,)", "f32", "", dict.fromkeys(names), measure=measure)


@pytest.fixture
def rows_of(tmp_path):
    return partial(record.rows_of, path=tmp_path / "machine" / "some.csv", device="cpu")


def test_rows_are_kept(rows_of, tmp_path):
    rows_of(Some("a", ms=9.0))
    rows_of(Some("a", "b", ms=1.23456))
    (path,) = tmp_path.glob("*/some.csv")
    with path.open() as file:
        assert next(csv.reader(file)) == [*record.KEYS, "ms", *record.STAMP]
    assert [(row["contender"], row["ms"]) for row in record.read(path)] == [("a", "1.235"), ("b", "1.235")]
    assert not list(tmp_path.glob("*/*.part"))


def test_a_count_of_zero_is_not_a_missing_one():
    assert [record.text(value) for value in (0, 0.0, None, 1.23456)] == ["0", "0", "", "1.235"]


def test_an_interrupted_run_goes_on(rows_of):
    rows_of(Some("a", ms=1.0))
    assert rows_of(Some("a"), missing=True)[0]["ms"] == "1"
    assert len(rows_of(Some("a", "b", ms=1.0), missing=True)) == 2  # "b" is missing, so both are measured
    with pytest.raises(AssertionError, match="measured again"):
        rows_of(Some("a"))


def test_plots_are_those_of_the_results():
    """Every plot that the pages show is in the repository, and no other: not one of results that are gone."""
    linked = {
        Path(path).name for machine, found in record.results().items() for path, *_ in report.plots(machine, found)
    }
    assert linked == {path.name for path in (report.DOCS / "plots").iterdir()}


# ---- cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bench", run.BENCHES)
def test_every_committed_row_is_still_a_case(bench, device):
    """Names are unique, and what was recorded can be measured again."""
    found = list(run.BENCHES[bench](device))
    known = {(case.op, case.shape, case.dtype, case.kind): case for case in found}
    assert len(known) == len(found)
    for machine, results in record.results().items():
        if machine.startswith("nvidia") == (device == "cuda"):
            for row in results.get(bench, []):
                assert record.slug(row["device"]) == machine
                assert {*record.KEYS, *record.STAMP} <= row.keys()
                case = known[tuple(row[key] for key in record.KEYS[:4])]
                absent = "Liger-Kernel", "llama-cpp-python", "mlx-lm", "torch, in chunks"  # here, or with this torch
                assert row["contender"] in (*case.contenders, *absent), row


def test_a_case_is_measured(capsys, monkeypatch, tmp_path):
    options = ["softmax", "--only", "softmax (64, 1024) bf16", "--device", "cpu", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)  # both would outlast the test
    monkeypatch.setattr(run.logging, "disable_progress_bar", lambda: None)
    monkeypatch.setattr(cases, "interleave", partial(timing.interleave, rounds=2, calls=1))
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert "gb_s" in printed and "copy_share" in printed
    (path,) = tmp_path.glob("*/softmax.csv")
    assert [row["contender"] for row in record.read(path)] == ["torch_fused", "torch.softmax", "torch composed"]


def test_several_benchmarks_run_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "rope", "softmax", "--only", "nothing"])
    commands = []

    def ran(command, cwd):
        commands.append(command[2:])
        return SimpleNamespace(returncode=len(commands))

    monkeypatch.setattr(run.subprocess, "run", ran)
    assert run.main() == 2
    assert commands == [["rope", "--only", "nothing"], ["softmax", "--only", "nothing"]]


def test_peers_in_the_rows_of_metal_candle(monkeypatch):
    """Another library's kernels are timed in the rows of ops that it has, where it is installed."""
    shapes, found = [], {}
    monkeypatch.setattr(peers, "liger_kernels", lambda: found)
    for op, row in (("softmax", "softmax"), ("rms_norm", "RMS norm")):
        assert all("Liger-Kernel" not in case.contenders for case in metal_candle.rows() if case.op == row)
        found[op] = lambda *args: shapes.append([a.shape for a in args])
        *_, honest = (case for case in metal_candle.rows() if case.op == row)
        honest.calls()["Liger-Kernel"]()
    assert shapes == [[(14 * 128, 128)], [(1, 128, 896), (896,)]]


@pytest.mark.parametrize("row", ["KV cache, single layer", "greedy, vocabulary 1000", "softmax", "AdamW"])
def test_rows_of_metal_candle_are_measured(monkeypatch, row):
    monkeypatch.setattr(metal_candle, "SAMPLES", 1)
    workloads = [each for each in metal_candle.rows() if each.op == row]
    assert [each.kind for each in workloads] == [metal_candle.PUBLISHED, metal_candle.HONEST]
    for workload in workloads:
        assert "torch_fused" in workload.contenders
        for columns in workload.measure(workload, "cpu").values():
            assert columns.keys() == {"ms", "variation", "outliers", "samples"} and float(columns["ms"]) > 0


def test_only_adapters_are_trained_in_the_rows_of_metal_candle():
    model = models.adapted(torch.nn.Sequential(torch.nn.Linear(8, 8)), ["0"], rank=8)
    assert [len(p) for p in model.parameters() if p.requires_grad] == [8, 8]
    assert model(torch.ones(2, 8)).shape == (2, 8)


# ---- the timer ------------------------------------------------------------------------------------------------------


def test_timing():
    assert timing.columns([1.0, 2.0, 3.0, 4.0, 100.0]) == {"ms": 3000.0, "spread": pytest.approx(2 / 3)}
    assert metal_candle.columns([1.0, 1.1, 1.0, 1.1, 9.0])["outliers"] == "1"


def test_contenders_are_interleaved():
    calls: list[str] = []
    contenders = {name: [partial(calls.append, f"{name}{i}") for i in range(2)] for name in "ab"}
    found = timing.interleave(contenders, "cpu", rounds=3, calls=2)
    measured = [["a0", "a1"], ["b0", "b1"]] * 3
    assert calls == ["a0", "a0", "b0", "b0", *itertools.chain(*measured)]  # twice first, to warm up and to plan
    assert all(len(samples) == 3 for samples in found.values())


@pytest.mark.parametrize("wall", [False, True])
def test_a_gpu_pauses_while_calls_are_queued(monkeypatch, wall):
    """Unless wall time is asked for. The pause is not part of the time."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("pause"))
    monkeypatch.setattr(timing, "synchronize", lambda device: done.append("wait"))
    found = timing.interleave({"a": [lambda: done.append("call")]}, "cuda", rounds=1, calls=2, wall=wall)
    one = ["wait", "call", "call", "wait"] if wall else ["pause", "event", "call", "call", "event", "wait"]
    assert done[-len(one) :] == one
    assert wall or found == {"a": [0.003]}


def test_generation_is_measured():
    calls: list[tuple[str, int]] = []
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(vocab_size=100)

    def make(name: str) -> generate.Contender:
        def run(ids: torch.Tensor, count: int) -> None:
            assert ids.shape == (2, 5)
            calls.append((name, count))
            time.sleep(count / 1000)  # more tokens take longer

        return run, model if name == "transformers" else None

    contenders = {name: partial(make, name) for name in ("transformers", "b")}
    found = generate.texts(cases.Case("", "", "", "", contenders), "cpu", 2, 5, 8)
    timed = [(name, count) for name in ("transformers", "b") for count in (1, 8)]
    assert calls[-4 * generate.ROUNDS :] == timed * generate.ROUNDS
    assert found["b"].keys() == {"ms", "spread", "tokens_s", "ms_token", "ttft_ms"}
    assert found["transformers"].keys() - found["b"].keys() == {"weights_mb", "peak_mb", "copy_share"}


def test_a_patched_model_shares_the_weights_of_the_stock_one():
    model = small().bfloat16()
    (stock, same), (fused, patched) = (generate.contender(lambda: model, ours, do_sample=False) for ours in (0, 1))
    pairs = zip(model.parameters(), patched.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    ids = torch.arange(6).view(1, 6)
    assert torch.equal(stock(ids, 5), fused(ids, 5))
    assert same is model and not hasattr(model, "_torch_fused_decoder") and hasattr(patched, "_torch_fused_decoder")


def test_contenders_of_the_loss_are_interleaved():
    """How long a step took, and how much memory."""
    case = train.loss_case(64, 64, torch.float32, "cpu")
    case = replace(case, contenders={name: case.contenders[name] for name in ("torch_fused", "torch")})
    for columns in case.measure(case, "cpu").values():
        assert columns["weight_grad_mb"] == 151936 * 64 * 4 / 1e6
        assert columns["ms"] > 0 and columns["peak_mb"] > columns["weight_grad_mb"]


small = partial(models.made, "a small Qwen2", torch.float32, num_hidden_layers=1)


def test_contenders_of_training_do_the_same():
    """All weights are trained, and no gradients are kept."""
    trained, found, before = [], [], small()

    def load():
        trained.append(small())
        return trained[-1]

    for step in train.model_case("", "", "", load, 2, 8, "cpu").calls().values():
        step()
    for model in trained:
        pairs = list(zip(model.parameters(), before.parameters(), strict=True))
        assert all(new.grad is None and not torch.equal(new, old) for new, old in pairs)
        found.append(torch.cat([(new - old).detach().flatten() for new, old in pairs]))
    stock, fused = found
    assert (fused - stock).abs().mean() < 0.01 * stock.abs().mean()


def test_training_is_measured():
    case = train.model_case("", "", "", small, 2, 8, "cpu")
    for columns in case.measure(case, "cpu").values():
        assert columns.keys() == {"ms", "spread", "peak_mb", "tokens_s"}
        assert columns["tokens_s"] == pytest.approx(16 / columns["ms"] * 1e3)


def test_liger_patches_one_model(monkeypatch):
    """Its patch changes transformers' module, which the other contenders use."""
    module = sys.modules[Qwen2ForCausalLM.__module__]
    before, model = dict(vars(module)), small()

    def patch(*, model):
        module.Qwen2RMSNorm, module.apply_rotary_pos_emb = object, "liger's"
        model.forward = lambda: module.apply_rotary_pos_emb

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace(apply_liger_kernel_to_qwen2=patch))
    peers.patched_by_liger(model)
    assert model.forward() == "liger's" and dict(vars(module)) == before


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_pages_are_those_of_the_rows():
    """Byte for byte, so that no number in them differs from the CSV files."""
    assert report.pages() == {path: path.read_text() for path in (report.REPORT, report.README)}


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
    lines = report.REPORT.read_text().splitlines()
    assert len(metal_candle.PAGE["rows"]) == 30
    for name, row in metal_candle.PAGE["rows"].items():
        two = [
            [line for line in lines if line.startswith(f"| {name} |") and f"| {kind}: " in line]
            for kind in (metal_candle.PUBLISHED, metal_candle.HONEST)
        ]
        assert two[0] and len(two[0]) == len(two[1])
        assert all(f"| {row['quoted']} |" in line for line in two[0])


@pytest.fixture
def page_of(tmp_path):
    """The page of a machine with these rows, which have what is not given in common."""

    def page(*rows):
        common = {
            "op": "softmax",
            "shape": "(1, 1)",
            "dtype": "f32",
            "kind": "",
            "gb_s": "1",
            "copy_share": "0.5",
        } | record.stamp("cpu")
        record.write(tmp_path / "machine" / "softmax.csv", [common | row for row in rows])
        return report.pages(tmp_path)[report.REPORT]

    return page


def test_a_row_that_was_not_run_says_so(page_of):
    page = page_of({"contender": "torch_fused", "ms": "2"})
    assert page.count("| not run | not run |") == 60


@pytest.mark.parametrize(
    "spread, share, reason",
    [("0.01", "0.5", ""), ("0.9", "0.5", "within the spread of both"), ("0.01", "0.9", "bound by memory, at 0.90")],
)
def test_slower_rows_have_the_reasons_that_the_rows_show(page_of, spread, share, reason):
    ours, best = (
        {"contender": name, "ms": ms, "spread": spread, "copy_share": share}
        for name, ms in (("torch_fused", "2"), ("torch.softmax", "1"))
    )
    page = page_of(ours, best)
    assert f"| softmax, (1, 1) f32 | 2 ms | torch.softmax 1 ms | 0.50 | {reason}" in page
    assert "Slower" in page and "Slower" not in page_of(ours)


def test_a_share_beside_a_plain_read_is_of_that_read():
    ours = {"contender": "torch_fused", "ms": "28.6", "copy_share": "1.08"}
    assert report.share(ours, [ours]) == "1.08"
    assert report.share(ours, [ours, {"contender": report.READ, "ms": "15.2"}]) == "0.53 of a read"


def test_the_options_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        run.main()
    assert "--device" in capsys.readouterr().out


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_every_case_is_predicted():
    """Counts do not depend on the machine, so none may be missing."""
    counted = [row for results in record.results().values() for row in results.get("apple", [])]
    keys = {(case.op, case.shape, case.dtype, case.kind) for case in apple.counts()}
    assert {tuple(row[key] for key in record.KEYS[:4]) for row in counted} == keys


def test_prediction():
    low, high = apple.predicted(1e9, 3, gb_s=100)
    fast, slow = apple.LAUNCH_SECONDS
    assert low == pytest.approx(0.01 + 3 * fast)
    assert high == pytest.approx(0.01 / apple.SHARE_REACHED[1] + 3 * slow)


def test_what_is_counted_for_a_prediction():
    op = next(case for case in apple.counts() if case.op == "rms_norm")
    launches, moved = map(int, op.measure(op, "cpu")["torch_fused"].values())
    operands = 3 * 896 * torch.bfloat16.itemsize  # x, weight, result
    assert launches == 1 and operands <= moved < operands + 256


@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_counted_for_a_token(bits, monkeypatch):
    """Of parts of a model; here the whole is small enough to be counted too."""
    monkeypatch.setitem(models.MODELS, "small", SMALL)
    launches, moved = apple.token("small", bits)
    greedy = apple.counted(partial(sampling.greedy, torch.zeros(1, 3 * apple.PART)))[0]
    assert launches == 5 * SMALL["num_hidden_layers"] + 2 + greedy
    shape = (1, 1, apple.CONTEXT)
    step = models.step(models.made("small", torch.bfloat16, bits=bits), shape)
    assert (launches, moved) == apple.counted(partial(decode_token_, *step.args))
    assert models.nbytes("small", bits, shape, torch.bfloat16) < moved
