"""A result survives the way to disk and back, and damaged or half-written files are noticed."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from xllm_plugin.bench import files, provenance, schema
from xllm_plugin.bench.schema import Figure, Result
from xllm_plugin.errors import ConfigError

MakeResult = Callable[..., Result]


def test_round_trip(tmp_path: Path, make_result: MakeResult) -> None:
    path = tmp_path / "deep" / "result.json"
    schema.dump(make_result(), path)
    assert schema.load(path) == make_result()
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_figure_summarises_repeats() -> None:
    figure = Figure.of("rate", "tok/s", [3.0, 1.0, 2.0])
    assert (figure.median, figure.minimum, figure.maximum, figure.n) == (2.0, 1.0, 3.0, 3)
    with pytest.raises(ValueError, match="no values"):
        Figure.of("rate", "tok/s", [])
    with pytest.raises(ValueError, match="not in order"):
        Figure(name="rate", unit="", median=3, minimum=1, maximum=2, n=3)


def test_ratios_are_taken_within_a_repeat() -> None:
    ratio = Figure.ratio("times base", [2.0, 12.0, 30.0], [1.0, 4.0, 15.0])
    assert (ratio.unit, ratio.median, ratio.minimum, ratio.maximum) == ("", 2.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Figure.ratio("times base", [2.0, 12.0], [1.0])


def test_a_failed_check_fails_the_result(make_result: MakeResult) -> None:
    assert make_result().passed
    assert not make_result(passed=False).passed


def test_absent_and_foreign_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `xllm bench"):
        schema.load(tmp_path / "none.json")
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"name": "serving", "unknown": 1}))
    with pytest.raises(ConfigError, match="not a benchmark result of schema 1"):
        schema.load(other)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomically(path, "\ud800")
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        files.write_atomically(folder, "new")
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "result.json"]


def test_begin_records_machine_and_commit_but_no_host() -> None:
    run = schema.begin("serving", question="How much?", command="xllm bench serving")
    result = run.finish()
    assert result.machine.cores > 0
    assert result.machine.python == platform.python_version()
    assert len(result.commit) == 40 or result.commit == "unknown"
    assert result.started.tzinfo is not None
    if platform.node() not in {"", "localhost"}:
        assert platform.node() not in result.model_dump_json()


def test_paths_are_shown_relative() -> None:
    source = Path(schema.__file__).parent.parent.parent
    assert provenance.home_relative(f"{source}/benchmarks/x") == "./benchmarks/x"
    assert provenance.home_relative(f"{Path.home()}/models/y") == "~/models/y"
    assert provenance.home_relative("/else/where") == "/else/where"
