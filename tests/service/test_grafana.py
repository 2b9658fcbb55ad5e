"""The Grafana dashboards ask for nothing that is not there."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Metric

from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.testing.service_harness import serving

FOLDER = Path(__file__).parents[2] / "docs" / "grafana"
_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "summary": ("_count", "_sum"),
}
_NAME = re.compile(r"\b(?:xllm_service|xllm:|vllm:|process_)\w+")


def dashboards() -> list[Path]:
    found = sorted(FOLDER.glob("*.json"))
    assert found
    return found


def strings(value: Any) -> Iterator[str]:
    """Every query of a dashboard."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "query") and isinstance(inner, str):
                yield inner
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def asked(prefix: str) -> set[str]:
    """Every metric name with this prefix in any dashboard."""
    queries = (query for path in dashboards() for query in strings(json.loads(path.read_text())))
    names = {name for query in queries for name in _NAME.findall(query)}
    found = {name for name in names if name.startswith(prefix)}
    assert found
    return found


def exported(families: Iterable[Metric]) -> set[str]:
    """The names of their samples."""
    return {one.name + end for one in families for end in _SUFFIXES[one.type]}


@pytest.mark.parametrize("path", dashboards(), ids=lambda path: path.name)
def test_it_can_be_imported(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"]
    assert board["title"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {one["name"] for one in board["templating"]["list"]}
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["datasource"]["uid"] == "${datasource}"
        for query in strings(panel["targets"]):
            used = set(re.findall(r"\$(\w+)", query)) - {"__rate_interval"}
            assert used <= variables, query
            assert query.count("(") == query.count(")")
            assert query.count("{") == query.count("}")


def test_the_services_metrics_are_there(run: Any) -> None:
    async def names() -> set[str]:
        async with serving() as harness:
            return exported(ServiceCollector(harness.proxy).collect())

    assert asked("xllm_service") <= run(names())


def test_the_instances_own_metrics_are_there() -> None:
    pytest.importorskip("fastapi", reason="vLLM's API server brings FastAPI")
    from xllm_plugin.instance.engines import EngineGroup, EngineReader
    from xllm_plugin.instance.metrics import XllmCollector, admission_counter

    registry = CollectorRegistry()
    admission_counter(registry)
    families = [*registry.collect()]
    collector = XllmCollector(EngineReader(EngineGroup("abcde", Path("/nowhere")), 30), "m")
    assert asked("xllm:") <= exported([*families, *collector.describe()])


def test_vllms_metrics_are_there() -> None:
    """Read in vLLM's source: to import its loggers takes as long as a server's start."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    source = Path(found.submodule_search_locations[0], "v1", "metrics", "loggers.py").read_text()
    for name in asked("vllm:"):
        stem = re.sub(r"_(total|bucket|sum|count)$", "", name)
        assert f'name="{stem}"' in source, name
