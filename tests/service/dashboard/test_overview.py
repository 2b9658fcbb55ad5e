"""What the page is fed with: the whole service in this process, asked over its admin port."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from xllm_plugin.registration import Load
from xllm_plugin.service import lifecycle, router
from xllm_plugin.service.admin import AdminApi
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.dashboard.overview import degradations, overview
from xllm_plugin.service.policy import Choice, RequestView
from xllm_plugin.service.registry import Embedded, WatchedFile
from xllm_plugin.testing.fake_instance import FakeInstance
from xllm_plugin.testing.fake_streams import FakeModel, stream_instance
from xllm_plugin.testing.service_harness import request, serving

STREAM = b'{"model":"fake","stream":true,"prompt":"x"}'


def test_it_takes_the_token_and_only_asks_for_what_is_new(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance()) as harness, aiohttp.ClientSession() as session:
            api = AdminApi(harness.proxy, Embedded(harness.proxy.fleet), session, "right")
            async with TestClient(TestServer(api.application())) as client:

                async def ask(path: str, token: str = "right") -> tuple[int, Any]:
                    headers = {"Authorization": f"Bearer {token}"}
                    async with client.get(path, headers=headers) as reply:
                        return reply.status, await reply.json()

                assert (await ask("/v1/overview", "wrong"))[0] == 401
                for wrong in ("-1", "x", "9" * 5000):
                    assert (await ask(f"/v1/overview?since={wrong}"))[0] == 400
                assert (await client.get("/dashboard")).status == 200  # holds no data
                for _ in range(3):
                    harness.proxy.telemetry.take_sample()
                first = (await ask("/v1/overview"))[1]["history"]
                assert (len(first["samples"]), first["next"]) == (3, 3)
                assert {len(one) for one in first["samples"]} == {len(first["columns"])}
                harness.proxy.telemetry.take_sample()
                later = (await ask("/v1/overview?since=3"))[1]["history"]
                assert (len(later["samples"]), later["next"]) == (1, 4)
                assert (await ask("/v1/overview?since=4"))[1]["history"]["samples"] == []
                restarted = (await ask("/v1/overview?since=900"))[1]["history"]
                assert len(restarted["samples"]) == 4

    run(check())


def test_an_instance_shows_its_load_and_what_was_measured(run: Any) -> None:
    async def check() -> None:
        plain, ours = stream_instance(FakeModel([b"a", b"b"])), FakeInstance(models=["other"])
        async with serving(plain, ours) as harness:
            fleet = harness.proxy.fleet
            await harness.ask(request(STREAM))
            await harness.settle()
            one, two = fleet
            one.reported = {
                "vllm:num_requests_running": 3.0,
                "vllm:num_requests_waiting": 2.0,
                "vllm:kv_cache_usage_perc": 0.25,
            }
            two.load = Load(num_running=1, num_waiting=0, kv_usage=0.5)
            for outcome in ("won", "lost", "lost"):
                two.stats.count_hedge(outcome)
            first, second = overview(harness.proxy, 0)["instances"]
            assert (first["running"], first["waiting"], first["kv_usage"]) == (3, 2, 0.25)
            assert (second["running"], second["waiting"], second["kv_usage"]) == (1, 0, 0.5)
            assert first["ttft_p50_ms"] is not None
            assert second["ttft_p50_ms"] is None
            assert [(one["hedges"], one["hedges_won"]) for one in (first, second)] == [
                (0, 0),
                (3, 1),
            ]
            assert (first["state"], first["role"], first["models"]) == ("ready", "mixed", ["fake"])

    run(check())


def test_decisions_are_counted_by_cause_and_the_last_come_first(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), FakeInstance(models=["b"])) as harness:
            for model in (b"fake", b"b", b"fake"):
                await harness.ask(request(b'{"model":"%b"}' % model))
            found = overview(harness.proxy, 0)
            assert found["causes"] == [{"policy": "tested", "cause": "only candidate", "count": 3}]
            assert [one["model"] for one in found["decisions"]] == ["fake", "b", "fake"]
            times = [one["unix_s"] for one in found["decisions"]]
            assert times == sorted(times, reverse=True)

    run(check())


@pytest.mark.looks_inside
def test_a_policy_that_gives_every_choice_a_cause_of_its_own_is_bounded(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "_MAX_CAUSES", 2)

    def chatty(asked: RequestView, _: Any) -> Choice:
        return Choice(0, "first", f"request {asked.sequence}")

    async def check() -> None:
        async with serving(FakeInstance(), FakeInstance(), policy=chatty) as harness:
            for _ in range(5):
                await harness.ask(request())
            counts = {cause: count for (_, cause), count in harness.proxy.router.causes.items()}
            assert counts == {"request 0": 1, "request 1": 1, "": 3}

    run(check())


def test_what_is_degraded_is_named_with_its_reason(run: Any, tmp_path: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), FakeInstance()) as harness:
            proxy = harness.proxy
            assert degradations(proxy) == []
            one, two = proxy.fleet
            proxy.fleet.report(one, lifecycle.Failed("it broke", certain=True))
            (found,) = degradations(proxy)
            assert (found["part"], found["instance"]) == ("instance", one.name)
            assert "it broke" in found["why"]
            proxy.fleet.report(two, lifecycle.Drain())
            assert "none of 2 is ready" in str(degradations(proxy))
            file = tmp_path / "instances.yaml"
            file.write_text("nonsense: [")
            following = asyncio.create_task(WatchedFile(file, poll_s=0.01).run(proxy.fleet))
            await asyncio.sleep(0.05)
            assert "file" in {found["part"] for found in degradations(proxy)}
            file.write_text("[]")
            async with asyncio.timeout(30):
                while "file" in proxy.fleet.troubles:
                    await asyncio.sleep(0.005)
            following.cancel()

    run(check())


def test_a_hundred_instances_and_an_hour_are_one_moderate_answer(run: Any) -> None:
    async def check() -> None:
        async with serving(admin={"num_samples": 720}) as harness:
            fleet = harness.proxy.fleet
            for number in range(100):
                entry = InstanceEntry(url=f"http://127.0.0.1:{number + 1}", name=f"gpu-{number}")
                fleet.register(entry, source="test")
            for _ in range(1000):
                harness.proxy.telemetry.take_sample()
            found = overview(harness.proxy, 0)
            assert len(found["instances"]) == 100
            assert len(found["history"]["samples"]) == 720
            assert len(json.dumps(found)) < 200_000

    run(check())
