"""An engine's process that is a fork: when, and that it is what a new process would be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
from xllm_plugin.cpu import fork

SERVE = ["vllm", "serve", "m"]


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "_api_process_count": 1,
        "multimodal_config": None,
        "numa_bind": False,
        "otlp_traces_endpoint": None,
        "worker_cls": fork.WORKER,
        **changes,
    }
    return SimpleNamespace(
        additional_config=values.pop("additional_config", {}),
        model_config=SimpleNamespace(multimodal_config=values["multimodal_config"]),
        observability_config=SimpleNamespace(otlp_traces_endpoint=values["otlp_traces_endpoint"]),
        parallel_config=SimpleNamespace(**values),
    )


def refusal(vllm_config: Any = None, argv: list[str] = SERVE, **environ: str) -> str | None:
    return fork.refusal(vllm_config or config(), argv, environ)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a server then; tests before this one may have left threads."""
    count, there_already = threading.active_count, threading.active_count() - 1
    monkeypatch.setattr(fork.threading, "active_count", lambda: count() - there_already)


def test_a_server_s_engine_is_forked() -> None:
    assert refusal() is None
    assert refusal(LD_PRELOAD="") is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"additional_config": {"xllm": {"engine": {"fork": False}}}}, "engine.fork is off"),
        ({"_api_process_count": 2}, "several API servers"),
        ({"numa_bind": True}, "--numa-bind"),
        ({"worker_cls": "my.Worker"}, "--worker-cls"),
        ({"multimodal_config": object()}, "a multimodal model"),
        ({"otlp_traces_endpoint": "http://localhost:4317"}, "gRPC"),
    ],
)
def test_what_keeps_a_server_from_it(changes: dict[str, Any], reason: str) -> None:
    assert reason in (refusal(config(**changes)) or "")


def test_a_variable_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_ENGINE__FORK", "0")
    assert refusal() == "engine.fork is off"


def test_a_grpc_server_s_threads_would_not_survive() -> None:
    assert refusal(argv=[*SERVE, "--grpc"]) == "gRPC"


def test_a_library_to_preload_needs_a_new_process() -> None:
    absent = "/opt/lib/libtcmalloc_minimal.so.4"
    assert "not loaded here" in (refusal(LD_PRELOAD=absent) or "")
    libc = next(name for name in fork.loaded_libraries() if "libc.so" in name or "libc-" in name)
    assert refusal(LD_PRELOAD=libc) is None
    # The loader finds names without a folder by itself; they are there since the start.
    assert refusal(LD_PRELOAD="libtcmalloc.so.4") is None


def test_another_openmp_library_has_rules_of_its_own() -> None:
    assert "OpenMP" in (refusal(LD_PRELOAD="libiomp5.so") or "")


def test_a_thread_may_hold_what_the_engine_needs() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert refusal() == "threads are running"
    finally:
        done.set()
        thread.join()


def test_a_kernel_that_tells_of_no_library(tmp_path: Path) -> None:
    assert fork.loaded_libraries(tmp_path / "maps") == frozenset()


# A server with vLLM's order of events: arm, event loop with a wake-up descriptor, fork, enter.
SERVER = """
    import json, multiprocessing, os, signal, socket, sys, threading, time, torch
    from xllm_plugin.cpu.fork import METHOD_ENV, EngineFork
    from xllm_plugin.cpu.threads import ThreadPlan

    before = torch.get_num_threads()
    engine_fork = EngineFork()
    engine_fork.enter()  # as in a process that was not forked
    core = sorted(os.sched_getaffinity(0))[-1]
    plan = ThreadPlan(NUM_THREADS, CORES)
    engine_fork.arm(plan)
    engine_fork.arm(plan)
    armed = {"threads": torch.get_num_threads(), "method": os.environ[METHOD_ENV]}
    torch.ones(1 << 22).sum()  # would make OpenMP's pool, which a child cannot use
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno())

    def engine(pipe):
        ended = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
        found = {}

        def compute():
            engine_fork.enter()
            torch.ones(1 << 22).sum()
            found.update(
                threads=torch.get_num_threads(), cores=sorted(os.sched_getaffinity(0))
            )

        if ON_A_THREAD:  # as with --async-scheduling
            model_thread = threading.Thread(target=compute)
            model_thread.start()
            model_thread.join()
        else:
            compute()
        os.kill(os.getpid(), signal.SIGTERM)
        found |= {"method": os.environ[METHOD_ENV], "ended": bool(ended)}
        ended.clear()  # before the server hears of it, and ends
        pipe.send(found)
        while not ended:
            time.sleep(0.01)
        os.write(1, b"ended with the server")

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=engine, args=(there,))
    process.start()
    told = here.recv()
    reader.setblocking(False)
    try:
        woken = bool(reader.recv(1))
    except BlockingIOError:
        woken = False
    print(json.dumps({
        "before": before, "core": core, "armed": armed, "engine": told, "woken": woken,
        "after": {"threads": torch.get_num_threads(), "method": os.environ[METHOD_ENV]},
    }), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run_server() -> Callable[..., tuple[dict[str, Any], str]]:
    def run(
        num_threads: str, cores: str, *, on_a_thread: bool = False
    ) -> tuple[dict[str, Any], str]:
        code = textwrap.dedent(SERVER).replace("NUM_THREADS", num_threads).replace("CORES", cores)
        code = code.replace("ON_A_THREAD", str(on_a_thread))
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        # The pipe of its output is closed when the engine, too, has ended.
        assert done.returncode == -9, done.stderr
        told, _, rest = done.stdout.partition("\n")
        return json.loads(told), rest

    return run


@pytest.mark.parametrize("on_a_thread", [False, True])
def test_a_fork_computes_as_a_new_process_would_and_ends_with_its_server(
    run_server: Callable[..., tuple[dict[str, Any], str]], on_a_thread: bool
) -> None:
    told, rest = run_server("3", "(core,)", on_a_thread=on_a_thread)
    assert told["armed"] == {"threads": 1, "method": "fork"}
    assert told["engine"]["threads"] == 3
    assert told["engine"]["cores"] == [told["core"]]
    assert told["engine"]["ended"]
    assert not told["woken"]  # the server's loop hears nothing of the engine's signals
    assert told["engine"]["method"] == told["after"]["method"] == "spawn"
    assert told["after"]["threads"] == told["before"]
    assert rest == "ended with the server"


def test_a_user_who_binds_keeps_threads_and_cores(
    run_server: Callable[..., tuple[dict[str, Any], str]],
) -> None:
    told, _ = run_server("0", "()")
    assert told["engine"]["threads"] == told["before"]
    assert told["engine"]["cores"] == sorted(os.sched_getaffinity(0))
