"""Steps come back from the file as they were."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler.predictor import StepShape
from xllm_plugin.scheduler.trace import StepTrace, TracedStep, read_trace


def step(number: int) -> TracedStep:
    return TracedStep(
        step=number,
        began_s=number / 3,
        shape=StepShape().with_decodes(3, 700).with_prefill(20),
        predicted_ms=9.5,
        error=0.1,
        measured_ms=10.25,
        worker_ms=9.0,
        bound="tpot",
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for first in (1, 3):  # a second engine, or start, goes on with the file
        trace = StepTrace(path, rank=1)
        trace.write(step(first))
        trace.write(step(first + 1))
        trace.close()
        trace.close()
        trace.write(step(99))
    assert list(read_trace(path)) == [step(number) for number in (1, 2, 3, 4)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_that_is_cut_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    trace = StepTrace(path)
    trace.write(step(1))
    trace.close()
    with path.open("ab") as file:
        file.write(b'{"step": 2, "beg')
    assert list(read_trace(path)) == [step(1)]


def test_a_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduler\.step_trace is .*No such file"):
        StepTrace(tmp_path / "absent" / "steps.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_ends_the_trace_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    trace = StepTrace(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        trace.write(step(1))
        trace.write(step(2))
    (record,) = caplog.records
    assert os.strerror(28) in record.getMessage()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("hello\n")
    with pytest.raises(ConfigError, match="holds no steps"):
        list(read_trace(path))
    with pytest.raises(ConfigError, match="holds no steps"):
        list(read_trace(tmp_path / "absent"))
