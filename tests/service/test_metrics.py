"""What Prometheus gets: every documented name and no other, in an exposition that it can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import aiohttp
import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

import xllm_plugin.service
from xllm_plugin.registration import Load
from xllm_plugin.service.admin import AdminApi
from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.service.registry import Embedded
from xllm_plugin.testing.fake_instance import FakeInstance
from xllm_plugin.testing.fake_streams import FakeModel, stream_instance
from xllm_plugin.testing.service_harness import request, serving

README = (Path(xllm_plugin.service.__file__).parent / "README.md").read_text()
ROW = re.compile(r"^\| `(xllm_service\w*)` \| (\w+) \|([^|]*)\|([^|]+)\|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> its type and labels, as README's table has them."""
    return {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in ROW.findall(README)
    }


def test_the_documented_names_types_and_labels_are_the_exported_ones(run: Any) -> None:
    async def families() -> list[Any]:
        async with serving() as harness:
            return [*ServiceCollector(harness.proxy).collect()]

    found = {}
    for family in run(families()):
        # In the text format counters end in _total, and an info is a gauge that ends in _info.
        ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
        kind = "gauge" if family.type == "info" else family.type
        labels = set(family._labelnames)
        if family.type == "info":
            labels = set(family.samples[0].labels)
        assert family.name + ending not in found
        found[family.name + ending] = (kind, labels)
    assert documented() == found


def test_an_exposition_with_traffic_can_be_read(run: Any) -> None:
    async def exposition() -> str:
        async with serving(stream_instance(FakeModel([b"a", b"b"]))) as harness:
            (known,) = harness.proxy.fleet
            known.load = Load(num_running=1)
            known.stats.count_error("broken")
            known.stats.count_hedge("won")
            harness.proxy.fleet.troubles["file"] = "cannot be read"
            await harness.ask(request(b'{"model":"fake","stream":true,"prompt":"x"}'))
            await harness.ask(request(b'{"model":"none"}'))
            await harness.settle()
            registry = prometheus_client.CollectorRegistry()
            registry.register(ServiceCollector(harness.proxy))
            return prometheus_client.generate_latest(registry).decode()

    samples = {
        (sample.name, sample.labels.get("outcome") or sample.labels.get("part")): sample.value
        for family in text_string_to_metric_families(run(exposition()))
        for sample in family.samples
    }
    assert samples["xllm_service_slo_requests_total", "kept"] == 1
    assert samples["xllm_service_degraded", "file"] == 1
    assert samples["xllm_service_hedges_total", "won"] == 1
    assert samples["xllm_service_output_tokens_total", None] == 2
    for kind in ("ttft", "tpot", "duration"):
        assert samples[f"xllm_service_{kind}_seconds_count", None] == 1


def test_the_process_is_seen_too(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness, aiohttp.ClientSession() as session:
            api = AdminApi(harness.proxy, Embedded(harness.proxy.fleet), session, "")
            text = prometheus_client.generate_latest(api._metrics).decode()
            for name in re.findall(r"`(process_\w+)`", README):
                assert f"\n{name} " in text

    run(check())
