"""What Prometheus gets: every documented name and no other, in an exposition that it can read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

import xllm_plugin.service
from xllm_plugin.registration import Load
from xllm_plugin.service.metrics import ServiceCollector
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
    async def exposed() -> str:
        instance = stream_instance(FakeModel([b"a", b"b"]))
        async with serving(instance) as harness:
            (known,) = harness.proxy.fleet
            known.load = Load(num_running=1)
            known.stats.count_error("broken")
            harness.proxy.fleet.troubles["file"] = "cannot be read"
            await harness.ask(request(b'{"model":"fake","stream":true,"prompt":"x"}'))
            await harness.ask(request(b'{"model":"none"}'))
            await harness.settle()
            registry = prometheus_client.CollectorRegistry()
            registry.register(ServiceCollector(harness.proxy))
            return prometheus_client.generate_latest(registry).decode()

    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(run(exposed())):
        name = family.name + {"counter": "_total"}.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    # Their labels show with instances that publish their cache: tests/service/kv_index.
    for name in ("xllm_service_kv_index_blocks", "xllm_service_kv_index_exact"):
        assert found.pop(name) == ("gauge", set())
        found[name] = ("gauge", {"server"})
    assert documented() == found


def test_the_process_is_seen_too(run: Any) -> None:
    import aiohttp

    from xllm_plugin.service.admin import AdminApi
    from xllm_plugin.service.registry import Embedded

    async def check() -> None:
        async with serving(FakeInstance()) as harness, aiohttp.ClientSession() as session:
            api = AdminApi(harness.proxy, Embedded(harness.proxy.fleet), session, "")
            text = prometheus_client.generate_latest(api._metrics).decode()
            for name in re.findall(r"`(process_\w+)`", README):
                assert f"\n{name} " in text

    run(check())
