"""Instances that fail while streams run: every client gets every token, once."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from xllm_plugin.testing.chaos import CHAT, COMPLETIONS, Chaos, Fault, Trial
from xllm_plugin.testing.chaos_instance import TEXT, TOKENS
from xllm_plugin.testing.instance_faults import BEFORE_AN_ANSWER, HALF_ANSWERS, STREAM_HEAD

Run = Callable[[Fault], None]
# An event of the fake model is 150 to 190 bytes long; there are 20, then usage and [DONE].
ONE_EVENT = 200
OPENING = 260


HALF_STREAMS = [name for name, raw in HALF_ANSWERS.items() if raw.startswith(STREAM_HEAD)]


@pytest.mark.parametrize("name", [*BEFORE_AN_ANSWER, *HALF_STREAMS])
def test_what_is_no_stream(trial: Run, name: str) -> None:
    """Garbage, half a head, wrong lengths, half a stream: the other instance is asked."""

    async def fault(it: Trial) -> None:
        await it.behave("a", fault=name)
        assert await it.require_whole() == ["b"]

    trial(fault)


@pytest.mark.parametrize("name", HALF_ANSWERS)
def test_half_a_response_that_is_no_stream_is_never_taken_for_a_whole_one(
    trial: Run, name: str
) -> None:
    async def fault(it: Trial) -> None:
        await it.behave("a", fault=name)
        try:
            _, body = await it.ask({})
        except aiohttp.ClientError:
            return
        assert b'"error"' in body

    trial(fault)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("how", ["reset", "end", "nonsense"])
@pytest.mark.parametrize("after_bytes", [0, 1, OPENING, OPENING + 9 * ONE_EVENT + 50])
def test_a_stream_that_breaks(trial: Run, path: str, how: str, after_bytes: int) -> None:
    """At its first byte, in its first event, after it, in a later one."""

    async def fault(it: Trial) -> None:
        await it.behave("a", death={"after_bytes": after_bytes, "how": how})
        assert await it.require_whole(path=path) == ["a", "b"]

    trial(fault)


def test_an_instance_that_dies_before_the_first_byte(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        await it.behave("a", fault="kill")
        assert await it.require_whole() == ["b"]

    trial(fault)


@pytest.mark.parametrize("after_bytes", [0, OPENING + 5 * ONE_EVENT])
def test_an_instance_that_dies_at_and_after_the_first_byte(trial: Run, after_bytes: int) -> None:
    async def fault(it: Trial) -> None:
        await it.behave("a", death={"after_bytes": after_bytes, "how": "kill"})
        assert await it.require_whole() == ["a", "b"]

    trial(fault)


def test_an_instance_that_is_killed_under_load(trial: Run, chaos: Chaos) -> None:
    async def fault(it: Trial) -> None:
        async with it.load(12, pause_s=0.02):
            chaos.kill("a")

    trial(fault)


@pytest.mark.full
def test_instances_that_are_killed_in_turn(trial: Run, chaos: Chaos) -> None:
    """A stream is continued as often as it breaks, and by who has come back."""

    async def fault(it: Trial) -> None:
        for name in ("a", "b"):
            await it.behave(name, times=0, pause_s=0.1)
        async with it.load(6):
            chaos.kill("a")
            await asyncio.sleep(0.5)
            await asyncio.to_thread(chaos.restart, "a")
            await it.until("a", state="ready")
            chaos.kill("b")

    trial(fault)


@pytest.mark.full
def test_an_instance_that_accepts_and_never_answers(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        async with it.settings(timeouts={"first_byte_s": 0.5}):
            await it.behave("a", fault="silence")
            assert await it.require_whole() == ["b"]

    trial(fault)


def test_an_instance_that_accepts_and_never_answers_under_hedging(trial: Run, chaos: Chaos) -> None:
    """Nobody waits for it; it is ready all the time, and nothing says what is wrong with it."""

    async def fault(it: Trial) -> None:
        async with it.settings(routing={"policy": "session", "hedge_after_s": 0.2}):
            await it.behave("a", fault="silence", times=12)
            by = await asyncio.gather(*(it.require_whole() for _ in range(12)))
            assert by == [["b"]] * 12
        assert chaos.metric("xllm_service_hedges_total") >= 12

    trial(fault)


def test_instances_that_are_asked_twice_all_the_time(trial: Run, chaos: Chaos) -> None:
    """Whoever is first: each client gets one answer, whole."""

    async def fault(it: Trial) -> None:
        routing = {"policy": "session", "hedge_after_s": 0.001, "retry_share": 1.0}
        before = chaos.metric("xllm_service_hedges_total")
        async with it.settings(routing=routing):
            for _ in range(4):
                streams = (it.stream(first=name) for name in ("a", "b") * 10)
                for told in await asyncio.gather(*streams):
                    told.require_whole()
                for _, body in await asyncio.gather(*(it.ask({}) for _ in range(10))):
                    assert json.loads(body)["choices"][0]["text"] == TEXT
        assert chaos.metric("xllm_service_hedges_total") > before

    trial(fault)


def test_several_processes_ask_twice(run: Any, tmp_path: Path) -> None:
    """What the other sending had booked is released in the memory that they share."""
    routing = {"policy": "session", "hedge_after_s": 0.1, "retry_share": 1.0}
    with Chaos(tmp_path, service={"processes": 2}, routing=routing) as chaos:

        async def fault(it: Trial) -> None:
            await it.behave("a", fault="silence", times=10)
            streams = await asyncio.gather(*(it.stream() for _ in range(20)))
            for told in streams:
                told.require_whole()
            async with asyncio.timeout(30):
                while chaos.metric("xllm_service_hedges_total") < 10:
                    await asyncio.sleep(0.05)

        run(chaos.trial(fault))


@pytest.mark.full
def test_a_stream_that_stalls(trial: Run) -> None:
    async def fault(it: Trial) -> None:
        async with it.settings(timeouts={"stalled_s": 0.5}):
            await it.behave("a", death={"after_bytes": 900, "how": "silence"})
            assert await it.require_whole() == ["a", "b"]

    trial(fault)


def test_an_instance_that_flaps(trial: Run) -> None:
    """Now it is well, now it is not: requests get what they ask for all the time."""

    async def fault(it: Trial) -> None:
        async def flap() -> None:
            for is_healthy in itertools.cycle((False, True)):
                lies = {} if is_healthy else {"/health": "", "/v1/models": "["}
                await it.behave("a", is_healthy=is_healthy, fault="garbage", lies=lies)
                await asyncio.sleep(0.06)

        flapping = asyncio.create_task(flap())
        for _ in range(25):
            await it.require_whole()
            await asyncio.sleep(0.02)
        assert not flapping.done()
        flapping.cancel()
        await asyncio.gather(flapping, return_exceptions=True)

    trial(fault)


LIES: dict[str, dict[str, str]] = {
    "more than a number": {"/metrics": "vllm:num_requests_running 1e999"},
    "no number": {"/metrics": "vllm:num_requests_running 1.2.3e"},
    "less than none": {"/metrics": "vllm:num_requests_running -7"},
    "all requests there are": {"/metrics": f"vllm:num_requests_running {10**30}"},
    "a cache used a thousand times": {"/metrics": "vllm:kv_cache_usage_perc 1000"},
    "tokens in no time": {
        "/metrics": "vllm:inter_token_latency_seconds_sum 1e308\n"
        "vllm:inter_token_latency_seconds_count 1"
    },
    "models in a deep hole": {"/v1/models": "[" * 100_000},
    "models that are none": {"/v1/models": '{"data": [{"id": 5}, "x"]}'},
    "events in a deep hole": {"/kv_event_sources": "[" * 100_000},
    "events from nowhere": {
        "/kv_event_sources": '{"0": {"topic": "", "endpoint": "tcp://*:x", '
        '"replay_endpoint": null}}'
    },
}


QUICK_LIES = ("more than a number", "tokens in no time", "models in a deep hole")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK_LIES else pytest.param(name, marks=pytest.mark.full) for name in LIES],
)
def test_an_instance_that_lies_about_itself(trial: Run, name: str) -> None:
    """It may lose requests by it; probes of the other one go on."""

    async def fault(it: Trial) -> None:
        await it.lie("a", LIES[name])
        await it.require_whole()
        await it.behave("b", times=0, is_healthy=False)
        await it.until("b", state="suspect")
        await it.behave("b", times=0)
        await it.until("b", state="ready")

    trial(fault)


def test_a_heartbeat_that_lies(trial: Run, chaos: Chaos) -> None:
    """What cannot be is refused: costs are made of it for all."""

    async def fault(it: Trial) -> None:
        registration = {"url": chaos.url("b"), "name": "c", "incarnation": "1", "models": ["fake"]}
        for wrong in ({"capacity": 1e-300}, {"capacity": 1e300}, {"url": "file:///etc"}):
            status, _ = await it.admin("POST", "/v1/registrations", {**registration, **wrong})
            assert status == 400
        assert (await it.admin("POST", "/v1/registrations", registration))[0] == 200
        for load in ({"num_running": 10**400}, {"num_waiting": -1}, {"tpot_s": 1e300}):
            beat: dict[str, Any] = {"incarnation": "1", "load": load}
            status, reply = await it.admin("POST", "/v1/registrations/c/heartbeat", beat)
            assert status == 400, reply
        await it.require_whole()
        await it.admin("DELETE", "/v1/registrations/c?incarnation=1")

    trial(fault)


def test_ids_that_are_none(trial: Run) -> None:
    """A stream whose tokens cannot be known ends with an error event, if it breaks."""

    async def fault(it: Trial) -> None:
        await it.behave("a", death={"after_bytes": 10**6, "how": "ids"})
        told = await it.stream(shows_ids=False)
        assert "Its tokens are not known" in told.error
        assert not told.is_done

    trial(fault)


def test_both_instances_die(trial: Run, chaos: Chaos) -> None:
    """Nobody is left: an error event, never silence; and all is well when they are back."""

    async def fault(it: Trial) -> None:
        await it.behave("a", death={"after_bytes": 900, "how": "kill"})
        chaos.kill("b")
        told = await it.stream()
        assert told.error
        assert told.tokens == TOKENS[: len(told.tokens)]
        status, body = await it.ask({})
        assert (status, json.loads(body)["error"]["code"]) == (503, 503)

    trial(fault)
