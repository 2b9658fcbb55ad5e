"""The endpoint plugin in vLLM's own wiring: its protocol, its /metrics, its route replacement."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import prometheus_client
import pytest

from xllm_plugin import shims
from xllm_plugin.channel import EngineChannel
from xllm_plugin.instance.endpoints import XllmEndpoints
from xllm_plugin.seams import Process, check_all

pytestmark = pytest.mark.engine  # imports vLLM, about ten seconds


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    shims.install()
    pytest.importorskip("vllm")


def scrape(path: str, engine_client: Any) -> httpx.Response:
    """Build vLLM's metrics routes and our plugin's as `build_app` does, then ask for `path`."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router
    from vllm.plugins.endpoint_plugins.interface import (
        attach_endpoint_plugins,
        init_endpoint_plugins_state,
    )

    async def ask() -> httpx.Response:
        app = FastAPI()
        attach_router(app)
        attach_endpoint_plugins(app, ("generate",))
        await init_endpoint_plugins_state(engine_client, app.state, Namespace())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.get(path)
        await app.state.xllm.reader.close()
        return response

    return asyncio.run(ask())


@pytest.fixture
def engine_client(
    vllm_config: Any,
    start_engine: Callable[[int], EngineChannel],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """An engine that runs, and a vLLM that finds our plugin and no other."""
    monkeypatch.setattr(
        "vllm.plugins.load_endpoint_plugins", lambda _: [XllmEndpoints(platform_name=lambda: "p")]
    )
    start_engine(0)
    return SimpleNamespace(vllm_config=vllm_config, generate=None)


def test_it_is_an_endpoint_plugin_to_vllm() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(XllmEndpoints(), EndpointPlugin)


def test_metrics_of_one_api_server(engine_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    response = scrape("/metrics", engine_client)
    assert response.status_code == 200
    assert 'xllm:steps_total{engine="0",model_name="tiny"} 10.0' in response.text
    assert "python_info" in response.text


def test_metrics_of_several_api_servers(
    engine_client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    response = scrape("/metrics", engine_client)
    assert response.status_code == 200
    assert 'xllm:steps_total{engine="0",model_name="tiny"} 10.0' in response.text
    assert response.headers["content-type"] == prometheus_client.CONTENT_TYPE_LATEST


def test_routes_of_ours_are_found(engine_client: Any) -> None:
    assert scrape("/xllm/snapshot", engine_client).status_code == 200
    assert scrape("/xllm/info", engine_client).json()["platform"] == "p"


def test_what_we_lean_on_in_the_api_server_is_there() -> None:
    check_all(Process.SERVER)
