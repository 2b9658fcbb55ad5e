"""The collector in real Prometheus registries, and the /metrics route of several processes."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Response
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from xllm_plugin.channel import EngineChannel
from xllm_plugin.instance.engines import EngineGroup, EngineReader
from xllm_plugin.instance.metrics import XllmCollector, extend_metrics_route, register
from xllm_plugin.scheduler.slo_metrics import SLO_SECTION, Attainment, SloSnapshot
from xllm_plugin.xtensor.messages import MemorySection

Start = Callable[[int], EngineChannel]


@pytest.fixture
def collector(directory: Path) -> Iterator[XllmCollector]:
    collector = XllmCollector(EngineReader(EngineGroup("abcde", directory), 30), "served")
    yield collector
    collector.close()


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, engine) -> value, through Prometheus' own parser."""
    return {
        (sample.name, sample.labels["engine"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("xllm:")
    }


def test_a_scrape_shows_the_engines_figures(collector: XllmCollector, start_engine: Start) -> None:
    start_engine(0)
    registry = CollectorRegistry()
    register(collector, registry)
    text = generate_latest(registry).decode()
    found = samples(text)
    assert found.pop(("xllm:snapshot_age_seconds", "0")) >= 0
    assert found == {
        ("xllm:engine_up", "0"): 1,
        ("xllm:num_requests_running", "0"): 3,
        ("xllm:num_requests_waiting", "0"): 2,
        ("xllm:kv_blocks", "0"): 100,
        ("xllm:kv_blocks_free", "0"): 25,
        ("xllm:kv_cache_usage_ratio", "0"): 0.75,
        ("xllm:last_step_tokens", "0"): 64,
        ("xllm:last_step_seconds", "0"): 0.02,
        ("xllm:smoothed_step_seconds", "0"): 0.015,
        ("xllm:steps_total", "0"): 10,
        ("xllm:generated_tokens_total", "0"): 1234,
        ("xllm:preemptions_total", "0"): 1,
    }
    assert 'model_name="served"' in text


def test_an_elastic_kv_cache_shows_its_memory(
    collector: XllmCollector, start_engine: Start, memory: MemorySection
) -> None:
    engine = start_engine(0)
    engine.add_section("memory", lambda: memory)
    engine.publish_if_due(force=True)
    start_engine(1)
    registry = CollectorRegistry()
    register(collector, registry)
    text = generate_latest(registry).decode()
    found = samples(text)
    assert {name: value for (name, _), value in found.items() if "kv_memory" in name} == {
        "xllm:kv_memory_budget_bytes": 8000,
        "xllm:kv_memory_resident_bytes": 5000,
        "xllm:kv_memory_draining_bytes": 1000,
        "xllm:kv_memory_fragmentation_ratio": pytest.approx(0.2),
        "xllm:kv_memory_pool_bytes": 20_000,
        "xllm:kv_memory_pool_free_bytes": 1000,
        "xllm:kv_memory_pool_leased_bytes": 8000,
        "xllm:kv_memory_pool_unmet_bytes": 2500,
        "xllm:kv_memory_pool_members": 2,
        "xllm:kv_memory_pages": 4,  # the last state's
        "xllm:kv_memory_pages_created_total": 70,
        "xllm:kv_memory_pages_released_total": 10,
        "xllm:kv_memory_pages_mapped_total": 90,
        "xllm:kv_memory_pages_unmapped_total": 20,
        "xllm:kv_memory_pages_reused_total": 30,
        "xllm:kv_memory_pages_premapped_total": 5,
        "xllm:kv_memory_premap_failures_total": 2,
        "xllm:kv_memory_commit_seconds_count": 6,
        "xllm:kv_memory_commit_seconds_sum": 0.25,
        "xllm:kv_memory_release_seconds_count": 7,
        "xllm:kv_memory_release_seconds_sum": 0.5,
        "xllm:kv_memory_map_seconds_count": 8,
        "xllm:kv_memory_map_seconds_sum": 0.125,
        "xllm:kv_memory_unmap_seconds_count": 4,
        "xllm:kv_memory_unmap_seconds_sum": 1.5,
    }
    assert ("xllm:kv_memory_budget_bytes", "1") not in found
    assert 'engine="0",model_name="served",state="mapped"} 50.0' in text


def test_every_rank_has_its_own_label(collector: XllmCollector, start_engine: Start) -> None:
    start_engine(0)
    start_engine(3)
    registry = CollectorRegistry()
    register(collector, registry)
    assert {engine for _, engine in samples(generate_latest(registry).decode())} == {"0", "3"}


def test_an_absent_engine_is_down_and_keeps_its_last_figures(
    collector: XllmCollector, start_engine: Start
) -> None:
    registry = CollectorRegistry()
    register(collector, registry)
    assert samples(generate_latest(registry).decode()) == {("xllm:engine_up", "0"): 0}
    channel = start_engine(0)
    before = samples(generate_latest(registry).decode())
    channel.close()
    after = samples(generate_latest(registry).decode())
    assert after[("xllm:engine_up", "0")] == 0
    changed = {name for name, _ in before if before[name, "0"] != after[name, "0"]}
    assert changed == {"xllm:engine_up", "xllm:snapshot_age_seconds"}


def test_registering_asks_no_engine_and_may_be_repeated(
    directory: Path, collector: XllmCollector, start_engine: Start
) -> None:
    registry = CollectorRegistry(auto_describe=True)  # as vLLM's REGISTRY is
    register(collector, registry)
    assert collector._reader.recall() == ()
    again = XllmCollector(EngineReader(EngineGroup("abcde", directory), 30), "served")
    register(again, registry)
    start_engine(0)
    assert ("xllm:steps_total", "0") in samples(generate_latest(registry).decode())
    again.close()


def test_on_an_event_loop_the_last_figures_are_shown_without_asking(
    collector: XllmCollector, start_engine: Start
) -> None:
    registry = CollectorRegistry()
    register(collector, registry)
    start_engine(0)

    async def scrape() -> bytes:
        return generate_latest(registry)

    assert samples(asyncio.run(scrape()).decode()) == {}
    generate_latest(registry)
    assert samples(asyncio.run(scrape()).decode())["xllm:steps_total", "0"] == 10


def test_scrapes_from_many_threads_take_turns(
    collector: XllmCollector, start_engine: Start
) -> None:
    start_engine(0)
    registry = CollectorRegistry()
    register(collector, registry)
    results: list[float] = []

    def scrape() -> None:
        results.append(samples(generate_latest(registry).decode())["xllm:engine_up", "0"])

    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [1.0] * 8


def test_the_route_of_several_processes_gets_our_text_appended(
    collector: XllmCollector, start_engine: Start
) -> None:
    start_engine(0)
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    Gauge("vllm:num_requests_running", "Theirs.", registry=theirs).set(5)
    register(collector, ours)
    app = FastAPI()

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(theirs), media_type="text/plain; version=1.0.0")

    stock_route = app.routes[-1]
    stock_route.endpoint = lambda request: metrics()  # type: ignore[attr-defined]
    extend_metrics_route(app, ours)
    app.router.routes.remove(stock_route)  # as vLLM does when a plugin's route has the same path
    response = TestClient(app).get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=1.0.0")
    assert "vllm:num_requests_running 5.0" in response.text
    assert samples(response.text)["xllm:steps_total", "0"] == 10


def test_without_the_known_route_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    num_routes = len(app.routes)
    with caplog.at_level(logging.WARNING):
        extend_metrics_route(app, CollectorRegistry())
    assert len(app.routes) == num_routes
    assert len(caplog.records) == 1
    assert "GET /xllm/snapshot has the same figures" in caplog.text


def test_the_policy_slo_has_metrics_of_its_own(
    collector: XllmCollector, start_engine: Start
) -> None:
    channel = start_engine(0)
    slo = SloSnapshot(
        attainment=(
            Attainment(
                service_class="online",
                tenant="t",
                num_finished=5,
                num_kept=3,
                num_ttft_missed=1,
                num_tpot_missed=2,
            ),
        ),
        slack_counts=(1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 4),
        slack_sum_ms=500.0,
        model_error=0.07,
        is_model_reliable=True,
        predicted_ms=1500.0,
        measured_ms=1600.0,
        bounds={"tpot": 9},
        num_held={"online": 1, "offline": 6},
        offline_tokens=77,
    )
    channel.add_section(SLO_SECTION, lambda: slo)
    channel.publish_if_due(force=True)
    registry = CollectorRegistry()
    register(collector, registry)
    found = {
        (sample.name, *(sample.labels.get(k, "") for k in ("service_class", "bound", "le"))): (
            sample.value
        )
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    assert found["xllm:slo_requests_kept_total", "online", "", ""] == 3
    assert found["xllm:slo_tpot_missed_total", "online", "", ""] == 2
    assert found["xllm:plan_bounds_total", "", "tpot", ""] == 9
    assert found["xllm:requests_held_total", "offline", "", ""] == 6
    assert found["xllm:slack_seconds_bucket", "", "", "-1.0"] == 1
    assert found["xllm:slack_seconds_bucket", "", "", "-0.02"] == 1
    assert found["xllm:slack_seconds_bucket", "", "", "0.0"] == 3
    assert found["xllm:slack_seconds_bucket", "", "", "+Inf"] == 7
    assert found["xllm:steps_measured_seconds_total", "", "", ""] == 1.6
    assert found["xllm:step_model_error_ratio", "", "", ""] == 0.07
    assert found["xllm:step_model_reliable", "", "", ""] == 1
    assert found["xllm:offline_tokens_total", "", "", ""] == 77
