"""What is counted of real requests to scripted instances: latencies, promises, history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from xllm_plugin.service.measured import Outcome
from xllm_plugin.service.policy import Choice
from xllm_plugin.service.telemetry import Telemetry
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, chunked
from xllm_plugin.testing.fake_streams import Death, FakeModel, stream_instance
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving

PIECES = [b"a", b"b", b"c", b"d", b"e"]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = json.dumps({"model": "fake", "stream": True, "prompt": "x"}).encode()


def slow(first_s: float, between_s: float) -> FakeInstance:
    """Streams the tokens of `PIECES`, waiting at least so long before and between them."""
    model = FakeModel(PIECES)

    async def script(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        await asyncio.sleep(first_s)
        for event in model.events(received.target.decode(), json.loads(received.body)):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await asyncio.sleep(between_s)
        writer.write(b"0\r\n\r\n")

    return FakeInstance(script=script)


def counted(harness: Harness) -> dict[str, int]:
    found = harness.proxy.telemetry.outcomes
    return {outcome.value: count for outcome, count in found.items() if count}


def test_a_stream_is_measured_and_its_tokens_are_counted(run: Any) -> None:
    async def check() -> None:
        async with serving(slow(0.01, 0.01), slo={"ttft_ms": 60_000, "tpot_ms": 60_000}) as harness:
            await harness.ask(request(STREAM))
            await harness.settle()
            (instance,) = harness.proxy.fleet
            stats = instance.stats
            assert stats.output_tokens == len(PIECES)
            for histogram, at_least_s in ((stats.ttft, 0.008), (stats.tpot, 0.008)):
                assert sum(histogram.counts) == 1
                assert histogram.sum_s >= at_least_s
            assert stats.duration.sum_s >= stats.ttft.sum_s
            assert counted(harness) == {"kept": 1}

    run(check())


@pytest.mark.parametrize(
    ("headers", "outcomes"),
    [
        (b"", {"ttft_missed": 1}),
        (b"x-xllm-ttft-ms: 60000\r\n", {"tpot_missed": 1}),
        (b"x-xllm-ttft-ms: 60000\r\nx-xllm-tpot-ms: 60000\r\n", {"kept": 1}),
        (b"x-xllm-ttft-ms: 60000\r\nx-xllm-tpot-ms: soon\r\n", {"ttft_missed": 1}),
        (b"x-xllm-ttft-ms: nan\r\n", {"ttft_missed": 1}),
        (b"x-xllm-class: Offline\r\n", {}),
    ],
)
def test_a_promise_is_the_requests_own_or_else_the_services(
    run: Any, headers: bytes, outcomes: dict[str, int]
) -> None:
    async def check() -> None:
        async with serving(slow(0.02, 0.01), slo={"ttft_ms": 1, "tpot_ms": 1}) as harness:
            await harness.ask(request(STREAM, headers=headers))
            await harness.settle()
            assert counted(harness) == outcomes

    run(check())


@pytest.mark.parametrize(
    ("xargs", "outcomes"),
    [
        (b'{"xllm_ttft_ms":60000}', {"tpot_missed": 1}),
        (b'{"xllm_tpot_ms":60000}', {"ttft_missed": 1}),
        (b'{"xllm_ttft_ms":60000,"xllm_tpot_ms":60000}', {"kept": 1}),
        (b'{"xllm_ttft_ms":-1}', {"ttft_missed": 1}),
        (b'{"xllm_class":"offline"}', {}),
    ],
)
def test_a_promise_in_the_body_counts_and_wins_over_headers(
    run: Any, xargs: bytes, outcomes: dict[str, int]
) -> None:
    body = STREAM[:-1] + b',"vllm_xargs":%b}' % xargs

    async def check() -> None:
        async with serving(slow(0.02, 0.01), slo={"ttft_ms": 1, "tpot_ms": 1}) as harness:
            await harness.ask(request(body, headers=b"x-xllm-ttft-ms: 1\r\n"))
            await harness.settle()
            assert counted(harness) == outcomes

    run(check())


def test_what_is_refused_or_broken_has_failed_and_wrong_requests_have_not(run: Any) -> None:
    async def check() -> None:
        dying = stream_instance(FakeModel(PIECES), Death(200), resumes=False)
        async with serving(dying) as harness:
            await harness.ask(request(STREAM))
            assert counted(harness) == {"failed": 1}
            (instance,) = harness.proxy.fleet
            assert sum(instance.stats.duration.counts) == 0
            dying.script = answer(b"{}", "500 Internal Server Error")
            await harness.ask(request(STREAM))
            assert counted(harness) == {"failed": 2}
            dying.script = answer(b"{}", "400 Bad Request")
            await harness.ask(request(STREAM))
            await harness.ask(request(STREAM.replace(b"fake", b"none")))  # 404, by the service
            await harness.ask(request())  # no stream
            assert counted(harness) == {"failed": 2}

    run(check())


def test_a_client_that_leaves_is_judged_by_what_was_due(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(script=_silent), slo={"ttft_ms": 30}) as harness:
            for wait_s, outcomes in ((0.0, {}), (0.1, {"ttft_missed": 1})):
                client = await harness.connect()
                client.send(request(STREAM))
                await _until(lambda: any(one.exchange for one in harness.proxy.clients))
                await asyncio.sleep(wait_s)
                client.writer.close()
                await harness.settle()
                assert counted(harness) == outcomes

    run(check())


def test_a_stream_that_moved_counts_once_and_for_no_instance_alone(run: Any) -> None:
    async def check() -> None:
        model = FakeModel(PIECES)
        one, two = stream_instance(model, Death(400)), stream_instance(model)
        async with serving(one, two, policy=_first) as harness:
            await harness.ask(request(STREAM))
            await harness.settle()
            assert sum(instance.stats.resumes for instance in harness.proxy.fleet) == 1
            assert counted(harness) == {"kept": 1}
            for instance in harness.proxy.fleet:
                assert sum(instance.stats.tpot.counts) == 0
            assert sum(one.stats.output_tokens for one in harness.proxy.fleet) == len(PIECES)
            sent = sum(instance.stats.bytes_from for instance in harness.proxy.fleet)
            whole = chunked(model.events("/v1/completions", {}))
            assert len(HEAD) < sent < len(HEAD) + 2 * len(whole)

    run(check())


def test_tokens_of_a_whole_answer_are_those_of_its_usage(run: Any) -> None:
    text = r"\"completion_tokens\":99"  # as a model's text stands in JSON
    body = b'{"choices":[{"text":"%b"}],"usage":{"prompt_tokens":3,"completion_tokens":17}}'

    async def check() -> None:
        instance = FakeInstance(script=answer(body % text.encode()))
        async with serving(instance) as harness:
            await harness.ask(request())
            instance.script = answer(b'{"choices":[{"text":"%b"}]}' % text.encode())
            await harness.ask(request())
            (known,) = harness.proxy.fleet
            assert known.stats.output_tokens == 17
            assert sum(known.stats.ttft.counts) == 0  # no stream, no first token
            assert sum(known.stats.duration.counts) == 2

    run(check())


def test_the_history_is_bounded_and_has_what_happened_in_each_interval(run: Any) -> None:
    async def check() -> None:
        async with serving(slow(0.01, 0.0), slo={"ttft_ms": 60_000, "tpot_ms": 60_000}) as harness:
            now = [100.0]
            telemetry = Telemetry(
                harness.proxy.fleet,
                harness.proxy.config.slo,
                num_samples=3,
                clock=lambda: now[0],
                wall_clock=lambda: 1000 + now[0],
            )
            harness.proxy.telemetry = telemetry
            for _ in range(4):
                await harness.ask(request(STREAM))
            await harness.ask(request(b'{"model":"none"}'))
            await harness.ask(request(b"", b"/health", b"GET"))  # load balancers ask; no work
            now[0] = 102.0
            telemetry.take_sample()
            (sample,) = telemetry.samples
            assert sample.unix_s == 1102.0
            assert sample.requests_per_s == 2.5
            assert sample.failed_per_s == 0
            assert sample.output_tokens_per_s == 4 * len(PIECES) / 2
            assert (sample.slo_kept, sample.slo_judged) == (4, 4)
            assert sample.ttft_p50_ms is not None
            assert sample.ttft_p90_ms is not None
            assert 8 <= sample.ttft_p50_ms <= sample.ttft_p90_ms
            for now[0] in (104.0, 106.0, 108.0):
                telemetry.take_sample()
            assert len(telemetry.samples) == 3
            assert telemetry.num_taken == 4
            last = telemetry.samples[-1]
            assert (last.requests_per_s, last.slo_judged, last.ttft_p50_ms) == (0, 0, None)
            (instance,) = harness.proxy.fleet
            assert instance.stats.ttft.quantile_s(0.5) is not None
            for now[0] in (140.0, 180.0):
                telemetry.take_sample()
            assert instance.stats.ttft.quantile_s(0.5) is None

    run(check())


def test_every_outcome_is_counted_from_the_start(run: Any) -> None:
    async def check() -> None:
        async with serving() as harness:
            assert harness.proxy.telemetry.outcomes == dict.fromkeys(Outcome, 0)

    run(check())


async def _silent(request: Received, _: asyncio.StreamWriter) -> None:
    await request.gone.wait()


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.002)


def _first(_: Any, __: Any) -> Choice:
    return Choice(0, "the first")


def test_a_body_may_say_that_nobody_waits(run: Any) -> None:
    async def check() -> None:
        body = json.dumps(json.loads(STREAM) | {"vllm_xargs": {"xllm_class": "offline"}}).encode()
        async with serving(slow(0.0, 0.0), slo={"ttft_ms": 1, "tpot_ms": 1}) as harness:
            await harness.ask(request(body))
            await harness.settle()
            assert counted(harness) == {}

    run(check())
