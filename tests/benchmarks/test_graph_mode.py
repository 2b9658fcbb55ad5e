"""The graph-mode benchmark without an engine: its questions and its tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from xllm_plugin.bench.commands import beside
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "benchmarks" / "graph_mode"


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    found: ModuleType = beside(FOLDER, "driver")
    return found


def test_every_ask_has_tokens_of_its_own(bench: ModuleType) -> None:
    """A prompt seen before would be read from the prefix cache."""
    point = bench.Point("decode", 8)
    jobs = [point.job(range(100, 200), repeat, [form]) for repeat in (0, 1) for form in "ab"]
    assert all(len(job["prompts"]) == 8 for job in jobs)
    seen = {tuple(prompt) for job in jobs for prompt in job["prompts"]}
    assert len(seen) == 32


def test_the_prompts_of_a_bucket_run_on_the_dynamic_graph(driver: ModuleType) -> None:
    """A graph of one batch size refuses others, and a decode has a prefill before it."""
    graph = driver.for_one_size(1, lambda *_: "bucket", lambda *_: "dynamic")
    assert [graph(None, [0] * count, None) for count in (128, 1, 2)] == [
        "dynamic",
        "bucket",
        "dynamic",
    ]


def test_forms_take_turns_and_buckets_are_for_their_own_size(bench: ModuleType) -> None:
    asked: list[str] = []

    class Engine:
        def ask(self, job: dict[str, list[str]]) -> dict[str, dict[str, float]]:
            asked.extend(job["forms"])
            return {"ms": {form: 2.0 if form == "eager" else 1.0 for form in job["forms"]}}

    class Words:
        def ordinary(self) -> range:
            return range(100)

    points = (bench.Point("decode", 1), bench.Point("decode", 8), bench.Point("prefill", 256))
    plan = bench.Plan(Path(), Words(), points, (1,), 2, Path())
    found = bench.Found()
    for repeat in range(2):
        for point in points:
            bench.take_turns(plan, point, repeat, (Engine(), Engine()), found)
    assert asked[:4] == ["eager", "dynamic", "1", "native"]
    assert asked[10:14] == ["native", "1", "dynamic", "eager"]
    rows = bench.step_rows(found, points)
    assert [row.labels["step"] for row in rows] == [
        "decode, batch 1",
        "decode, batch 8",
        "prefill, 256 tokens",
    ]
    assert rows[0].figure("bucket / eager").median == 0.5
    assert rows[1].figure("bucket") is None
    assert rows[1].figure("native / eager").n == 2


def test_costs_and_the_time_beside_them_are_shown(bench: ModuleType) -> None:
    found = bench.Found()
    found.costs["dynamic"] = {
        "wall_s": 90.0,
        "cpu_s": 60.0,
        "peak_bytes": 2**30,
        "disk_bytes": 2**21,
        "read_s": 1.5,
    }
    found.meanwhile["afterwards"] = {"ms": [3.0, 4.0, 8.0], "child_cores": 0.0}
    (cost,) = bench.cost_rows(found)
    assert cost.figure("child's memory").median == 1024
    (beside_it,) = bench.meanwhile_rows(found)
    assert beside_it.figure("step").maximum == 8.0


def test_a_model_without_native_layers_is_refused(bench: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MixtralForCausalLM"]}')
    with pytest.raises(ConfigError, match="--model smollm2"):
        bench.require_native(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    bench.require_native(tmp_path)


def test_a_typical_step_leaves_the_extremes_out(driver: ModuleType) -> None:
    assert driver.middle([100.0, 1.0, 2.0, 3.0]) == 2.5
    assert driver.middle([7.0]) == 7.0


def test_what_live_children_took_is_counted(driver: ModuleType) -> None:
    busy = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.6: pass\ninput()"]
    with subprocess.Popen(busy, stdin=subprocess.PIPE) as child:
        while driver.children_cpu_s() < 0.3:
            assert child.poll() is None
        assert child.stdin is not None
        child.stdin.close()
