"""Has pytest-benchmark time every contender of every case of a bench_<op>.py, and records the rows.

Use: python -m pytest benchmarks/bench_softmax.py [--device cpu|cuda|mps] [--compile] [--full] [--again]
"""

import itertools

import pytest
import torch
from cases import Case, copy_beside
from harness import Timing, add_options, clock, keep_freed_memory, plan
from peers import ABSENT
from progress import Progress
from record import Results, device_name

from torch_fused.testing import NAMES

KEYS = ("op", "shape", "dtype", "kind", "contender")
VALUES = ("ms", "spread", "gb_s", "copy_share")
COMPILED = "torch.compile"


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser.addoption)
    parser.addoption("--compile", action="store_true", help="torch.compile is a contender")
    parser.addoption("--live", action="store_true", help="say rows as they come, beside a bar")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # one table: ours


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.option.threads)
    keep_freed_memory()
    config.pluginmanager.register(Report(config), "torch_fused-report")
    if config.option.live:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    pairs = [
        (case, contender)
        for case in metafunc.module.cases(option.device, option.full)
        for contender in case.contenders
        if option.compile or contender != COMPILED
    ]
    timed = pytest.mark.benchmark(timer=clock(option.device), disable_gc=True)
    metafunc.parametrize(
        "bench", [pytest.param(pair, id=f"{pair[0].name}-{pair[1]}", marks=timed) for pair in pairs], indirect=True
    )


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    option = request.config.option
    bench = request.path.stem.removeprefix("bench_")
    return Results(bench, KEYS, VALUES, option.results, option.device, option.again)


@pytest.fixture
def bench(request: pytest.FixtureRequest, results: Results):
    """Times one contender at one case, unless its row is up to date."""
    option = request.config.option
    report = request.config.pluginmanager.get_plugin("torch_fused-report")
    case, contender = request.param
    key = dict(zip(KEYS, (case.op, case.shape, NAMES[case.dtype], case.kind, contender), strict=True))

    def run() -> None:
        row = results.current(**key)
        if row is None:
            benchmark = request.getfixturevalue("benchmark")
            timing = timed(benchmark, case, contender, option.device)
            rate = case.nbytes / timing.seconds if case.nbytes else None
            share = rate / copy_beside(case, option.device) if rate else None
            columns = {"ms": timing.seconds * 1e3, "spread": timing.spread, "copy_share": share}
            row = results.add(**key, **columns, gb_s=rate / 1e9 if rate else None)
            benchmark.extra_info.update(row)
        report.add(case, row)

    return run


def timed(benchmark, case: Case, contender: str, device: str) -> Timing:
    with torch.no_grad():
        ring = itertools.cycle(case.calls(contender, device))
        call = lambda: next(ring)()  # noqa: E731
        count, samples = (1, 40) if case.once else plan(call, device)
        benchmark.pedantic(call, rounds=samples, iterations=count, warmup_rounds=1)
    return Timing.of(benchmark.stats.stats.data)


class Report:
    """Says each row: in a table at the end, or, in place of pytest's own reporter, as it comes, beside a bar."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self._lines: list[str] = []
        self._case: Case | None = None
        self._progress: Progress | None = None
        self._head = f"torch {torch.__version__}, {device_name(option.device)}, {option.threads} CPU threads"
        if ABSENT and option.device != "cpu":
            self._head += f"; not installed: {', '.join(ABSENT)}"

    def add(self, case: Case, row: dict[str, str]) -> None:
        if case is not self._case:
            self._say(case.name)
            self._case = case
        spread = f"+-{float(row['spread']) * 100:3.0f} %"
        rate = f"{float(row['gb_s']):8.1f} GB/s  {float(row['copy_share']):5.2f} of copy" if row["gb_s"] else ""
        self._say(f"  {row['contender']:28s} {float(row['ms']):10.4f} ms  {spread}  {rate}")

    def _say(self, line: str) -> None:
        if self._progress:
            self._progress.say(line)
        else:
            self._lines.append(line)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.live:
            self._progress = Progress("ops", len(session.items)).__enter__()
            self._say(self._head)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self._progress and report.failed:
            self._say(f"{report.nodeid}\n{report.longreprtext}")
        if self._progress and report.when == "teardown":
            self._progress.advance()

    def pytest_sessionfinish(self) -> None:
        if self._progress:
            self._progress.__exit__(None, None, None)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section(self._head)
        for line in self._lines:
            terminalreporter.line(line)
