"""The goodput benchmark: order of searches, tables and pictures; servers of known capacity."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.fleet import Fleet
from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.bench.open_loop import BacklogTally
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.promises import Outcome, Promise
from xllm_plugin.bench.schedulers import Side, choose_sides, reference_of
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.bench.traffic import Traffic
from xllm_plugin.bench.trials import Deadline, Key, Stage, Trial
from xllm_plugin.cli.bench import _load
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "slo_goodput"
# One request at a time and 100 ms each: 10 a second; four at a time: 40.
NARROW = ("--slots", "1", "--ttft-ms", "100")
WIDE = ("--slots", "4", "--ttft-ms", "100")
TIGHT, LOOSE = Promise(100, 50), Promise(400, 100)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    command = _load(FOLDER / "bench.py")
    return sys.modules[str(command.callback.__module__)]


@pytest.fixture
def run(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    vocabulary_folder: Path,
    make_fake_sides: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., Any]:
    flags = {"stock-best": NARROW, "fcfs": NARROW, "slo": WIDE}
    monkeypatch.setattr(bench, "choose_sides", make_fake_sides(flags))

    def invoke(*arguments: str) -> Any:
        always = ("--model", str(vocabulary_folder), "--json", str(tmp_path / "result.json"))
        traffic = ("--seconds", "0.5", "--burst-factor", "1", "--start-rate", "16")
        return CliRunner().invoke(bench.command, [*always, *traffic, *arguments])

    return invoke


def test_a_run_against_servers_of_known_capacity(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run(
        "--sides", "stock-best,fcfs,slo", "--promises", "800/200", "--repeats", "1", "--most", "2"
    )
    assert done.exit_code == 0, (done.output, done.exception)
    result = schema.load(tmp_path / "result.json")
    assert result.passed
    sides = [row.labels["side"] for row in result.rows if row.figure("goodput")]
    assert sides == ["stock-best", "fcfs (best static)", "slo"]
    assert {trial["told"] for trial in result.details["trials"]} == {None, "800/200"}
    assert set(result.details["ready_s"]) == {"stock-best", "fcfs", "slo"}
    for picture in ("result.png", "result-burst.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@dataclass(slots=True)
class KnownStage(Stage):
    """A stage whose sides keep every promise up to a rate of their own, and half of them beyond."""

    capacity: dict[str, float] = field(default_factory=dict)
    measured: list[tuple[str, str]] = field(default_factory=list)
    limit: int = 1000

    def prepare(self, side: Side) -> None:
        """Nothing to start."""

    def _run(self, side: Side, key: Key, promise: Promise) -> Trial:
        self.measured.append((side.name, str(promise)))
        if len(self.measured) >= self.limit:
            self.deadline = Deadline(0)
        kept = self.capacity[side.name] * (promise.ttft_ms / 400 if side.is_slo else 1)
        is_over = key.requests_per_s > kept
        outcomes = [_outcome(is_late=is_over and bool(n % 2)) for n in range(10)]
        return Trial(key, tuple(outcomes), BacklogTally(), 1.0, 1.0, 0.0, 0.0)


def _outcome(*, is_late: bool) -> Outcome:
    first_s = 60.0 if is_late else 0.05
    return Outcome(
        trace="t",
        due_s=0.0,
        prompt_tokens=1,
        output_tokens=1,
        sent_s=0.0,
        first_s=first_s,
        last_s=first_s,
        received_tokens=1,
        status=200,
    )


SIDES = {"stock-best": 4.0, "fcfs": 8.0, "fcfs-256": 12.0, "fcfs-128": 10.0, "slo": 20.0}


@pytest.fixture
def searched(bench: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    def make(limit: int = 1000) -> Any:
        sides = choose_sides("/m", list(SIDES), ())
        traffic = Traffic({}, Vocabulary(1), 1, 1, 1, Bursts(), 1.0, 0)
        reporter = Reporter(Console(quiet=True), 1)
        stage = KnownStage(
            traffic,
            (LOOSE, TIGHT),
            Fleet(tmp_path, reporter.waiting),
            reporter,
            Deadline(1e9),
            reference_of(sides),
            capacity=SIDES,
            limit=limit,
        )
        ladder = Ladder.between(0.5, 64, bench.RATIO)
        search = bench.Search(
            stage=stage,
            ladder=ladder,
            sides=sides,
            promises=(LOOSE, TIGHT),
            repeats=3,
            goal=0.9,
            most=8,
            start_rate=2.0,
        )
        search.run()
        return search

    return make


def test_every_side_is_found_and_the_best_is_named(
    searched: Callable[..., Any], bench: ModuleType
) -> None:
    search = searched()
    assert not search.skipped
    for name, capacity in SIDES.items():
        for value in search.goodput(name, LOOSE):
            assert capacity / bench.RATIO < value < capacity * bench.RATIO
    assert search.best_static(LOOSE) == search.best_static(TIGHT) == "fcfs-256"
    assert max(search.goodput("slo", TIGHT)) < min(search.goodput("slo", LOOSE)) / 3


def test_only_contenders_are_repeated(searched: Callable[..., Any]) -> None:
    search = searched()
    repeats = {name: len(search.goodput(name, LOOSE)) for name in SIDES}
    assert repeats == {"stock-best": 1, "fcfs": 3, "fcfs-256": 3, "fcfs-128": 1, "slo": 3}


def test_a_side_that_is_not_told_is_measured_for_the_first_promise_alone(
    searched: Callable[..., Any],
) -> None:
    measured = searched().stage.measured
    assert {promise for side, promise in measured if side != "slo"} == {str(LOOSE)}
    assert {promise for side, promise in measured if side == "slo"} == {str(LOOSE), str(TIGHT)}
    # Stock alone and first; then the others in turn, another one first in every repeat.
    order = [side for side, _ in measured]
    assert order[: order.count("stock-best")] == ["stock-best"] * order.count("stock-best")


def test_a_later_repeat_costs_few_trials(searched: Callable[..., Any]) -> None:
    search = searched()
    for name in ("fcfs", "slo"):
        side = next(side for side in search.sides if side.name == name)
        later = [t for t in search.trials(side, LOOSE) if t.key.repeat > 0]
        assert len(later) <= 2 * 3


def test_what_the_deadline_cut_off_is_no_result(
    bench: ModuleType, searched: Callable[..., Any]
) -> None:
    search = searched(limit=7)
    assert ("slo at 400/100", 0) in search.skipped
    assert not search.goodput("slo", LOOSE)
    check = bench.finished_check(search)
    assert not check.passed
    assert "slo at 400/100" in check.detail
    list(bench.goodput_rows(search))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sides", "xllm"), "side 'xllm' unknown"),
        (("--promises", "1000"), "1000/50"),
        (("--traces", "mooncake"), "choose from azure-code, azure-conv"),
        (("--lowest-rate", "5", "--highest-rate", "1"), "lowest <= highest"),
    ],
)
def test_mistakes_are_named(
    run: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "slo_goodput")
