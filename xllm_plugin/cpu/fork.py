"""The engine's process as a fork of its server's, which has imported everything already.

vLLM's CPU platform starts a new interpreter, so that OpenMP's library finds its environment when it
is loaded.  That interpreter imports for as long as the server did, one after the other.  A fork has
the imports, and shares their memory.  What a new process takes from its environment is set by
calls instead: `EngineFork.arm` before the fork and `EngineFork.enter` by the thread that computes.

Forking a process with threads is safe where no thread holds what the child needs.  At that moment
this one has threads of libraries that handle forks themselves (ZeroMQ, OpenBLAS, jemalloc), which
vLLM's default of forking on other platforms relies on as well.  OpenMP's do not: a child waits for
ever for the pool that its parent had.  So the server computes on one thread until then.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from xllm_plugin.config import load_config
from xllm_plugin.cpu.parent import end_with_parent
from xllm_plugin.cpu.threads import ThreadPlan

__all__ = ["METHOD_ENV", "WORKER", "EngineFork", "loaded_libraries", "refusal"]

WORKER = "xllm_plugin.cpu.worker.XllmCpuWorker"
"""The worker that calls `EngineFork.enter`."""
METHOD_ENV = "VLLM_WORKER_MULTIPROC_METHOD"


def refusal(vllm_config: Any, argv: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """Why the engine's process has to be a new one, or None when it may be a fork.

    For a server whose engine computes in its own process (`computes_alone`).
    """
    from vllm.platforms.interface import in_wsl

    preloads = environ.get("LD_PRELOAD", "").replace(":", " ").split()
    loaded = loaded_libraries()
    reasons = {
        "engine.fork is off": not load_config(vllm_config.additional_config).engine.fork,
        # vLLM takes a fork back under WSL.
        "this is not Linux, or under WSL": sys.platform != "linux" or in_wsl(),
        "--worker-cls": vllm_config.parallel_config.worker_cls != WORKER,
        "several API servers share it": vllm_config.parallel_config._api_process_count > 1,  # noqa: SLF001
        "--numa-bind": bool(vllm_config.parallel_config.numa_bind),
        # Its threads do not survive a fork.
        "gRPC": "--grpc" in argv or bool(vllm_config.observability_config.otlp_traces_endpoint),
        "LD_PRELOAD brings an OpenMP library of its own": any(
            Path(name).name.startswith(("libomp", "libiomp")) for name in preloads
        ),
        "LD_PRELOAD names a library that is not loaded here": not all(
            str(Path(name).resolve()) in loaded for name in preloads if "/" in name
        ),
        "threads are running": threading.active_count() > 1,
        # vLLM makes its processor in the server, on OMP_NUM_THREADS threads (`BaseRenderer`).
        "a multimodal model": vllm_config.model_config.multimodal_config is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def loaded_libraries(maps: Path = Path("/proc/self/maps")) -> frozenset[str]:
    """The files that are mapped into this process; none where the kernel does not tell."""
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(line[line.index("/") :] for line in lines if "/" in line)


class EngineFork:
    """One fork: armed in the server's process, entered in the engine's.

    The engine's process inherits this object with the rest of the memory.
    """

    def __init__(self) -> None:
        self._plan: ThreadPlan | None = None
        self._server_pid = 0
        self._num_threads = 0
        self._is_engine = False

    def arm(self, plan: ThreadPlan) -> None:
        """Have vLLM fork the process it starts next, and keep OpenMP's pool from being made here.

        To be called after the hook of vLLM's platform, which asks for "spawn" (seam
        "cpu-engine-fork").  Safe to repeat: a configuration may be built more than once.
        """
        if self._plan is None:
            self._num_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            os.register_at_fork(after_in_parent=self._disarm, after_in_child=self._part)
        self._plan, self._server_pid = plan, os.getpid()
        os.environ[METHOD_ENV] = "fork"

    def _disarm(self) -> None:
        """In the server, after the fork: processes started later are new ones, as before."""
        if self._plan is not None:
            self._plan = None
            os.environ[METHOD_ENV] = "spawn"
            torch.set_num_threads(self._num_threads)

    def _part(self) -> None:
        """In the engine's process, as its first act on its only thread."""
        if self._plan is None:
            return
        self._is_engine = True
        os.environ[METHOD_ENV] = "spawn"
        # The server's event loop hears of signals through this descriptor, also of the engine's.
        signal.set_wakeup_fd(-1)
        self._end_with_the_server()

    def enter(self) -> None:
        """In the engine's process, on the thread that will compute, before it does.

        Does nothing in a process that was not forked.
        """
        plan = self._plan
        if plan is None or not self._is_engine:
            return
        self._plan = None
        if not plan.cores:
            torch.set_num_threads(self._num_threads)
            return
        # Threads started from now on inherit the cores, as from OMP_PLACES.
        os.sched_setaffinity(0, plan.cores)
        torch.set_num_threads(plan.num_threads)

    def _end_with_the_server(self) -> None:
        """Get SIGTERM when the server ends, however it does: its port is inherited as well."""
        end_with_parent()
        if os.getppid() != self._server_pid:
            signal.raise_signal(signal.SIGTERM)
