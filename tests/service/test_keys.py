"""API keys: who is let in, how much they may ask for, and what instances get to see."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import openai
import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.key_file import KeyRecord, hash_of, make_key, read, write
from xllm_plugin.service.keys import Account, KeyRing
from xllm_plugin.service.metrics import ServiceCollector
from xllm_plugin.service.replies import Refusal
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer, stream
from xllm_plugin.testing.fake_streams import FakeModel, stream_instance
from xllm_plugin.testing.service_harness import PATIENCE_S, Harness, request, serving

KEY, OTHER = "sk-xllm-" + "k" * 43, make_key()
USAGE = b'{"object":"x","usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}'
ZEROS, ONES = f'"{"0" * 64}"', f'"{"1" * 64}"'


def record(name: str = "ann", key: str = KEY, **limits: Any) -> KeyRecord:
    return KeyRecord(name=name, sha256=hash_of(key), **limits)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def keys_at(file: Path, *records: KeyRecord, **settings: Any) -> dict[str, Any]:
    write(file, records)
    return {"file": file, **settings}


def shown(key: str = KEY, more: str = "") -> bytes:
    return f"Authorization: Bearer {key}\r\n{more}".encode()


def account_of(harness: Harness) -> Account:
    assert harness.proxy.keys is not None
    (account,) = harness.proxy.keys
    return account


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


# -- the limits, without sockets -------------------------------------------------------------------


def refused(account: Account, num_tokens: int, now_s: float) -> Refusal:
    with pytest.raises(Refusal) as caught:
        account.admit(num_tokens, now_s)
    assert caught.value.status == 429
    return caught.value


def test_requests_a_minute() -> None:
    account = Account(record(requests_per_minute=2), 1, 0.0)
    account.admit(10, 0.0)
    account.admit(10, 0.0)
    refusal = refused(account, 10, 0.0)
    assert "limit of requests: 2 a minute. Try again in 30s" in str(refusal)
    assert refusal.retry_after_s == 30
    assert refusal.headers == (
        "retry-after-ms: 30000",
        "x-ratelimit-limit-requests: 2",
        "x-ratelimit-remaining-requests: 0",
        "x-ratelimit-reset-requests: 1m0s",
    )
    account.admit(10, 30.0)
    assert account.refused == {"requests": 1}


def test_tokens_a_minute_are_estimated_first_and_counted_after() -> None:
    account = Account(record(tokens_per_minute=100), 1, 0.0)
    account.admit(80, 0.0)
    assert "limit of tokens: 100 a minute" in str(refused(account, 30, 0.0))
    account.settle(80, 20, 0.0)
    assert account.headers(0.0).splitlines()[1] == "x-ratelimit-remaining-tokens: 80"
    account.admit(30, 0.0)
    account.settle(30, 300, 0.0)
    assert refused(account, 1, 0.0).retry_after_s == pytest.approx(60 * 221 / 100)
    assert account.num_tokens == 320


def test_requests_at_a_time() -> None:
    account = Account(record(max_concurrency=2), 1, 0.0)
    account.admit(1, 0.0)
    account.admit(1, 0.0)
    assert "concurrency: 2 at a time" in str(refused(account, 1, 0.0))
    account.settle(1, 1, 0.0)
    account.admit(1, 0.0)


def test_a_refused_request_uses_up_nothing() -> None:
    account = Account(record(requests_per_minute=10, tokens_per_minute=10), 1, 0.0)
    account.admit(10, 0.0)
    for _ in range(20):
        refused(account, 5, 0.0)
    assert account.headers(0.0).splitlines()[1] == "x-ratelimit-remaining-requests: 9"
    assert account.in_flight == 1


def test_each_replica_grants_its_part() -> None:
    limits: Any = {"requests_per_minute": 9, "tokens_per_minute": 90, "max_concurrency": 4}
    account = Account(record(**limits), 3, 0.0)
    assert account.max_concurrency == 1
    assert account.headers(0.0).splitlines()[0] == "x-ratelimit-limit-requests: 3"
    assert account.headers(0.0).splitlines()[3] == "x-ratelimit-limit-tokens: 30"
    assert Account(record(max_concurrency=1), 3, 0.0).max_concurrency == 1


# -- the file --------------------------------------------------------------------------------------


def test_a_key_is_kept_as_its_hash_only(file: Path) -> None:
    write(file, [record(tokens_per_minute=5)])
    assert KEY not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert read(file) == [record(tokens_per_minute=5)]
    file.chmod(0o640)
    write(file, [])
    assert file.stat().st_mode & 0o777 == 0o640, "the service may run as another user"
    assert read(file) == []
    assert list(file.parent.iterdir()) == [file]


def test_a_running_service_follows_the_file(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    write(file, [record(requests_per_minute=2)])
    ring = KeyRing(file, 1, clock)
    account = ring.account(b"Bearer " + KEY.encode())
    account.admit(1, clock.now_s)
    write(file, [record(requests_per_minute=2, max_concurrency=1), record("bob", OTHER)])
    ring.refresh()
    assert ring.account(b"bearer  " + OTHER.encode()).record.tenant == "bob"
    again = ring.account(b"Bearer " + KEY.encode())
    assert again is account, "what was used stays used"
    assert again.in_flight == 1
    assert again.max_concurrency == 1
    assert again.requests is not None
    assert again.requests.level(clock.now_s) == 1
    file.write_text(f"- {{name: ann, sha256: {KEY}}}")
    ring.refresh()
    assert "The keys stay as they are" in caplog.text
    assert KEY not in caplog.text
    assert len(list(ring)) == 2
    write(file, [record("bob", OTHER)])
    ring.refresh()
    with pytest.raises(Refusal, match="or no longer"):
        ring.account(b"Bearer " + KEY.encode())
    ring.num_replicas = 2
    assert len(list(ring)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- [", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("hush-hush", "is not a list of keys"),
        ("- hush-hush", "is not a list of keys"),
        ("- {name: a, sha256: hush-hush}", "0.sha256: String should match"),
        ("- {name: ' ', sha256: 00}", "is not a list of keys"),
        (f"[{{name: a, sha256: {ZEROS}}}, {{name: b, sha256: {ZEROS}}}]", "the sha256 of 'a'"),
        (f"[{{name: a, sha256: {ZEROS}}}, {{name: a, sha256: {ONES}}}]", "the name of 'a'"),
    ],
)
def test_files_that_are_not_of_keys(file: Path, text: str, says: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.file") as caught:
        read(file)
    assert says in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(file.parent / "absent")


# -- between sockets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        b"",
        b"Authorization: Bearer\r\n",
        b"Authorization: Bearer sk-hush-hush\r\n",
        b"Authorization: Basic " + KEY.encode() + b"\r\n",
        b"Authorization: " + KEY.encode() + b"\r\n",
        b"X-Api-Key: " + KEY.encode() + b"\r\n",
    ],
)
def test_who_shows_no_key_is_told_so_before_the_body_is_read(
    run: Any, file: Path, headers: bytes
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            client = await harness.connect()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n"
            client.send(head + headers + b"Expect: 100-continue\r\n\r\n")
            head, body = await client.read_answer()
            assert head.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
            assert b"www-authenticate: Bearer\r\n" in head
            error = json.loads(body)["error"]
            assert (error["type"], error["code"]) == ("AuthenticationError", 401)
            assert b"hush" not in body
            assert not harness.instances[0].requests
            await client.read_all()
            await harness.settle()

    run(check())


def test_a_connection_is_worth_no_key(run: Any, file: Path) -> None:
    """A key that was accepted on a connection is asked for again, and anew once keys change."""

    async def check() -> None:
        keys = keys_at(file, record(), record("bob", OTHER))
        async with serving(FakeInstance(), keys=keys) as harness:
            client = await harness.connect()

            async def asked(headers: bytes) -> bytes:
                client.send(request(headers=headers))
                head, _ = await client.read_answer()
                return head.split(b" ")[1]

            assert [await asked(shown()) for _ in range(3)] == [b"200"] * 3
            assert await asked(shown(OTHER)) == b"200"
            tenants = [
                one.headers()["x-xllm-tenant"]
                for one in harness.instances[0].requests
                if one.target == b"/v1/completions"
            ]
            assert tenants == ["ann", "ann", "ann", "bob"]
            assert await asked(shown()) == b"200"
            write(file, [record("bob", OTHER)])
            assert harness.proxy.keys is not None
            harness.proxy.keys.refresh()
            assert await asked(shown()) == b"401"

            again = await harness.connect()
            again.send(request(headers=shown(OTHER)) + request())
            assert (await again.read_answer())[0].startswith(b"HTTP/1.1 200")
            assert (await again.read_answer())[0].startswith(b"HTTP/1.1 401")

    run(check())


def test_two_keys_are_one_too_many(run: Any, file: Path) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            head, _ = await harness.ask(request(headers=shown() + shown("other")))
            assert head.startswith(b"HTTP/1.1 400")

    run(check())


def test_health_needs_no_key_and_everything_else_does(run: Any, file: Path) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            for path, status in ((b"/health", 200), (b"/v1/models", 401), (b"/version", 401)):
                head, _ = await harness.ask(request(b"", path, b"GET"))
                assert head.startswith(b"HTTP/1.1 %d" % status)
            head, _ = await harness.ask(request(b"", b"/v1/models", b"GET", shown()))
            assert head.startswith(b"HTTP/1.1 200")
            head, _ = await harness.ask(request(b"", b"/v1/completions", b"OPTIONS"))
            assert head.startswith(b"HTTP/1.1 200"), "browsers ask what they may without a key"
            assert account_of(harness).num_requests == 0

    run(check())


@pytest.mark.parametrize("api_key", [None, "the key of instances"])
@pytest.mark.parametrize("forward", [False, True])
def test_the_clients_key_stays_here_unless_it_is_to_go_on(
    run: Any, file: Path, api_key: str | None, forward: bool
) -> None:
    """Nor can a client keep the service's own headers from an instance."""

    async def check() -> None:
        keys = keys_at(file, record(tenant="team"), forward=forward)
        async with serving(FakeInstance(), keys=keys, instances={"api_key": api_key}) as harness:
            more = "Connection: close, x-xllm-tenant, authorization\r\nX-Xllm-Tenant: team\r\n"
            for headers in (shown(), shown(more=more)):
                head, _ = await harness.ask(request(headers=headers))
                assert head.startswith(b"HTTP/1.1 200"), head
            plain, tricky = (one.headers() for one in harness.instances[0].requests)
            own = None if api_key is None else f"Bearer {api_key}"
            assert plain.get("authorization") == (f"Bearer {KEY}" if forward else own)
            assert tricky.get("authorization") == (None if forward else own)
            assert plain["x-xllm-tenant"] == tricky["x-xllm-tenant"] == "team"

    run(check())


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ("X-Xllm-Tenant: ann\r\n", {}, 200),
        ("X-Xllm-Tenant: bob\r\n", {}, 403),
        ("", {"vllm_xargs": {"xllm_tenant": "bob"}}, 403),
        ("X-Xllm-Priority: 3\r\n", {}, 200),
        ("X-Xllm-Priority: -1\r\n", {}, 403),
        ("", {"priority": -1}, 403),
        ("", {"vllm_xargs": {"xllm_priority": -1}}, 403),
        ("", {"priority": 3}, 200),
        ("X-Xllm-Priority: 0\r\n", {"priority": -1}, 403),
        ("", {"vllm_xargs": {"xllm_priority": 0}, "priority": -1}, 403),
        ("", {"priority": "-1"}, 400),  # vLLM makes numbers of these
        ("", {"priority": -1.0}, 400),
        ("", {"priority": True}, 400),
        ("", {"priority": None}, 200),
    ],
)
def test_a_key_is_of_one_tenant_and_has_a_first_priority(
    run: Any, file: Path, headers: str, body: Any, status: int
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            raw = json.dumps({"model": "fake", **body}).encode()
            head, _ = await harness.ask(request(raw, headers=shown(more=headers)))
            assert head.startswith(b"HTTP/1.1 %d" % status), head
            assert len(harness.instances[0].requests) == (status == 200)
            await harness.settle()
            assert account_of(harness).in_flight == 0

    run(check())


@pytest.mark.parametrize(
    ("path", "raw", "status"),
    [
        (b"/v1/completions", b'{"model":"fake","z":NaN,"vllm_xargs":{"xllm_tenant":"bob"}}', 400),
        (b"/v1/completions", '{"model":"fake"}'.encode("utf-16"), 400),
        (b"/v1/completions", b"{}", 200),
        (
            b"/inference/v1/generate",
            b'{"model":"fake","sampling_params":{"extra_args":{"xllm_tenant":"bob"}}}',
            403,
        ),
    ],
)
def test_an_instance_reads_no_other_tenant_than_the_service(
    run: Any, file: Path, path: bytes, raw: bytes, status: int
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            head, _ = await harness.ask(request(raw, path=path, headers=shown()))
            assert head.startswith(b"HTTP/1.1 %d" % status), head
            assert len(harness.instances[0].requests) == (status == 200)

    run(check())


def test_what_is_left_is_in_every_answer_and_what_was_used_is_counted(run: Any, file: Path) -> None:
    limits: Any = {"requests_per_minute": 60, "tokens_per_minute": 6000}

    async def check() -> None:
        instance = FakeInstance(script=answer(USAGE))
        async with serving(instance, keys=keys_at(file, record(**limits))) as harness:
            head, body = await harness.ask(request(headers=shown()))
            assert body == USAGE
            assert b"\r\nx-ratelimit-limit-requests: 60\r\n" in head
            assert b"\r\nx-ratelimit-remaining-requests: 59\r\n" in head
            assert b"\r\nx-ratelimit-reset-requests: " in head
            assert b"\r\nx-ratelimit-limit-tokens: 6000\r\n" in head
            await harness.settle()
            assert (account_of(harness).num_requests, account_of(harness).num_tokens) == (1, 7)

    run(check())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_tokens_of_a_stream_are_counted_though_it_does_not_say_them(
    run: Any, file: Path, path: str
) -> None:
    """An armed stream is known token by token: three of the prompt, five of the output."""
    model = FakeModel([b"a", b"b", b"c", b"d", b"e"], per_event=(2,))

    async def check() -> None:
        async with serving(stream_instance(model), keys=keys_at(file, record())) as harness:
            raw = b'{"model":"fake","stream":true,"prompt":"x"}'
            head, _ = await harness.ask(request(raw, path.encode(), headers=shown()))
            assert head.startswith(b"HTTP/1.1 200")
            await harness.settle()
            assert account_of(harness).num_tokens == 8

    run(check())


def test_over_a_limit_the_answer_says_when_to_come_again(run: Any, file: Path) -> None:
    async def check() -> None:
        keys = keys_at(file, record(requests_per_minute=1))
        async with serving(FakeInstance(), keys=keys) as harness:
            client = await harness.connect()
            client.send(request(headers=shown()) * 2)
            await client.read_answer()
            head, body = await client.read_answer()
            assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
            assert b"\r\nretry-after: 60\r\n" in head
            assert b"\r\nx-ratelimit-remaining-requests: 0\r\n" in head
            assert json.loads(body)["error"]["type"] == "RateLimitError"
            client.send(request(b"", b"/v1/models", b"GET", shown()))
            assert (await client.read_answer())[0].startswith(b"HTTP/1.1 200"), "it stays open"

    run(check())


def test_requests_at_a_time_are_given_back_however_they_end(run: Any, file: Path) -> None:
    async def check() -> None:
        keys = keys_at(file, record(max_concurrency=1))
        instance = FakeInstance(script=stream(*[b"data: x\n\n"] * 9_000, pause_s=0.01))
        async with serving(instance, keys=keys, routing={"num_retries": 0}) as harness:
            account = account_of(harness)
            client = await harness.connect()
            client.send(request(headers=shown()))
            await client.reader.readuntil(b"data: x")
            head, _ = await harness.ask(request(headers=shown()))
            assert head.startswith(b"HTTP/1.1 429")
            client.writer.close()
            await until(lambda: account.in_flight == 0)
            assert account.num_tokens > 0, "who leaves pays for what was computed"

            async def breaks(_: Received, writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
                await writer.drain()
                writer.close()

            instance.script = breaks
            broken = await harness.connect()
            broken.send(request(headers=shown()))
            assert (await broken.read_all()).endswith(b"half")
            await until(lambda: account.in_flight == 0)
            await instance.die()
            head, _ = await harness.ask(request(headers=shown()))
            assert head.startswith(b"HTTP/1.1 502")
            assert account.in_flight == 0
            await harness.settle()

    run(check())


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


def test_the_openai_client_understands_both_refusals(run: Any, file: Path) -> None:
    async def check() -> None:
        keys = keys_at(file, record(requests_per_minute=1))
        async with serving(FakeInstance(script=answer(USAGE)), keys=keys) as harness:
            url = f"http://127.0.0.1:{harness.port}/v1"
            for key, error in ((OTHER, openai.AuthenticationError), (KEY, openai.RateLimitError)):
                await harness.ask(request(headers=shown()))
                async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
                    with pytest.raises(error):
                        await client.completions.create(model="fake", prompt="x")

    run(check())


def test_keys_in_the_metrics(run: Any, file: Path) -> None:
    async def check() -> None:
        keys = keys_at(file, record(requests_per_minute=1))
        async with serving(FakeInstance(script=answer(USAGE)), keys=keys) as harness:
            for _ in range(3):
                await harness.ask(request(headers=shown()))
            await harness.settle()
            found = {
                sample.name.removeprefix("xllm_service_key_"): sample
                for metric in ServiceCollector(harness.proxy).collect()
                for sample in metric.samples
                if sample.name.startswith("xllm_service_key_")
            }
            values = {name: sample.value for name, sample in found.items()}
            expected = {"requests_total": 1, "tokens_total": 7, "refusals_total": 2, "in_flight": 0}
            assert values == expected
            assert found["refusals_total"].labels == {"key": "ann", "limit": "requests"}

    run(check())


def test_keys_and_queue_together(run: Any, file: Path) -> None:
    """The key names the tenant whose turn it is."""
    order: list[str] = []

    async def check() -> None:
        gate = asyncio.Semaphore(0)

        async def script(received: Received, writer: asyncio.StreamWriter) -> None:
            order.append(received.headers()["x-xllm-tenant"])
            await gate.acquire()
            await answer()(received, writer)

        keys = keys_at(file, record("ann", KEY), record("bob", OTHER))
        flow = {"enabled": True, "max_in_flight": 1}
        async with serving(FakeInstance(script=script), keys=keys, flow=flow) as harness:
            queue = harness.proxy.flow.queue  # type: ignore[union-attr]
            tasks = []
            for number, key in enumerate((KEY, KEY, KEY, OTHER)):
                tasks.append(asyncio.create_task(harness.ask(request(headers=shown(key)))))
                await until(lambda number=number: order and len(queue) == number)
            for _ in tasks:
                gate.release()
            await asyncio.gather(*tasks)
            assert order == ["ann", "ann", "bob", "ann"]
            await harness.settle()

    run(check())


def test_a_file_that_changes_is_read_by_the_sweep(
    run: Any, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with serving(FakeInstance(), keys=keys_at(file, record())) as harness:
            write(file, [record("bob", OTHER)])
            await until(lambda: account_of(harness).record.name == "bob")
            assert (await harness.ask(request(headers=shown())))[0].startswith(b"HTTP/1.1 401")
            config = harness.proxy.config
            off = config.model_copy(update={"keys": type(config.keys)()})
            harness.proxy.reconfigure(off)
            assert (await harness.ask(request()))[0].startswith(b"HTTP/1.1 200")

    with caplog.at_level(logging.INFO, "xllm_plugin.service"):
        run(check())
    assert "1 API keys are in force" in caplog.text
