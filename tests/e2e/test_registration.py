"""A server that registers itself: found by its service, and gone from it before it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from xllm_plugin.bench.servers import Server, clean_environment, find_free_port

pytestmark = pytest.mark.e2e

MODEL_NAME = "smollm2"
PATIENCE_S = 120.0


@contextmanager
def service_at(admin_port: int, log_path: Path, *flags: str) -> Iterator[str]:
    """A service at which servers register; gives its public URL."""
    port = find_free_port()
    command = [sys.executable, "-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1"]
    settings = ["--set", "instances.registration_token=join", "--set", "admin.token=admin"]
    with Server(
        "service",
        [*command, "--port", str(port), "--admin-port", str(admin_port), *settings, *flags],
        port=admin_port,
        log_path=log_path,
        environment=clean_environment({}),
        ready_timeout_s=PATIENCE_S,
    ):
        yield f"http://127.0.0.1:{port}"


def instances(admin_port: int) -> list[Any]:
    reply = httpx.get(
        f"http://127.0.0.1:{admin_port}/v1/instances",
        headers={"Authorization": "Bearer admin"},
        trust_env=False,
    )
    found: list[Any] = reply.json()["instances"]
    return found


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def is_ready(admin_port: int) -> bool:
    return [one["state"] for one in instances(admin_port)] == ["ready"]


def test_a_server_finds_its_service_whenever_that_starts(
    xllm_url: str, registry_port: int, tmp_path: Path
) -> None:
    """The server was there first; it says what it is and how it is."""
    with service_at(registry_port, tmp_path / "log") as url:
        wait_until(lambda: is_ready(registry_port))
        body = {"model": MODEL_NAME, "prompt": "Once", "max_tokens": 8}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False)
        assert reply.status_code == 200
        wait_until(lambda: (instances(registry_port)[0]["load"] or {}).get("tpot_s") is not None)
        (one,) = instances(registry_port)
        assert (one["url"], one["source"], one["models"]) == (xllm_url, "embedded", [MODEL_NAME])
        assert one["role"] == "mixed"


@pytest.mark.full
def test_sigterm_drains(model: Path, tmp_path: Path) -> None:
    """A stream that runs ends whole, though its server was told to stop in its middle."""
    admin_port, port = find_free_port(), find_free_port()
    flags = ["--served-model-name", MODEL_NAME, "--max-model-len", "2048", "--enforce-eager"]
    command = [sys.executable, "-m", "xllm_plugin.cli", "serve", str(model), *flags]
    command += ["--kv-cache-memory-bytes", str(2**28), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--register", f"http://127.0.0.1:{admin_port}"]
    environment = {"HF_HUB_OFFLINE": "1", "XLLM_REGISTRATION__TOKEN": "join"}
    with (
        service_at(admin_port, tmp_path / "service.log") as url,
        (tmp_path / "server.log").open("wb") as log,
        subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=clean_environment(environment),
            start_new_session=True,
        ) as server,
    ):
        try:
            wait_until(lambda: is_ready(admin_port))
            events: list[str] = []
            begun = threading.Event()
            streaming = threading.Thread(target=stream, args=(url, events, begun))
            streaming.start()
            assert begun.wait(PATIENCE_S)
            os.kill(server.pid, signal.SIGTERM)
            wait_until(lambda: [one["state"] for one in instances(admin_port)] == ["draining"])
            assert server.poll() is None
            streaming.join(PATIENCE_S)
            assert events[-1] == "[DONE]"
            assert len(events) > 300
            assert server.wait(PATIENCE_S) == 0
            assert not instances(admin_port)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def stream(url: str, events: list[str], begun: threading.Event) -> None:
    body = {"model": MODEL_NAME, "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={**body, "stream": True},
        timeout=PATIENCE_S,
        trust_env=False,
    ) as reply:
        for line in reply.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
            if len(events) > 3:
                begun.set()
