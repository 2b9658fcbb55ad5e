"""Requests that wait in the service, between real sockets."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from xllm_plugin.service import lifecycle
from xllm_plugin.service.config import FlowConfig
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.flow.metrics import describe_queue
from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving

ONE = {"enabled": True, "max_in_flight": 1}


class Held:
    """A script that answers when it is let, and remembers who came."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.num_running = self.max_running = 0
        self._let = asyncio.Semaphore(0)

    async def __call__(self, received: Received, writer: asyncio.StreamWriter) -> None:
        self.order.append(json.loads(received.body)["user"])
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await self._let.acquire()
        finally:
            self.num_running -= 1
        await answer()(received, writer)

    def let(self, number: int) -> None:
        """Answer so many."""
        for _ in range(number):
            self._let.release()


def post(user: str, headers: str = "", model: str = "fake", **body: Any) -> bytes:
    content = json.dumps({"model": model, "user": user, **body}).encode()
    return request(content, headers=headers.encode())


async def send(harness: Harness, *raws: bytes) -> list[asyncio.Task[tuple[bytes, bytes]]]:
    """Send requests, each when the one before has been taken in."""
    tasks = []
    for raw in raws:
        before = counted(harness)
        tasks.append(asyncio.create_task(harness.ask(raw)))
        async with asyncio.timeout(PATIENCE_S):
            while counted(harness) == before:
                await asyncio.sleep(0.001)
    return tasks


def counted(harness: Harness) -> int:
    """Everything that was taken in so far, whatever became of it."""
    flow = harness.proxy.flow
    assert flow is not None
    outcomes = flow.stats.outcomes
    waited = len(flow.queue) + sum(outcomes.values()) - outcomes["sent"]
    instances = list(harness.proxy.fleet)
    return waited + sum(one.in_flight + sum(one.stats.answered.values()) for one in instances)


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def statuses(answers: list[tuple[bytes, bytes]]) -> list[int]:
    return [int(head.split(b" ")[1]) for head, _ in answers]


def test_no_more_run_than_there_is_room_for_and_nobody_is_lost(run: Any) -> None:
    async def check() -> None:
        a, b = Held(), Held()
        flow = {"enabled": True, "max_in_flight": 2}
        async with serving(FakeInstance(script=a), FakeInstance(script=b), flow=flow) as harness:
            tasks = await send(harness, *(post(str(number)) for number in range(12)))
            assert len(harness.proxy.flow.queue) == 8  # type: ignore[union-attr]
            a.let(12)
            b.let(12)
            assert statuses(await asyncio.gather(*tasks)) == [200] * 12
            assert (a.max_running, b.max_running) == (2, 2)
            assert sorted(a.order + b.order, key=int) == [str(number) for number in range(12)]
            assert harness.proxy.flow.stats.outcomes["sent"] == 8  # type: ignore[union-attr]
            await harness.settle()

    run(check())


def test_bands_come_in_their_order_and_tenants_in_turns(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            tasks = await send(
                harness,
                post("running"),
                post("offline", "x-xllm-class: offline\r\nx-xllm-priority: -9\r\n"),
                post("a1", "x-xllm-tenant: a\r\n"),
                post("a2", "x-xllm-tenant: a\r\n"),
                post("a3", "x-xllm-tenant: a\r\n"),
                post("b1", vllm_xargs={"xllm_tenant": "b"}),
                post("urgent", priority=-1),
                post("late", "x-xllm-priority: 3\r\n"),
            )
            shown = describe_queue(harness.proxy.flow)
            assert [one["priority"] for one in shown] == [-1, 0, 0, 3, -9]
            assert shown[1]["tenant"] == "a"
            assert shown[1]["num_requests"] == 3
            held.let(len(tasks))
            await asyncio.gather(*tasks)
            assert held.order == ["running", "urgent", "a1", "b1", "a2", "a3", "late", "offline"]

    run(check())


def test_who_was_promised_an_early_answer_is_not_left_waiting(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            first, *others = await send(
                harness,
                post("running"),
                post("hasty", "x-xllm-ttft-ms: 30\r\n"),
                post("offline", "x-xllm-ttft-ms: 30\r\nx-xllm-class: offline\r\n"),
            )
            head, body = await others[0]
            assert head.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 1\r\n" in head
            assert "wanted within 30 ms" in json.loads(body)["error"]["message"]
            held.let(2)
            assert statuses([await first, await others[1]]) == [200, 200]
            assert held.order == ["running", "offline"]

    run(check())


def test_what_was_waited_is_taken_off_the_promise(run: Any) -> None:
    """The instance orders by what is left until the first token is due."""

    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            headers = "X-Xllm-TTFT-ms: 3600000\r\n"
            tasks = await send(harness, post("running", headers), post("waiting", headers))
            await asyncio.sleep(0.02)
            held.let(2)
            assert statuses(await asyncio.gather(*tasks)) == [200, 200]
            first, second = (
                int(one.headers()["x-xllm-ttft-ms"]) for one in harness.instances[0].requests
            )
            assert first == 3_600_000
            assert 3_600_000 - PATIENCE_S * 1e3 < second <= 3_600_000 - 20

    run(check())


def test_nobody_waits_for_ever(run: Any) -> None:
    async def check() -> None:
        held = Held()
        flow = {**ONE, "max_wait_s": 0.03, "max_offline_wait_s": 0.09}
        async with serving(FakeInstance(script=held), flow=flow) as harness:
            first, *others = await send(
                harness,
                post("running"),
                post("online"),
                post("offline", "x-xllm-class: offline\r\n"),
            )
            for task, says in zip(others, (b"at most 0.03 s", b"at most 0.09 s"), strict=True):
                head, body = await task
                assert head.startswith(b"HTTP/1.1 503")
                assert says in body
            held.let(1)
            await first
            assert harness.proxy.flow.stats.outcomes["expired"] == 2  # type: ignore[union-attr]

    run(check())


def test_a_client_that_goes_leaves_the_queue(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            flow = harness.proxy.flow
            assert flow is not None
            (first,) = await send(harness, post("running"))
            client = await harness.connect()
            client.send(post("gone"))
            await until(lambda: len(flow.queue) == 1)
            client.writer.close()
            await until(lambda: not flow.queue)
            (last,) = await send(harness, post("last"))
            held.let(2)
            await asyncio.gather(first, last)
            assert held.order == ["running", "last"]
            assert flow.stats.outcomes["gone"] == 1
            await harness.settle()

    run(check())


def test_a_full_queue_turns_away_who_has_most_of_it(run: Any) -> None:
    async def check() -> None:
        held = Held()
        flow = {**ONE, "max_queued_requests": 3}
        async with serving(FakeInstance(script=held), flow=flow) as harness:
            a = [post(f"a{number}", "x-xllm-tenant: a\r\n") for number in range(5)]
            tasks = await send(harness, *a, post("b0", "x-xllm-tenant: b\r\n"))
            head, body = await tasks[4]
            assert head.startswith(b"HTTP/1.1 429")
            assert b"retry-after: 1\r\n" in head
            assert json.loads(body)["error"]["type"] == "RateLimitError"
            assert statuses([await tasks[3]]) == [429], "it made place for the other tenant"
            held.let(9)
            await asyncio.gather(*tasks)
            assert held.order == ["a0", "a1", "b0", "a2"]
            await harness.settle()

    run(check())


def test_who_waits_for_one_model_does_not_hold_up_another(run: Any) -> None:
    async def check() -> None:
        a, b = Held(), Held()
        instances = FakeInstance(script=a, models=["a"]), FakeInstance(script=b, models=["b"])
        async with serving(*instances, flow=ONE) as harness:
            tasks = await send(
                harness, *(post(f"{model}{n}", model=model) for n in (1, 2) for model in "ab")
            )
            b.let(2)
            assert statuses([await tasks[1], await tasks[3]]) == [200, 200]
            assert a.order == ["a1"]
            a.let(2)
            await asyncio.gather(*tasks)
            assert (await harness.ask(post("x", model="no such")))[0].startswith(b"HTTP/1.1 404")

    run(check())


def test_an_instance_that_comes_takes_those_that_wait(run: Any) -> None:
    async def check() -> None:
        old, new = Held(), Held()
        instances = FakeInstance(script=old), FakeInstance(script=new)
        async with serving(*instances, flow=ONE) as harness:
            fleet = harness.proxy.fleet
            second = fleet.get(f"127.0.0.1:{instances[1].port}")
            assert second is not None
            fleet.report(second, lifecycle.Drain())
            tasks = await send(harness, post("1"), post("2"))
            fleet.report(second, lifecycle.Undrain())
            fleet.report(second, lifecycle.Alive(""))
            await until(lambda: new.order == ["2"])
            old.let(1)
            new.let(1)
            await asyncio.gather(*tasks)

    run(check())


def test_one_that_is_drained_gives_no_place_to_others(run: Any) -> None:
    """What leaves it makes no room elsewhere."""

    async def check() -> None:
        a, b = Held(), Held()
        instances = FakeInstance(script=a), FakeInstance(script=b)
        async with serving(*instances, flow=ONE) as harness:
            tasks = await send(harness, post("1"), post("2"), post("3"))
            first = harness.proxy.fleet.get(f"127.0.0.1:{instances[0].port}")
            assert first is not None
            harness.proxy.fleet.report(first, lifecycle.Drain())
            a.let(1)
            await until(lambda: not first.in_flight)
            await asyncio.sleep(0.05)
            assert (b.max_running, len(a.order) + len(b.order)) == (1, 2)
            b.let(2)
            await asyncio.gather(*tasks)

    run(check())


def test_what_fails_goes_on_elsewhere_at_once(run: Any) -> None:
    """Once it has been sent it does not wait a second time."""

    async def check() -> None:
        held = Held()

        async def dies(received: Received, writer: asyncio.StreamWriter) -> None:
            while not held.order:
                await asyncio.sleep(0.001)
            writer.close()

        async with serving(FakeInstance(script=dies), FakeInstance(script=held), flow=ONE) as it:
            tasks = await send(it, post("1"), post("2"))
            await until(lambda: sorted(held.order) == ["1", "2"])
            held.let(2)
            assert statuses(await asyncio.gather(*tasks)) == [200, 200]

    run(check())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_when_clients_go_and_an_instance_dies_who_stays_is_served_once(run: Any, seed: int) -> None:
    """Nobody is lost, nobody served twice by those that live, and no room is lost either."""
    chance = random.Random(seed)

    async def check() -> None:
        served: list[str] = []

        async def script(received: Received, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(chance.random() * 0.01)
            served.append(json.loads(received.body)["user"])
            await answer()(received, writer)

        async def dies(received: Received, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.02)
            writer.transport.abort()

        instances = [FakeInstance(script=script), FakeInstance(script=script)]
        flow = {"enabled": True, "max_in_flight": 2}
        async with serving(*instances, FakeInstance(script=dies), flow=flow) as harness:
            queue = harness.proxy.flow.queue  # type: ignore[union-attr]
            most = 0

            async def ask(number: int) -> bytes:
                nonlocal most
                headers = chance.choice(["", "x-xllm-tenant: b\r\n", "x-xllm-class: offline\r\n"])
                client = await harness.connect()
                client.send(post(str(number), headers))
                if number % 4 == 0:
                    await asyncio.sleep(chance.random() * 0.03)
                    client.writer.close()
                    return b""
                head, _ = await client.read_answer()
                most = max(most, *(one.in_flight for one in harness.proxy.fleet))
                queue.check_integrity()
                return head

            heads = await asyncio.gather(*(ask(number) for number in range(60)))
            assert all(head.startswith(b"HTTP/1.1 200") for head in heads if head)
            stayed = [str(number) for number, head in enumerate(heads) if head]
            assert len(stayed) == 45
            assert {user: served.count(user) for user in stayed} == dict.fromkeys(stayed, 1)
            await harness.settle()
            assert not queue
            assert most <= 4, "two, and what the dead instance had"

    run(check())


@pytest.mark.parametrize(
    ("flow", "entry", "load", "has_room"),
    [
        ({}, {}, (1000, 9), True),
        ({"max_in_flight": 4}, {}, (3, 9), True),
        ({"max_in_flight": 4}, {}, (4, 0), False),
        ({"max_in_flight": 4}, {"capacity": 2.5}, (9, 0), True),
        ({"max_in_flight": 4}, {"capacity": 2.5}, (10, 0), False),
        ({"max_in_flight": 4}, {"max_in_flight": 6}, (5, 0), True),
        ({"max_in_flight": 4, "num_replicas": 2}, {}, (2, 0), False),
        ({"max_in_flight": 3, "num_replicas": 2}, {}, (1, 0), False),
        ({"max_in_flight": 4, "num_replicas": 9}, {}, (0, 0), True),
        ({"max_in_flight": 4, "num_replicas": 9}, {}, (1, 0), False),
        ({}, {"max_in_flight": 3}, (3, 0), False),
        ({"max_waiting": 2}, {}, (0, 2), True),
        ({"max_waiting": 2}, {}, (0, 3), False),
    ],
)
def test_when_an_instance_has_room(
    run: Any, flow: Any, entry: Any, load: tuple[int, int], has_room: bool
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), flow={"enabled": True, **flow}) as harness:
            (known,) = harness.proxy.fleet
            changed = known.entry.model_copy(update=entry)
            instance = Instance(changed, known.source, known.life, known.pool)
            instance.in_flight, instance.num_waiting = load
            assert harness.proxy.flow is not None
            assert harness.proxy.flow.has_room(instance) is has_room

    run(check())


def test_switching_it_off_sends_all_that_waits(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            tasks = await send(harness, post("1"), post("2"), post("3"))
            config = harness.proxy.config
            harness.proxy.reconfigure(
                config.model_copy(update={"flow": FlowConfig(enabled=True, max_in_flight=2)})
            )
            await until(lambda: held.num_running == 2)
            harness.proxy.reconfigure(config.model_copy(update={"flow": FlowConfig()}))
            assert harness.proxy.flow is None
            await until(lambda: held.num_running == 3)
            held.let(3)
            await asyncio.gather(*tasks)
            await harness.settle()

    run(check())


def test_a_wrong_promise_is_refused_here_and_the_connection_stays(run: Any) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), flow=ONE) as harness:
            client = await harness.connect()
            client.send(request(headers=b"x-xllm-ttft-ms: soon\r\n") + request())
            head, body = await client.read_answer()
            assert head.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["param"] == "x-xllm-ttft-ms"
            assert (await client.read_answer())[0].startswith(b"HTTP/1.1 200")
            assert len(harness.instances[0].requests) == 1

    run(check())


def test_what_is_not_work_does_not_wait(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            (task,) = await send(harness, post("1"))
            for path in (b"/health", b"/v1/models"):
                head, _ = await harness.ask(request(b"", path, b"GET"))
                assert head.startswith(b"HTTP/1.1 200")
            held.let(1)
            await task

    run(check())


def test_nothing_set_nothing_read(run: Any) -> None:
    """Without flow control and keys, only the instance refuses a wrong promise."""

    async def check() -> None:
        async with serving(FakeInstance()) as harness:
            proxy = harness.proxy
            assert (proxy.flow, proxy.keys, proxy.reads_promises) == (None, None, False)
            assert proxy.router.has_room is None
            raw = request(headers=b"x-xllm-ttft-ms: soon\r\nAuthorization: Bearer k\r\n")
            assert (await harness.ask(raw))[0].startswith(b"HTTP/1.1 200")
            received = harness.instances[0].requests[0].headers()
            assert received["x-xllm-ttft-ms"] == "soon"
            assert received["authorization"] == "Bearer k"

    run(check())


def test_the_queue_in_the_metrics(run: Any) -> None:
    async def check() -> None:
        held = Held()
        async with serving(FakeInstance(script=held), flow=ONE) as harness:
            tasks = await send(
                harness, post("1"), post("2"), post("3", "x-xllm-class: offline\r\n")
            )
            found = samples(harness)
            assert found["queued_requests", ("online",)] == 1
            assert found["queued_requests", ("offline",)] == 1
            assert found["queued_bytes", ()] > 100
            held.let(3)
            await asyncio.gather(*tasks)
            found = samples(harness)
            assert found["queue_outcomes_total", ("sent",)] == 2
            assert found["queue_seconds_count", ()] == 2
            assert found["queued_bytes", ()] == 0

    run(check())


def samples(harness: Harness) -> dict[Any, float]:
    return {
        (sample.name.removeprefix("xllm_service_"), tuple(sample.labels.values())): sample.value
        for metric in ServiceCollector(harness.proxy).collect()
        for sample in metric.samples
    }
