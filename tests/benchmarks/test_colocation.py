"""The co-location benchmark: what offline work costs servers of known capacity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema, trials
from xllm_plugin.bench.open_loop import Backlog
from xllm_plugin.bench.promises import Promise
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "colocation"
SLOTS = ("--slots", "4", "--ttft-ms", "20")


@pytest.fixture
def run(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    run_on_fakes: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., Any]:
    monkeypatch.setattr(bench, "GOODPUT", tmp_path / "none.json")
    monkeypatch.setattr(trials, "Backlog", partial(Backlog, lead_s=0.2))
    flags = {"priority": SLOTS, "slo": (*SLOTS, "--offline-apart")}
    return partial(run_on_fakes, flags, "--burst-factor", "1")


def test_a_run_against_servers_of_known_capacity(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run(
        *("--goodput-rate", "40", "--loads", "50", "--promise", "800/200", "--seconds", "0.5"),
        *("--repeats", "1", "--max-backlog", "8", "--max-violations", "0.2", "--most", "2"),
    )
    assert done.exit_code == 0, (done.output, done.exception)
    result = schema.load(tmp_path / "result.json")
    rows = {row.labels["side"]: row for row in result.rows if row.figure("with prompts")}
    assert list(rows) == ["priority", "slo"]
    assert rows["slo"].labels["online load"] == "50 % (20 req/s)"
    assert rows["slo"].figure("offline output").median > 0
    assert rows["slo"].figure("missed without offline work") is not None
    backlogs = {
        row.labels["offline at once"] for row in result.rows if "offline at once" in row.labels
    }
    assert "0" in backlogs
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_loads_are_shares_of_what_the_other_benchmark_found(
    bench: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    run = schema.begin("slo_goodput", question="?", command="xllm bench slo_goodput")
    details = {
        "best_static": {"1000/50": "fcfs-256"},
        "goodput_req_s": {"1000/50": {"fcfs": [9.0], "fcfs-256": [2.0, 3.0, 4.0]}},
    }
    schema.dump(run.finish(details=details), path)
    rate, origin = bench.goodput_rate(None, Promise(1000, 50), path)
    assert (rate, origin) == (3.0, "goodput of fcfs-256 in benchmarks/slo_goodput")
    assert bench.goodput_rate(7.0, Promise(1, 1), path) == (7.0, "--goodput-rate")
    with pytest.raises(ConfigError, match=r"no goodput at 500/35 ms.*--goodput-rate"):
        bench.goodput_rate(None, Promise(500, 35), path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "run `xllm bench slo_goodput"),
        (("--goodput-rate", "2", "--loads", "x"), "write percent"),
        (("--goodput-rate", "2", "--loads", "0"), "above 0"),
    ],
)
def test_mistakes_are_named(
    run: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)


def test_the_readme_has_the_markers() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "colocation")
