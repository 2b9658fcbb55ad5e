"""`xllm service` as a process: it serves, reloads, drains, and its subcommands find it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.cli.service import service
from xllm_plugin.errors import ConfigError, MisuseError, NotNowError
from xllm_plugin.testing.service_harness import wait_until

PATIENCE_S = 60.0


class Started:
    """A service, and an OpenAI server behind it, each a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.admin_port, self.backend_port = (find_free_port() for _ in range(3))
        self.file = folder / "service.yaml"
        self.log = folder / "log"
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        self.processes: list[subprocess.Popen[bytes]] = []

    def configure(self, policy: str) -> None:
        self.file.write_text(
            f"listen: {{host: 127.0.0.1, port: {self.port}}}\n"
            f"admin: {{port: {self.admin_port}}}\n"
            f"instances: {{static: ['http://127.0.0.1:{self.backend_port}']}}\n"
            f"routing: {{policy: {policy}}}\n"
        )

    def start(self) -> None:
        backend = ["xllm_plugin.testing.fake_openai", "--port", str(self.backend_port)]
        ours = ["xllm_plugin.cli", "service", "--config", str(self.file)]
        with self.log.open("wb") as log:
            for arguments in (backend, ours):
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *arguments], env=self.environment, stderr=log
                    )
                )

    def ask(self) -> httpx.Response:
        body = {"model": "fake", "prompt": [1, 2], "max_tokens": 3}
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body, timeout=30)

    def until(self, is_so: Callable[[], bool]) -> None:
        wait_until(is_so, self.log)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    it = Started(tmp_path)
    it.configure("least-loaded")
    it.start()
    yield it
    for process in it.processes:
        process.kill()
        process.wait()


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(service, list(arguments))


def test_a_service_from_start_to_end(started: Started) -> None:
    """It serves, is listed, is reloaded, and ends with 0 when it is told to."""
    started.until(lambda: started.ask().status_code == 200)
    admin = ("--admin-url", f"http://127.0.0.1:{started.admin_port}")
    listed = invoke("instances", *admin)
    assert "ready" in listed.output, listed
    assert "-> 127.0.0.1" in invoke("decisions", *admin).output
    page, _, token = invoke("dashboard", *admin).output.strip().partition("#token=")
    assert "<title>xllm service</title>" in httpx.get(page).text
    headers = {"Authorization": f"Bearer {token}"}
    assert httpx.get(f"{admin[1]}/v1/overview", headers=headers).json()["policy"] == "least-loaded"
    name = f"127.0.0.1:{started.backend_port}"
    assert "draining, 0 in flight" in invoke("drain", name, *admin).output
    assert started.ask().status_code == 503
    assert "joining" in invoke("undrain", name, *admin).output
    started.until(lambda: started.ask().status_code == 200)
    failed = invoke("drain", "nobody", *admin)
    assert isinstance(failed.exception, MisuseError)
    assert name in str(failed.exception)
    ours = started.processes[1]
    started.configure("session")
    ours.send_signal(signal.SIGHUP)
    started.until(lambda: "reloaded" in started.log.read_text())
    started.ask()
    assert "(session: " in invoke("decisions", *admin).output
    started.configure("best")
    ours.send_signal(signal.SIGHUP)
    started.until(lambda: "not reloaded" in started.log.read_text())
    assert started.ask().status_code == 200
    ours.send_signal(signal.SIGTERM)
    assert ours.wait(PATIENCE_S) == 0
    assert not list(started.folder.glob("**/*.token"))


def test_check_says_what_is_wrong_and_starts_nothing(tmp_path: Path) -> None:
    assert invoke("--check", "--set", "timeouts.drain_s=3").output == "The settings are valid.\n"
    for arguments, says in (
        (("--policy", "best"), "known are cost, least-loaded"),
        (("--set", "listen.prt=3"), "unknown setting 'listen.prt'"),
        (("--set", "listen"), "write SECTION.NAME=VALUE"),
        (("--set", "listen.port=["), "is not YAML"),
        (("--instance", "a:1"), "write http://host:port"),
        (("--etcd", "http://a:2379"), "write etcd://host:2379"),
        (("--config", str(tmp_path / "absent")), "no such file"),
        (("--set", f"instances.file={tmp_path / 'absent'}"), "is not a list of instances"),
    ):
        failed = invoke("--check", *arguments)
        assert isinstance(failed.exception, ConfigError), arguments
        assert says in str(failed.exception)


def test_commands_that_find_no_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    url = f"http://127.0.0.1:{find_free_port()}"
    failed = invoke("instances", "--admin-url", url)
    assert isinstance(failed.exception, MisuseError)
    assert "Give --token" in str(failed.exception)
    failed = invoke("instances", "--admin-url", url, "--token", "x")
    assert isinstance(failed.exception, NotNowError)
    assert url in str(failed.exception)
