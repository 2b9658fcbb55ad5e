"""A server is up inside the `with` block and gone behind it, whatever happens."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from xllm_plugin.bench.servers import (
    Server,
    Waiting,
    clean_environment,
    find_free_port,
    last_line,
    tail,
)
from xllm_plugin.errors import MisuseError, NotNowError


def fake(tmp_path: Path, *flags: str, port: int | None = None, **options: object) -> Server:
    port = port or find_free_port()
    command = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", str(port), *flags)
    settings: dict[str, object] = {"environment": clean_environment({}), **options}
    return Server("fake", command, port=port, log_path=tmp_path / "fake.log", **settings)  # type: ignore[arg-type]


def is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    states = [
        stat.read_text().rpartition(")")[2].split()
        for stat in Path("/proc").glob("[0-9]*/stat")
        if stat.exists()
    ]
    return all(fields[0] == "Z" for fields in states if int(fields[2]) == group)


def test_up_inside_and_gone_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # not asked
    seen: list[Waiting] = []
    with fake(tmp_path, on_wait=seen.append) as server:
        group = server.pid
        assert group is not None
        with server.client() as client:
            assert client.get("/health").status_code == 200
        server.check_alive()
        assert server.ready_after_s > 0
    assert is_gone(group)
    assert seen[0].server == "fake"
    server.stop()  # safe to repeat


def test_a_server_that_dies_gives_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(NotNowError, match=r"exit code 3(.|\n)*no such model") as caught,
        fake(tmp_path, "--die", "no such model"),
    ):
        pytest.fail("must not come up")
    assert "fake" in str(caught.value)


def test_a_death_in_traffic_is_noticed(tmp_path: Path) -> None:
    with fake(tmp_path) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NotNowError, match="signal 9"):
            server.check_alive()


def test_a_server_that_hangs_is_given_up_and_killed(tmp_path: Path) -> None:
    groups: list[int] = []

    def note(_: Waiting) -> None:
        assert server.pid is not None
        groups.append(server.pid)

    server = fake(tmp_path, "--hang", ready_timeout_s=1.0, grace_s=0.2, on_wait=note)
    with pytest.raises(NotNowError, match="not ready after"), server:
        pytest.fail("must not come up")
    assert is_gone(groups[0])


def test_children_of_the_server_end_with_it(tmp_path: Path) -> None:
    port = find_free_port()
    script = f"sleep 600 & exec {sys.executable} -m xllm_plugin.testing.fake_openai --port {port}"
    server = Server(
        "parent",
        ("bash", "-c", script),
        port=port,
        log_path=tmp_path / "log",
        environment=clean_environment({}),
    )
    with server:
        group = server.pid
        assert group is not None
    assert is_gone(group)


def test_an_exception_inside_stops_the_server(tmp_path: Path) -> None:
    server = fake(tmp_path)
    groups: list[int] = []

    def use() -> None:
        with server:
            assert server.pid is not None
            groups.append(server.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert is_gone(groups[0])


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with fake(tmp_path) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(MisuseError, match=f"port {port}.*in use"), fake(tmp_path, port=port):
            pytest.fail("must not come up")


def test_a_command_that_does_not_exist_is_explained(tmp_path: Path) -> None:
    server = Server(
        "none", ("/no/such/program",), port=find_free_port(), log_path=tmp_path / "log",
        environment={},
    )  # fmt: skip
    with pytest.raises(MisuseError, match="cannot be started"), server:
        pytest.fail("must not come up")


def test_environment_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CPU_KVCACHE_SPACE", "XLLM_PLATFORM", "OMP_NUM_THREADS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/cache")
    found = clean_environment({"XLLM_PLATFORM": "native"})
    assert found["XLLM_PLATFORM"] == "native"
    assert found["VLLM_CACHE_ROOT"] == "/cache"
    assert not {"VLLM_CPU_KVCACHE_SPACE", "OMP_NUM_THREADS", "LD_PRELOAD"} & found.keys()
    assert found["PATH"] == os.environ["PATH"]


def test_log_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == "(no log)"
    log.write_text("")
    assert tail(log) == "(empty log)"
    log.write_text("".join(f"line {i}\n" for i in range(100)) + "\n")
    assert tail(log, lines=2) == "line 99\n"
    assert last_line(log) == "line 99"
