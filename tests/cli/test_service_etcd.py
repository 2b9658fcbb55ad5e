"""Two `xllm service` over one etcd, each a process: kill -9 one, and the other has lost nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.cli.service import service
from xllm_plugin.testing.etcd_server import EtcdServer
from xllm_plugin.testing.service_harness import wait_until

PATIENCE_S = 120.0
LEASE_S = 2

REGISTRAR = """
    import threading
    from xllm_plugin.instance.registrar import Registrar
    from xllm_plugin.instance.registry_clients import registry_client
    from xllm_plugin.registration import Load, Registration, RegistrationConfig

    config = RegistrationConfig(url={url!r}, token="join")
    here = Registration(url={here!r}, incarnation="i1", models=("fake",))
    registry = registry_client(config)
    Registrar(config, here, Load, lambda: 0, registry=registry).start()
    threading.Event().wait()
"""


class Replicas:
    """Two services, a server behind them, and what registers it at either of them."""

    def __init__(self, folder: Path, etcd: EtcdServer) -> None:
        self.folder = folder
        self.backend = f"http://127.0.0.1:{find_free_port()}"
        self.ports = [(find_free_port(), find_free_port()) for _ in range(2)]
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(folder),
            "XLLM_SERVICE_INSTANCES__REGISTRATION_TOKEN": "join",
            "XLLM_SERVICE_INSTANCES__LEASE_S": str(LEASE_S),
            "XLLM_SERVICE_INSTANCES__SUSPECT_S": "1",
            "XLLM_SERVICE_ETCD__POLL_S": "0.5",
        }
        self.fake = self._start("-m", "xllm_plugin.testing.fake_openai", *self._port_of_backend())
        self.services = [
            self._start(
                *("-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1"),
                *("--port", str(port), "--admin-port", str(admin), "--etcd", f"{etcd.url}/test"),
            )
            for port, admin in self.ports
        ]
        url = ",".join(f"http://127.0.0.1:{admin}" for _, admin in self.ports)
        program = REGISTRAR.format(url=url, here=self.backend)
        self.registrar = self._start("-c", textwrap.dedent(program))

    def _port_of_backend(self) -> tuple[str, str]:
        return "--port", self.backend.rpartition(":")[2]

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *arguments], env=self.environment, stdout=log, stderr=log
            )

    def ask(self, which: int, max_tokens: int = 3) -> httpx.Response:
        body = {"model": "fake", "prompt": [1, 2], "max_tokens": max_tokens}
        url = f"http://127.0.0.1:{self.ports[which][0]}/v1/completions"
        return httpx.post(url, json=body, timeout=PATIENCE_S)

    def listed(self, which: int) -> str:
        url = f"http://127.0.0.1:{self.ports[which][1]}"
        return CliRunner().invoke(service, ["instances", "--admin-url", url]).output

    def until(self, is_so: Callable[[], bool]) -> None:
        wait_until(is_so, self.folder / "log")

    def close(self) -> None:
        for process in (self.registrar, *self.services, self.fake):
            process.kill()
            process.wait()


@pytest.fixture
def replicas(has_etcd: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with EtcdServer(tmp_path) as etcd:
        it = Replicas(tmp_path, etcd)
        try:
            yield it
        finally:
            it.close()


@pytest.mark.full
def test_a_service_is_killed_and_the_other_goes_on(replicas: Replicas) -> None:
    for which in (0, 1):
        replicas.until(lambda which=which: replicas.ask(which).status_code == 200)
        assert "ready" in replicas.listed(which)
    answers: list[int] = []
    asked_s: list[float] = []

    def load() -> None:
        while len(asked_s) < 3 or time.monotonic() < asked_s[0] + 4 * LEASE_S:
            asked_s.append(time.monotonic())
            answers.append(replicas.ask(1).status_code)
            time.sleep(0.01)

    loading = threading.Thread(target=load)
    loading.start()
    replicas.until(lambda: len(answers) > 3)
    replicas.services[0].kill()
    replicas.services[0].wait()
    loading.join()  # for longer than the lease that the dead one gave
    assert set(answers) == {200}
    with pytest.raises(httpx.ConnectError):
        replicas.ask(0)
    # The server dies too: etcd takes its record away, and the service forgets it.
    for process in (replicas.registrar, replicas.fake):
        process.kill()
    replicas.until(lambda: replicas.ask(1).status_code == 503)
    replicas.until(lambda: replicas.backend.removeprefix("http://") not in replicas.listed(1))
