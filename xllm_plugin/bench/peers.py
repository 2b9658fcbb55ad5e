"""The servers that are compared: stock vLLM in three forms, and xllm.

All take the same model flags.  The stock forms run with ``XLLM_PLATFORM=native``, so that nothing
of ours is in them although it is installed; `xllm` runs without that variable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import require_known
from xllm_plugin.bench.provenance import home_relative
from xllm_plugin.bench.servers import (
    GRACE_S,
    LOOPBACK,
    POLL_S,
    READY_TIMEOUT_S,
    Server,
    Waiting,
    clean_environment,
    find_free_port,
)

__all__ = ["PEER_NAMES", "PeerServer", "peer_servers", "xllm_server"]

PEER_NAMES = ("stock", "stock-2t", "stock-best", "xllm")

COMMON_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
"""Keeps every peer off the network; neither bears on speed."""


@dataclass(frozen=True, slots=True)
class PeerServer:
    """How one peer is started."""

    name: str
    what: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def port(self) -> int:
        """Where it listens, as its command says."""
        return int(self.command[self.command.index("--port") + 1])

    def changed(
        self,
        name: str,
        what: str,
        *,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> PeerServer:
        """The same with flags and variables added, under another name."""
        return replace(
            self,
            name=name,
            what=what,
            command=(*self.command, *flags),
            environment={**self.environment, **(environment or {})},
        )

    def server(
        self,
        log_path: Path,
        *,
        more: Mapping[str, str] | None = None,
        ready_timeout_s: float = READY_TIMEOUT_S,
        grace_s: float = GRACE_S,
        poll_s: float = POLL_S,
        on_wait: Callable[[Waiting], None] | None = None,
    ) -> Server:
        """Its server, not started; `more` joins its environment, the rest is as `Server` has it."""
        return Server(
            self.name,
            self.command,
            port=self.port,
            log_path=log_path,
            environment=clean_environment({**self.environment, **(more or {})}),
            ready_timeout_s=ready_timeout_s,
            grace_s=grace_s,
            poll_s=poll_s,
            on_wait=on_wait,
        )

    def record(self, model: str) -> schema.Peer:
        """The peer as a result tells it: interpreter and model by name, not by this disk's path."""
        shown = [Path(model).name if part == model else part for part in self.command]
        return schema.Peer(
            name=self.name,
            what=self.what,
            command=("python", *(home_relative(part) for part in shown[1:])),
            environment=self.environment,
        )


def peer_servers(
    model: str,
    *,
    port: int,
    flags: Sequence[str] = (),
    names: Sequence[str] = PEER_NAMES,
    cores: Sequence[int] | None = None,
) -> tuple[PeerServer, ...]:
    """The peers called `names`, in that order, serving `model` on loopback `port`.

    Args:
        model: folder of the model, as every peer gets it.
        port: TCP port; peers run one after the other, so that one serves for all.
        flags: vLLM flags that every peer gets, e.g. `("--max-model-len", "2048")`.
        names: of `PEER_NAMES`; raises `ConfigError` for others.
        cores: logical processors to compute on; those this process may use by default.
    """
    require_known("peers", names, PEER_NAMES)
    every = _all_peers(model, port, tuple(flags), sorted(cores or os.sched_getaffinity(0)))
    return tuple(every[name] for name in names)


def xllm_server(
    model: str,
    name: str,
    what: str,
    *,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> PeerServer:
    """The peer `xllm`, changed, on a port of its own: several can run at a time."""
    (found,) = peer_servers(model, port=find_free_port(), flags=flags, names=("xllm",))
    return found.changed(name, what, environment=environment)


def _all_peers(
    model: str, port: int, flags: tuple[str, ...], cores: Sequence[int]
) -> dict[str, PeerServer]:
    where = ("--host", LOOPBACK, "--port", str(port), *flags)
    stock = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *where)
    native = {"XLLM_PLATFORM": "native", **COMMON_ENVIRONMENT}
    bound = {**native, "VLLM_CPU_OMP_THREADS_BIND": _core_list(cores)}
    inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(len(cores))}
    peers = (
        PeerServer("stock", "stock vLLM, no tuning", stock, native),
        PeerServer("stock-2t", "stock vLLM computing on all cores", stock, bound),
        PeerServer(
            "stock-best",
            "stock vLLM computing on all cores, worker inside the engine process",
            (*stock, "--distributed-executor-backend", "uni"),
            {**bound, **inside},
        ),
        PeerServer(
            "xllm",
            "vLLM with this plugin, no tuning",
            (sys.executable, "-m", "xllm_plugin.cli", "serve", model, *where),
            dict(COMMON_ENVIRONMENT),
        ),
    )
    return {peer.name: peer for peer in peers}


def _core_list(cores: Sequence[int]) -> str:
    """`0-3` for neighbours, `0,2,5` otherwise (vLLM reads both)."""
    if list(cores) == list(range(cores[0], cores[-1] + 1)) and len(cores) > 1:
        return f"{cores[0]}-{cores[-1]}"
    return ",".join(map(str, cores))
