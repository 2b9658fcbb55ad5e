"""Requests go where their prefix is: the whole service, real sockets, scripted instances."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from xllm_plugin.instance.chat_form import CHAT_FORM_PATH, ChatForm, TemplateForm
from xllm_plugin.service.app import Service
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.kv_index import samples
from xllm_plugin.service.kv_index import tokens as tokens_module
from xllm_plugin.service.kv_index.subscriber import Follower
from xllm_plugin.service.kv_index.wire import Batch, BlockStored
from xllm_plugin.service.lifecycle import State
from xllm_plugin.testing.fake_instance import FakeInstance, Received, answer
from xllm_plugin.testing.fake_publisher import FakePublisher

SIZE = 4
TEXT = "a b c d e f g h i j k l m n o p q r s t u v w x y z"


def word_level() -> tokenizers.Tokenizer:
    words = {word: number + 7 for number, word in enumerate([*TEXT.split(), "[UNK]"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TOKENIZER = word_level()


TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def chat_text(messages: list[dict[str, Any]]) -> str:
    """What the template gives, but for white space."""
    if any(message["role"] == "developer" for message in messages):
        messages = sorted(messages, key=lambda one: one["role"] not in ("system", "developer"))
    contents = [message["content"] or "" for message in messages]
    return " ".join(
        content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
        for content in contents
    )


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


class Cached(FakeInstance):
    """An instance that publishes its cache and tokenises."""

    def __init__(self, *, hands_out_tokenizer: bool = True, template: str | None = None) -> None:
        super().__init__()
        self.takes_chats = True
        self.template = template
        self.publisher = FakePublisher()
        self.hands_out_tokenizer = hands_out_tokenizer
        self.kv_event_sources = {
            "0": {
                "endpoint": self.publisher.endpoint,
                "replay_endpoint": self.publisher.replay_endpoint or "",
                "topic": "",
            }
        }
        self.num_asked = 0
        self.script = self._script

    async def _script(self, request: Received, writer: asyncio.StreamWriter) -> None:
        path = request.target
        if path == b"/xllm/tokenizer" and self.hands_out_tokenizer:
            await answer(TOKENIZER.to_str().encode())(request, writer)
        elif path == CHAT_FORM_PATH.encode() and self.template is not None:
            side = TemplateForm(source=self.template, content_format="string")
            form = ChatForm(plain=side, with_tools=side, special_tokens={})
            await answer(msgspec.json.encode(form))(request, writer)
        elif path == b"/tokenize":
            self.num_asked += 1
            asked = json.loads(request.body)
            messages, text = asked.get("messages"), asked.get("prompt")
            if isinstance(messages, list) and self.takes_chats:
                text = chat_text(messages)
            elif text is None:
                await answer(b"", "400 Bad Request")(request, writer)
                return
            await answer(json.dumps({"tokens": ids(text)}).encode())(request, writer)
        elif path.startswith(b"/v1/"):
            await answer(b"{}")(request, writer)
        else:
            await answer(b"", "404 Not Found")(request, writer)

    def cache(self, token_ids: list[int], **fields: Any) -> None:
        count = len(token_ids) // SIZE
        event = BlockStored(
            [str(token_ids[: SIZE * (number + 1)]).encode() for number in range(count)],
            None,
            token_ids[: count * SIZE],
            SIZE,
            **fields,
        )
        self.publisher.publish(msgspec.msgpack.encode(Batch(0.0, [event])))


class Site:
    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self.service = service
        self.session = session

    async def until(self, is_so: Any) -> None:
        async with asyncio.timeout(30):
            while not is_so():
                await asyncio.sleep(0.005)

    async def where(self, body: Any, path: str = "/v1/completions") -> dict[str, Any]:
        """The decision on a request."""
        url = f"http://127.0.0.1:{self.service.port}{path}"
        headers = {"x-xllm-explain": "1"}
        async with self.session.post(url, json=body, headers=headers) as reply:
            assert reply.status == 200
            found: dict[str, Any] = json.loads(reply.headers["x-xllm-explain"])
            return found


@asynccontextmanager
async def site(*instances: Cached, **sections: Any) -> AsyncIterator[Site]:
    for instance in instances:
        await instance.__aenter__()
    config = ServiceConfig(
        listen={"host": "127.0.0.1", "port": 0},
        admin={"port": 0, "token": "t"},
        instances={"static": [one.url for one in instances], "probe_interval_s": 0.05},
        **sections,
    )
    service = Service(config)
    await service.start()
    try:
        with contextlib.ExitStack() as stack:
            for instance in instances:
                stack.enter_context(instance.publisher)
            async with aiohttp.ClientSession() as session:
                it = Site(service, session)
                await it.until(lambda: len(service.fleet.candidates(None)) == len(instances))
                assert all(one.life.state is State.READY for one in service.fleet)
                yield it
    finally:
        await service.stop()
        for instance in instances:
            await instance.die()


def name(instance: FakeInstance) -> str:
    return f"127.0.0.1:{instance.port}"


def test_a_prompt_goes_where_its_prefix_is(run: Any) -> None:
    """Ids, texts and chats; plain servers, which say themselves where they publish."""

    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            index = it.service.proxy.directory.index
            two.cache(ids(TEXT))
            await it.until(lambda: len(index) == 6)
            prompts: list[Any] = [ids(TEXT), TEXT]
            for prompt in prompts:
                for _ in range(3):
                    decision = await it.where({"model": "fake", "prompt": prompt})
                    assert decision["instance"] == name(two)
                    assert "(24 of 26 tokens cached)" in decision["reason"]
            chat = [{"role": "user", "content": TEXT}]
            body = {"model": "fake", "messages": chat, "max_tokens": 5}
            decision = await it.where(body, "/v1/chat/completions")
            assert (decision["instance"], decision["policy"]) == (name(two), "cost")
            one.cache(ids(TEXT), extra_keys=[["salt"], *[None] * 5])
            await it.until(lambda: len(index) == 12)
            decision = await it.where({"model": "fake", "prompt": TEXT, "cache_salt": "salt"})
            assert decision["instance"] == name(one)

    run(check())


def test_a_prompt_that_has_waited_goes_where_its_prefix_is_by_then(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two, flow={"enabled": True, "max_in_flight": 1}) as it:
            index, fleet, flow = (
                it.service.proxy.directory.index,
                it.service.fleet,
                it.service.proxy.flow,
            )
            assert flow is not None
            one.cache(list(range(1000, 1024)))
            await it.until(lambda: len(index) == 6)
            for instance in fleet:
                fleet.book(instance, 1)
            asking = asyncio.create_task(it.where({"model": "fake", "prompt": ids(TEXT)}))
            await it.until(lambda: len(flow.queue) == 1)
            two.cache(ids(TEXT))
            await it.until(lambda: len(index) == 12)
            for instance in fleet:
                fleet.release(instance, 1)
            flow.sweep()
            decision = await asking
            assert decision["instance"] == name(two)
            assert "(24 of 26 tokens cached)" in decision["reason"]

    run(check())


def test_texts_are_tokenised_here_once_that_is_known_to_be_the_same(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await it.until(lambda: it.service.proxy.directory.is_useful)
            for number in range(4):  # fetches the tokenizer of each, compares it with its server
                await it.where({"model": "fake", "prompt": f"x {number}"})
            copies = it.service.proxy.prompts._copies
            await it.until(lambda: len(copies._copies) == 2 and not copies._tasks)
            assert all(copy.tokenizer for copy in copies_of(it))
            assert len(copies._shared) == 1
            asked = one.num_asked + two.num_asked
            decision = await it.where({"model": "fake", "prompt": TEXT + " a"})
            assert decision["instance"] == name(two)
            assert one.num_asked + two.num_asked == asked
            # The same text again is remembered: nobody is asked.
            chat = {"model": "fake", "messages": [{"role": "user", "content": "b"}]}
            for expected in (1, 1):
                await it.where(chat, "/v1/chat/completions")
                assert one.num_asked + two.num_asked == asked + expected

    run(check())


def test_a_tokenizer_that_differs_from_its_server_is_not_used(run: Any, monkeypatch: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await it.until(lambda: it.service.proxy.directory.is_useful)
            monkeypatch.setitem(globals(), "ids", lambda text: [1, 2, 3])
            for number in range(2):
                await it.where({"model": "fake", "prompt": f"x {number}"})
            await it.until(lambda: one.num_asked > 1 and two.num_asked > 1)
            await it.until(lambda: not it.service.proxy.prompts._copies._tasks)
            assert not any(copy.tokenizer for copy in copies_of(it))
            assert samples.TEXTS

    run(check())


def copies_of(it: Site) -> list[Any]:
    found = it.service.proxy.prompts._copies._copies.values()
    return [copy for _, models in found for copy in models.values()]


async def copied(it: Site) -> None:
    """Have the service ask for a chat of each instance, and wait until it needs not."""
    await it.until(lambda: it.service.proxy.directory.is_useful)
    for number in range(4):
        await it.where(chat(f"x {number}"), CHATS)
    await it.until(lambda: len(copies_of(it)) == 2 and not it.service.proxy.prompts._copies._tasks)


CHATS = "/v1/chat/completions"


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}


def test_chats_are_rendered_here_once_that_is_known_to_be_the_same(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(template=TEMPLATE), Cached(template=TEMPLATE)
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await copied(it)
            assert all(copy.renderer for copy in copies_of(it))
            assert len({id(copy.renderer) for copy in copies_of(it)}) == 1
            asked = one.num_asked + two.num_asked
            decision = await it.where(chat(TEXT, max_tokens=5), CHATS)
            assert decision["instance"] == name(two)
            assert "(24 of 26 tokens cached)" in decision["reason"]
            assert one.num_asked + two.num_asked == asked
            # What is not certain is asked, and remembered all the same.
            parts = [{"type": "text", "text": TEXT}, {"type": "image_url", "image_url": {}}]
            for _ in range(2):
                assert (await it.where(chat(parts), CHATS))["instance"] == name(two)
                assert one.num_asked + two.num_asked == asked + 1

    run(check())


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE + "a",
        "{% if tools %}a{% endif %}" + TEMPLATE,
        "{{ raise_exception('all') }}",
        "{% no template",
    ],
)
def test_a_template_that_differs_from_its_server_is_not_used(
    run: Any, template: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In any sample; texts are tokenised here none the less."""

    async def check() -> None:
        one, two = Cached(template=template), Cached(template=template)
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await copied(it)
            assert all(copy.tokenizer and not copy.renderer for copy in copies_of(it))
            asked = one.num_asked + two.num_asked
            assert (await it.where(chat(TEXT), CHATS))["instance"] == name(two)
            assert one.num_asked + two.num_asked == asked + 1
            assert caplog.text.count("rendered otherwise") == (
                0 if "no template" in template else 2
            )

    run(check())


def test_a_template_that_was_never_seen_to_agree_is_not_used(run: Any) -> None:
    """Two that refuse every sample have not shown that they are the same."""

    async def check() -> None:
        one, two = (Cached(template="{{ raise_exception('no') }}") for _ in range(2))
        one.takes_chats = two.takes_chats = False
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await copied(it)
            assert all(copy.tokenizer and not copy.renderer for copy in copies_of(it))

    run(check())


@pytest.mark.looks_inside
def test_a_server_that_renders_otherwise_later_is_asked_again(run: Any, monkeypatch: Any) -> None:
    """A sample of its chats is compared with what it makes of them."""

    async def check() -> None:
        one, two = Cached(template=TEMPLATE), Cached(template=TEMPLATE)
        monkeypatch.setattr(tokens_module, "_COMPARE_EVERY", 1)
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await copied(it)
            prompts = it.service.proxy.prompts
            asked = one.num_asked + two.num_asked
            for number in range(4):
                await it.where(chat(f"y {number}"), CHATS)
            await it.until(lambda: one.num_asked + two.num_asked == asked + 4)
            await it.until(lambda: not prompts._copies._tasks)
            assert prompts.num_misread == 0
            monkeypatch.setitem(globals(), "chat_text", lambda messages: "a")
            for number in range(4):
                await it.where(chat(f"z {number}"), CHATS)
                await it.until(lambda: not prompts._copies._tasks)
            assert prompts.num_misread == 2, "one each; then they are asked"
            assert not any(copy.renderer for copy in copies_of(it))
            url = f"http://127.0.0.1:{it.service.admin_port}/metrics"
            async with it.session.get(url) as reply:
                assert "xllm_service_chats_misread_total 2.0" in await reply.text()

    run(check())


def test_a_server_that_dies_is_purged_and_one_that_says_nothing_is_served(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(hands_out_tokenizer=False), Cached()
        one.kv_event_sources = {}
        one.metrics = two.metrics = "process_start_time_seconds 1\n"
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            directory = it.service.proxy.directory
            await it.until(lambda: directory.is_useful)
            assert (await it.where({"model": "fake", "prompt": TEXT}))["instance"] == name(two)
            (known,) = [one for one in it.service.fleet if directory.describe(one)]
            assert directory.is_exact(known)
            url = f"http://127.0.0.1:{it.service.admin_port}/metrics"
            async with it.session.get(url) as reply:
                metrics = await reply.text()
            assert f'xllm_service_kv_index_blocks{{server="{name(two)}"}} 6.0' in metrics
            assert f'xllm_service_kv_index_exact{{server="{name(two)}"}} 1.0' in metrics
            # Another process on the same port: its cache is empty, whatever was known.
            two.publisher.__exit__(None, None, None)  # or it would be replayed at once
            two.publisher = FakePublisher()
            two.publisher.__enter__()
            two.metrics = "process_start_time_seconds 2\n"
            await it.until(lambda: not directory.is_useful)
            await it.where({"model": "fake", "prompt": TEXT})
            two.publisher.__exit__(None, None, None)

    run(check())


def test_a_fault_in_following_one_leaves_the_others(
    run: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        follow = Follower.take

        def faulty(self: Follower, sequence: int, payload: bytes) -> bool:
            if len(payload) > 1000:
                raise ZeroDivisionError("ours")
            return follow(self, sequence, payload)

        monkeypatch.setattr(Follower, "take", faulty)
        async with site(one, two) as it:
            directory = it.service.proxy.directory
            bad, good = sorted(it.service.fleet, key=lambda known: known.name != name(one))
            one.cache(list(range(1000, 1024)))
            two.cache(ids(TEXT))
            await it.until(lambda: len(directory.index) == 12)
            one.cache(list(range(2000, 4000)))
            await it.until(lambda: directory.describe(bad)[0]["state"] == "degraded")
            assert len(directory.index) == 6
            assert "ZeroDivisionError: ours" in directory.describe(bad)[0]["reason"]
            assert caplog.text.count("please report this") == 1
            assert directory.is_exact(good)
            two.cache(list(range(5000, 5024)))
            await it.until(lambda: len(directory.index) == 12)
            assert (await it.where({"model": "fake", "prompt": TEXT}))["instance"] == name(two)

    run(check())


def test_a_tokenizer_goes_with_the_last_instance_that_has_it(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await it.until(lambda: it.service.proxy.directory.is_useful)
            copies = it.service.proxy.prompts._copies
            for number in range(4):
                await it.where({"model": "fake", "prompt": f"x {number}"})
            await it.until(lambda: not copies._tasks and len(copies._shared) == 1)
            for instance in tuple(copies._copies):
                del copies._copies[instance]
            gc.collect()
            assert not copies._shared

    run(check())


def test_the_index_can_be_switched_off_while_it_runs(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            directory = it.service.proxy.directory
            two.cache(ids(TEXT))
            await it.until(lambda: directory.is_useful)
            enabled = directory.config
            directory.config = enabled.model_copy(update={"enabled": False})
            await it.until(lambda: not directory.is_useful)
            directory.config = enabled
            await it.until(lambda: directory.is_useful)

    run(check())


def test_wrong_bodies_are_the_instances_to_answer(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            two.cache(ids(TEXT))
            await it.until(lambda: it.service.proxy.directory.is_useful)
            bodies: list[Any] = [
                {"prompt": [-1]},
                {"prompt": 5},
                {"prompt": ["several", "prompts"]},
                {"prompt": None},
                {"prompt": []},
                {},
                {"prompt": TEXT, "truncate_prompt_tokens": 3},
                {"messages": "no list"},
            ]
            for body in bodies:
                for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
                    assert await it.where({"model": "fake", **body}, path)
        it.service.fleet.check_integrity()

    run(check())


def test_counted_prompt_tokens_are_taken_back(run: Any) -> None:
    async def check() -> None:
        one, two = Cached(), Cached()
        async with site(one, two) as it:
            for number in range(5):
                await it.where({"model": "fake", "prompt": "y" * number, "stream": True})
            assert [instance.prefill_tokens for instance in it.service.fleet] == [0, 0]

    run(check())
