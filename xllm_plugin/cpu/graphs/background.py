"""`BackgroundGraph`: a model's compiled graph, from its cache or from a child process."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import version
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_plugin import __version__
from xllm_plugin.cpu.graphs.artefact import ForeignGraphError, bind
from xllm_plugin.cpu.graphs.compiler import Request
from xllm_plugin.cpu.graphs.memory import available_bytes, resident_bytes
from xllm_plugin.cpu.graphs.store import GraphStore, StoredGraph
from xllm_plugin.cpu.native.build import find_compiler

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

__all__ = ["BackgroundGraph", "State", "facts_of"]

logger = logging.getLogger("vllm.xllm_plugin")

# The child has one thread and no place of its own; the engine's binding is not for it.
BINDING = ("GOMP_", "KMP_", "OMP_", "LD_PRELOAD", "VLLM_CPU_OMP_THREADS_BIND")


class State(StrEnum):
    """What serves, and what is on its way."""

    EAGER = "eager"
    COMPILING = "eager, while the graph is compiled"
    LOADED = "eager, the graph takes over with the next step"
    COMPILED = "compiled"
    FAILED = "eager, the graph could not be made"


class BackgroundGraph:
    """One model's graph for every batch size, and how it comes to serve.

    `load` at start takes it from disk.  Else `start` lets a child compile it, and the first
    `between_steps` after that puts it in force.  Whatever fails there is logged, and eager serves.

    Args:
        vllm_config: as before the model was loaded.
        store: where graphs are kept.
        command: starts the child; the request's path is added.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        store: GraphStore | None = None,
        command: tuple[str, ...] = (sys.executable, "-m", "xllm_plugin.cpu.graphs.compiler"),
    ) -> None:
        self._store = store or GraphStore()
        self._facts = facts_of(vllm_config)
        # Now, since a loaded model hangs in its configuration.
        self._request = _pickled(
            Request(vllm_config, self._facts, self._store.root, os.getpid(), _cpus())
        )
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._command = command
        self._model: torch.nn.Module | None = None
        self._ready: tuple[str, Callable[..., Any]] | None = None
        self._thread: threading.Thread | None = None
        self.state = State.EAGER

    def load(self, model: torch.nn.Module) -> bool:
        """Put a graph from disk in force for a model that was just loaded."""
        self._model = model
        started_s = time.monotonic()
        stored = self._store.find(self._facts)
        if stored is None or not self._bind(stored):
            return False
        self.between_steps()
        logger.info(
            "xllm-plugin: the model runs as one compiled graph, read from %s in %.1f s.",
            stored.folder,
            time.monotonic() - started_s,
        )
        return True

    def start(self) -> None:
        """Compile in the background what `load` did not find."""
        if self.state is not State.EAGER:
            return
        if self._request is None:
            self._failed("Its configuration cannot be handed to another process.")
            return
        needed, available = resident_bytes(), available_bytes()
        if available < needed:
            logger.warning(
                "xllm-plugin: eager serves on: compiling takes about as much memory as this "
                "process has (%.1f GiB), and %.1f GiB are available. Stop something, or give the "
                "KV cache less (--kv-cache-memory-bytes), and start again.",
                needed / 2**30,
                available / 2**30,
            )
            return
        self.state = State.COMPILING
        self._thread = threading.Thread(target=self._compile, name="xllm-compile", daemon=True)
        self._thread.start()

    def between_steps(self) -> None:
        """Put a graph that is ready in force; costs nothing otherwise."""
        if self._ready is None:
            return
        (name, function), self._ready = self._ready, None
        module: Any = self._model.get_submodule(name)  # type: ignore[union-attr]
        module.aot_compiled_fn = _FirstCall(module, function, self._failed)
        module.do_not_compile = False
        self.state = State.COMPILED

    def _compile(self) -> None:
        """Wait for the child, then read what it made; in a thread that ends with it."""
        key = self._store.key(self._facts)
        log = self._store.log(key)
        logger.info(
            "xllm-plugin: the model runs eager while a child process of the lowest priority "
            "compiles it for batches up to %d tokens. Its log: %s",
            self._max_tokens,
            log,
        )
        started_s = time.monotonic()
        try:
            code = self._run_child(self._request or b"", key, log)
            stored = self._store.find(self._facts) if code == 0 else None
        except Exception as error:  # noqa: BLE001 - whatever happens here, eager serves
            self._failed(f"{self._store.root}: {type(error).__name__}: {error}")
            return
        if stored is None:
            self._failed(f"the compiler ended with code {code}: {_last_line(log)} ({log})")
        elif self._bind(stored):
            logger.info(
                "xllm-plugin: compiled in %.0f s; from the next step on the model runs as one "
                "graph, as after the next start.",
                time.monotonic() - started_s,
            )

    def _run_child(self, pickled: bytes, key: str, log: Path) -> int:
        self._store.root.mkdir(parents=True, exist_ok=True)
        request = self._store.root / f".{key}.{os.getpid()}.request"
        request.write_bytes(pickled)
        try:
            with log.open("w", encoding="utf-8") as stream:
                return subprocess.run(
                    [*self._command, str(request)],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_environment(),
                    check=False,
                ).returncode
        finally:
            request.unlink(missing_ok=True)

    def _bind(self, stored: StoredGraph) -> bool:
        assert self._model is not None, "load comes first"
        name = stored.manifest.module
        try:
            function = bind(stored, self._model.get_submodule(name))
        except Exception as error:  # noqa: BLE001 - whatever reading raises, eager serves
            self._store.discard(stored.folder, f"{type(error).__name__}: {error}")
            if self.state is State.COMPILING:
                self._failed(str(error))
            return False
        # First the state: a step that finds the graph sets the next one.
        self.state = State.LOADED
        self._ready = (name, function)
        return True

    def _failed(self, why: str) -> None:
        self.state = State.FAILED
        logger.error(
            "xllm-plugin: no compiled graph for batches up to %d tokens; eager serves on. %s",
            self._max_tokens,
            why,
        )


class _FirstCall:
    """Stands before a graph until it has run once; an exception there gives the model back."""

    def __init__(
        self, module: Any, function: Callable[..., Any], failed: Callable[[str], None]
    ) -> None:
        self._module, self._function, self._failed = module, function, failed

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            output = self._function(module, *args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever it raises, eager serves
            self._module.do_not_compile = True
            self._module.aot_compiled_fn = None
            foreign = isinstance(error, ForeignGraphError)
            self._failed(str(error) if foreign else f"{type(error).__name__}: {error}")
            return module.forward(*args, **kwargs)
        self._module.aot_compiled_fn = self._function
        return output


def facts_of(vllm_config: VllmConfig) -> dict[str, str]:
    """Everything that a compiled graph depends on but its traced sources, which it names itself."""
    from vllm import envs
    from vllm.config.utils import hash_factors

    return {
        "vllm": version("vllm"),
        "torch": version("torch"),
        "xllm_plugin": __version__,
        "config": vllm_config.compute_hash(),
        "environment": hash_factors(envs.compile_factors()),
        "instructions": _instructions(Path("/proc/cpuinfo")),
        "compiler": _compiler_version(),
    }


def _instructions(cpuinfo: Path) -> str:
    """The instruction set by hash: Inductor compiles for this very processor."""
    wanted = ("flags", "Features", "model name")
    lines = {line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith(wanted)}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def _compiler_version() -> str:
    command = [find_compiler() or "false", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return said.partition("\n")[0]


def _pickled(request: Request) -> bytes | None:
    """As vLLM hands its configuration to its processes; None when it cannot be."""
    try:
        return bytes(ForkingPickler.dumps(request))
    except (AttributeError, TypeError, pickle.PicklingError):
        return None


def _cpus() -> frozenset[int]:
    """What this process may run on; OpenMP has bound single threads to single processors."""
    threads = (int(task.name) for task in Path("/proc/self/task").iterdir())
    return frozenset().union(*(os.sched_getaffinity(thread) for thread in threads))


def _environment() -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(BINDING)}
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
