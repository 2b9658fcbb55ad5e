"""Two servers, one after the other: stock vLLM's answers are recorded, then xllm's.

Both are started with the very same command; the environment chooses the platform.  Never two
engines at once: test machines are small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.bench.peers import xllm_server
from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.models import prepare
from xllm_plugin.testing.dialogues import hold_all

MODEL_NAME = "smollm2"
REGISTRATION_TOKEN = "join"

# Float32, so that answers do not depend on which requests happened to share a batch; both sides
# compute on all cores, since a sum may depend on the number of threads.
FLAGS = (
    *("--served-model-name", MODEL_NAME),
    *("--dtype", "float32"),
    *("--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(2**28)),
    *("--tool-call-parser", "hermes"),
    "--enforce-eager",
    "--enable-auto-tool-choice",
)


@pytest.fixture(scope="session")
def model() -> Path:
    return prepare(MODEL_NAME)


@contextmanager
def serving(model: Path, log_path: Path, **environment: str) -> Iterator[str]:
    """The URL of a server of `model`."""
    name = environment.get("XLLM_PLATFORM", "default")
    peer = xllm_server(str(model), name, "", flags=FLAGS, environment=environment)
    with peer.server(log_path, ready_timeout_s=240.0) as server:
        yield server.url


@pytest.fixture(scope="session")
def threads() -> dict[str, str]:
    """Environment that has every core compute, as both sides get it."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": cores}


@pytest.fixture(scope="session")
def native_answers(
    model: Path, threads: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What stock vLLM answers; its server is gone when this returns."""
    log_path = tmp_path_factory.mktemp("native") / "log"
    with serving(model, log_path, XLLM_PLATFORM="native", **threads) as url:
        return hold_all(url, MODEL_NAME)


@pytest.fixture(scope="session")
def registry_port() -> int:
    """Admin port of a service that need not run: the xllm server registers there."""
    return find_free_port()


def registration(port: int) -> dict[str, str]:
    """Environment of a server that registers at a service on loopback, KV events included."""
    return {
        "XLLM_REGISTRATION__URL": f"http://127.0.0.1:{port}",
        "XLLM_REGISTRATION__TOKEN": REGISTRATION_TOKEN,
        "XLLM_REGISTRATION__KV_EVENTS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # events are published on this address
    }


@pytest.fixture(scope="session")
def xllm_url(
    model: Path,
    threads: dict[str, str],
    native_answers: dict[str, Any],
    registry_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A running xllm server, started after stock vLLM's has stopped."""
    environment = {**threads, **registration(registry_port)}
    with serving(model, tmp_path_factory.mktemp("xllm") / "log", **environment) as url:
        yield url


@pytest.fixture(scope="session")
def xllm_answers(xllm_url: str) -> dict[str, Any]:
    """What xllm answers to the same requests in the same order."""
    return hold_all(xllm_url, MODEL_NAME)
