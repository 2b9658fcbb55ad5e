"""A model compiled in the background answers as stock does, and the next start reads the graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.testing.collect import Settings, _arguments, _environment, collect_in_child
from xllm_plugin.testing.equality import check_bit_equal, read_completions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

TEXT = Path(__file__).parents[2] / "benchmarks" / "equality" / "data" / "prompts.jsonl"

# `python -m xllm_plugin.testing.collect`, but the graph is waited for before the first answer.
WAITS = """
import sys, time, vllm
from xllm_plugin.testing import collect

class LLM(vllm.LLM):
    def __init__(self, **options):
        super().__init__(**options)
        core = self.llm_engine.engine_core.engine_core
        graph = core.model_executor.driver_worker.worker.model_runner._graph
        assert graph.state.name == "COMPILING", graph.state
        while graph.state.name == "COMPILING":
            time.sleep(0.2)
        assert graph.state.name == "LOADED", graph.state

vllm.LLM = LLM
collect.main()
"""


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        pytest.param("tiny-qwen3-moe", "bfloat16", id="MoE", marks=pytest.mark.full),
        pytest.param("smollm2", "float32", id="float32", marks=pytest.mark.full),
        pytest.param("tiny-deepseek-v2", "bfloat16", id="MLA", marks=pytest.mark.full),
    ],
)
def test_a_graph_swapped_in_and_one_read_at_start_answer_as_stock_to_the_last_bit(
    model: str, dtype: str, tmp_path: Path
) -> None:
    compiled = Settings(
        model=str(prepare(model)), dtype=dtype, max_tokens=16, limit=16, eager=False
    )
    cache = {"XLLM_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / "out.json"
    subprocess.run(
        [sys.executable, "-c", WAITS, *_arguments(compiled, TEXT, out)],
        env=_environment(compiled, "xllm", cache),
        check=True,
    )
    swapped_in = read_completions(out)
    (manifest,) = (tmp_path / "graphs").glob("*/manifest.json")
    made_ns = manifest.stat().st_mtime_ns

    read = collect_in_child(compiled, TEXT, platform="xllm", environment=cache).completions
    assert manifest.stat().st_mtime_ns == made_ns, "the next start compiles nothing"
    assert json.loads(manifest.read_text())["facts"]["vllm"]
    report = check_bit_equal(swapped_in, read)
    assert report.equal, report.summary()

    # Stock compiles the same code, at every start.
    stock = collect_in_child(compiled, TEXT, platform="native").completions
    report = check_bit_equal(stock, read)
    assert report.equal, report.summary()
