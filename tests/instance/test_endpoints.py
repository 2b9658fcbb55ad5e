"""The endpoint plugin's routes, with real engines behind, wired in vLLM's two phases."""

from __future__ import annotations

import asyncio
import json
import threading
from argparse import Namespace
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest

from xllm_plugin.channel import EngineChannel, Readings
from xllm_plugin.instance import endpoints
from xllm_plugin.instance.chat_form import CHAT_FORM_PATH, ChatForm, TemplateForm
from xllm_plugin.instance.endpoints import XllmEndpoints
from xllm_plugin.registration import Heartbeat, Load
from xllm_plugin.xtensor.messages import MemorySection

Start = Callable[[int], EngineChannel]


def get(
    route: str, engine_client: Any, registry: CollectorRegistry | None = None
) -> httpx.Response:
    """Build the app as vLLM does and ask it one thing, on one event loop."""

    async def ask() -> httpx.Response:
        app = FastAPI()
        plugin = XllmEndpoints(
            registry or CollectorRegistry(), lambda: "a.platform.Class", lambda: None
        )
        plugin.attach_router(app)
        await plugin.init_state(engine_client, app.state, Namespace())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get(route)
        state = app.state.xllm
        if not isinstance(state, str):
            await state.reader.close()
        return response

    return asyncio.run(ask())


def test_snapshot_shows_every_rank(vllm_config: Any, start_engine: Start) -> None:
    vllm_config.parallel_config.data_parallel_size_local = 3
    start_engine(0)
    start_engine(2)
    response = get("/xllm/snapshot", SimpleNamespace(vllm_config=vllm_config, generate=None))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    readings = msgspec.json.decode(response.content, type=Readings)
    assert [reading.dp_rank for reading in readings.engines] == [0, 1, 2]
    assert [reading.snapshot is not None for reading in readings.engines] == [True, False, True]
    assert response.json()["engines"][0]["snapshot"]["load"]["num_generated_tokens"] == 1234
    assert "no engine listens" in response.json()["engines"][1]["error"]


def test_no_engine_is_503_in_the_form_of_vllms_errors(vllm_config: Any) -> None:
    response = get("/xllm/snapshot", SimpleNamespace(vllm_config=vllm_config, generate=None))
    assert response.status_code == 503
    error = response.json()["error"]
    assert error["code"] == 503
    assert "no engine listens at" in error["message"]


def test_engines_of_other_machines_only_is_503(vllm_config: Any) -> None:
    vllm_config.parallel_config.data_parallel_size_local = 0
    response = get("/xllm/snapshot", SimpleNamespace(vllm_config=vllm_config, generate=None))
    assert response.status_code == 503
    assert "no engine of instance abcde runs on this machine" in response.text


@pytest.mark.parametrize("route", ["/xllm/snapshot", "/xllm/memory", "/xllm/info"])
def test_a_server_without_engine_says_so(route: str) -> None:
    response = get(route, None)
    assert response.status_code == 503
    assert "renders prompts and has no engine" in response.json()["error"]["message"]


def test_a_disabled_channel_says_how_to_enable_it(vllm_config: Any) -> None:
    vllm_config.additional_config = {"xllm": {"channel": {"enabled": False}}}
    response = get("/xllm/snapshot", SimpleNamespace(vllm_config=vllm_config, generate=None))
    assert response.status_code == 503
    assert "the engine channel is off" in response.json()["error"]["message"]


def test_memory_is_shown_where_the_kv_cache_is_elastic(
    vllm_config: Any, start_engine: Start, memory: MemorySection
) -> None:
    vllm_config.parallel_config.data_parallel_size_local = 3
    engine = start_engine(0)
    engine.add_section("memory", lambda: memory)
    engine.publish_if_due(force=True)
    start_engine(1)
    response = get("/xllm/memory", SimpleNamespace(vllm_config=vllm_config, generate=None))
    assert response.status_code == 200
    elastic, fixed, absent = response.json()["engines"]
    assert (elastic["is_elastic"], fixed["is_elastic"], absent["is_elastic"]) == (
        True,
        False,
        False,
    )
    assert (elastic["budget_bytes"], elastic["resident_bytes"]) == (8000, 5000)
    assert elastic["memory"]["pages"]["num_mapped"] == 50
    assert elastic["pool_free_bytes"] == 1000
    assert [m["name"] for m in elastic["memory"]["pool"]["members"]] == ["this", "other"]
    assert fixed["memory"] is fixed["error"] is None
    assert "no engine listens" in absent["error"]


def test_info_tells_platform_versions_and_settings(vllm_config: Any, directory: Path) -> None:
    """It needs no engine that answers: it is what one looks at when none does."""
    info = get("/xllm/info", SimpleNamespace(vllm_config=vllm_config, generate=None)).json()
    assert info["platform"] == "a.platform.Class"
    assert info["device"] == "cpu"
    assert info["instance_id"] == "abcde"
    assert info["dp_ranks"] == [0]
    assert info["settings"]["channel"]["directory"] == str(directory)
    assert info["settings"]["channel"]["enabled"] is True
    assert info["versions"]["python"].startswith("3.")


def test_the_collector_joins_vllms_registry_once(vllm_config: Any, start_engine: Start) -> None:
    start_engine(0)
    registry = CollectorRegistry(auto_describe=True)
    for _ in range(2):
        get("/xllm/info", SimpleNamespace(vllm_config=vllm_config, generate=None), registry)
    assert generate_latest(registry).decode().count("\nxllm:steps_total{") == 1


def test_a_request_before_the_state_is_there_is_503() -> None:
    async def ask() -> httpx.Response:
        app = FastAPI()
        XllmEndpoints(CollectorRegistry(), str).attach_router(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/xllm/info")

    response = asyncio.run(ask())
    assert response.status_code == 503
    assert "still starting" in response.text


class _Service(BaseHTTPRequestHandler):
    """Takes every registration."""

    asked: ClassVar[Queue[tuple[str, str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.asked.put((self.command, self.path, json.loads(body) if body else None))
        reply = b'{"name": "here", "lease_s": 60.0, "in_flight": 0}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def do_DELETE(self) -> None:
        self.do_POST()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("has_channel", [True, False])
def test_a_server_registers_and_leaves_before_its_engine_stops(
    vllm_config: Any, start_engine: Start, has_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm", reason="the seam is checked in vLLM")
    start_engine(0)
    _Service.asked = Queue()
    stopped: list[float | None] = []
    source = SimpleNamespace(endpoint="tcp://*:5557", replay_endpoint=None, topic="")

    def shutdown(timeout: float | None = None) -> None:
        stopped.append(timeout)

    client = SimpleNamespace(
        vllm_config=vllm_config,
        generate=None,
        shutdown=shutdown,
        get_num_unfinished_requests=lambda: 0,
        get_kv_event_sources=lambda: {0: source},
    )
    vllm_config.parallel_config._api_process_rank = 0
    vllm_config.additional_config["xllm"]["channel"]["enabled"] = has_channel
    args = Namespace(
        host="127.0.0.1", port=8123, uds=None, ssl_keyfile=None, ssl_certfile=None, model="/m"
    )
    args.served_model_name = ["tiny", "alias"]

    async def begin(rank: int) -> None:
        vllm_config.parallel_config._api_process_rank = rank
        plugin = XllmEndpoints(CollectorRegistry(), str)
        await plugin.init_state(client, FastAPI().state, args)

    with ThreadingHTTPServer(("127.0.0.1", 0), _Service) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv(
                "XLLM_REGISTRATION__URL", f"http://127.0.0.1:{server.server_address[1]}"
            )
            asyncio.run(begin(1))
            assert client.shutdown is shutdown  # the second of two API servers: the first does it
            asyncio.run(begin(0))
            _, path, body = _Service.asked.get(timeout=30)
            assert (path, body["url"], body["models"], body["role"]) == (
                "/v1/registrations",
                "http://127.0.0.1:8123",
                ["tiny", "alias"],
                "mixed",
            )
            assert body["max_in_flight"] == 128  # of two engines
            assert body["kv_events"][0]["endpoint"] == "tcp://127.0.0.1:5557"
            client.shutdown(timeout=3)
            beat, leaving = _Service.asked.get(timeout=30), _Service.asked.get(timeout=30)
            assert beat[2]["is_draining"]
            load = beat[2]["load"]
            assert load == (
                {"num_running": 3, "num_waiting": 2, "kv_usage": 0.75, "ttft_s": None}
                | {"tpot_s": None}
                if has_channel
                else None
            )
            assert leaving[0] == "DELETE"
            assert stopped == [3]
        finally:
            server.shutdown()
            thread.join()


def test_the_last_heartbeat_is_told_to_services_that_get_none() -> None:
    async def ask(registrar: Any) -> httpx.Response:
        app = FastAPI()
        app.state.xllm_registrar = registrar
        XllmEndpoints(CollectorRegistry(), str).attach_router(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            return await session.get("/xllm/load")

    beat = Heartbeat(incarnation="i1", load=Load(num_running=3))
    response = asyncio.run(ask(SimpleNamespace(last_beat=beat)))
    assert Heartbeat.model_validate_json(response.content) == beat
    for registrar in (None, SimpleNamespace(last_beat=None)):
        assert asyncio.run(ask(registrar)).status_code == 404


def test_the_tokenizer_is_handed_out_if_it_is_one_of_the_library(vllm_config: Any) -> None:
    async def ask(client: Any) -> httpx.Response:
        app = FastAPI()
        app.state.engine_client = client
        XllmEndpoints(CollectorRegistry(), str).attach_router(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            return await session.get("/xllm/tokenizer")

    fast = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: '{"a": 1}'))
    response = asyncio.run(ask(SimpleNamespace(get_tokenizer=lambda: fast)))
    assert (response.status_code, response.json()) == (200, {"a": 1})
    for client in (None, SimpleNamespace(get_tokenizer=object)):
        response = asyncio.run(ask(client))
        assert (response.status_code, response.json()["error"]["code"]) == (404, 404)


def test_a_chat_template_is_handed_out_if_it_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask() -> httpx.Response:
        app = FastAPI()
        XllmEndpoints(CollectorRegistry(), str).attach_router(app)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as session:
            return await session.get(CHAT_FORM_PATH)

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (404, 404)
    side = TemplateForm(source="é{{ x }}", content_format="openai")
    form = ChatForm(plain=side, with_tools=side, special_tokens={"bos_token": "<s>"})
    monkeypatch.setattr(endpoints, "chat_form", lambda state: form)
    response = asyncio.run(ask())
    assert msgspec.json.decode(response.content, type=ChatForm) == form
