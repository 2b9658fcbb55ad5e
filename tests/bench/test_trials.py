"""A trial is run once, judged by every promise, and leaves a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import Side, choose_sides
from xllm_plugin.bench.traces import Lengths, Vocabulary
from xllm_plugin.bench.traffic import Traffic
from xllm_plugin.bench.trials import Deadline, Stage, open_stage

STRICT, LOOSE = Promise(1e-6, 1000), Promise(60_000, 60_000)
TRAFFIC = Traffic(
    traces={"t": (Lengths(8, 3),)},
    vocabulary=Vocabulary(50),
    shorten=1,
    max_input=100,
    max_output=20,
    bursts=Bursts(),
    window_s=0.3,
    seed=0,
)


def fake_side(name: str, *flags: str) -> Side:
    (side,) = choose_sides("/m", (name,), ())
    port = str(side.server.port)
    command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", port, *flags)
    return replace(side, server=replace(side.server, command=command))


@contextmanager
def stage(tmp_path: Path, reference: Side) -> Iterator[Stage]:
    with open_stage(
        TRAFFIC,
        (LOOSE, STRICT),
        reference,
        Console(quiet=True),
        steps=1,
        limit_s=60,
        keep_logs=tmp_path,
    ) as opened:
        yield opened


def test_a_side_that_is_not_told_is_measured_once_for_all_promises(tmp_path: Path) -> None:
    fcfs, slo = fake_side("fcfs"), fake_side("slo")
    with stage(tmp_path, fcfs) as opened:
        first = opened.measure(fcfs, 20, 0, LOOSE)
        assert opened.measure(fcfs, 20, 0, STRICT) is first
        assert opened.measure(fcfs, 20, 1, LOOSE) is not first
        told = opened.measure(slo, 20, 0, LOOSE)
        assert opened.measure(slo, 20, 0, STRICT) is not told
    assert (first.attainment(LOOSE).share, first.attainment(STRICT).share) == (1, 0)
    summary = json.loads(json.dumps(first.summary((LOOSE, STRICT))))
    assert summary["verdicts"] == {str(LOOSE): {"met": 6}, str(STRICT): {"late": 6}}
    assert summary["requests"] == 6
    checks = opened.checks()
    assert [check.passed for check in checks] == [True] * 4, checks
    assert checks[0].name == "outputs of fcfs equal those of fcfs"


def test_a_backlog_counts_by_the_second(tmp_path: Path) -> None:
    fcfs = fake_side("fcfs", "--ttft-ms", "5")
    with stage(tmp_path, fcfs) as opened:
        trial = opened.measure(fcfs, 20, 0, LOOSE, backlog=2)
        assert opened.measure(fcfs, 20, 0, LOOSE) is not trial
    assert trial.offline_output_tok_s == trial.backlog.output_tokens / 0.3
    assert trial.offline_tok_s > trial.offline_output_tok_s > 0


def test_wrong_outputs_and_failures_fail_their_checks(tmp_path: Path) -> None:
    fcfs = fake_side("fcfs")
    wrong = fake_side("fcfs-256", "--token-shift", "1")
    failing = fake_side("priority", "--fail-every", "25")
    with stage(tmp_path, fcfs) as opened:
        opened.prepare(fcfs)
        opened.measure(wrong, 20, 0, LOOSE)
        opened.measure(failing, 60, 0, LOOSE)
    failed = [check.name for check in opened.checks() if not check.passed]
    assert failed == [
        "outputs of fcfs-256 equal those of fcfs",
        "no request failed (refused and ended ones are violations, not failures)",
    ]


def test_a_deadline_is_over_when_its_time_is() -> None:
    now = [5.0]
    deadline = Deadline(10, clock=lambda: now[0])
    assert not deadline.is_over
    now[0] = 15.0
    assert deadline.is_over


def test_the_reference_comes_first(tmp_path: Path) -> None:
    fcfs, other = fake_side("fcfs"), fake_side("priority")
    with stage(tmp_path, fcfs) as opened, pytest.raises(AssertionError, match="prepared first"):
        opened.prepare(other)
