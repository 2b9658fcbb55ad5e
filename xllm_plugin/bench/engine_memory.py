"""The memory of a server's engine, as the kernel counts it and as the engine itself does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

import httpx
import msgspec

from xllm_plugin.channel.messages import Readings, Snapshot
from xllm_plugin.errors import ModelError, NotNowError
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemorySection

__all__ = ["Resident", "Sampler", "kv_bytes_per_token", "memory_of", "resident", "snapshot_of"]

SampleT = TypeVar("SampleT")

TIMEOUT_S = 60.0
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident memory of one process, by proc_pid_status(5).

    Attributes:
        all_bytes: of every kind (VmRSS).
        shared_bytes: of memory files and other shared memory (RssShmem): an elastic KV cache is on
            pages of a memory file, and an engine has hardly anything else of the kind.
    """

    all_bytes: int
    shared_bytes: int


def resident(pid: int, proc: Path = PROC) -> Resident:
    """What the kernel counts for a process.  Raises `NotNowError` when there is none."""
    try:
        lines = (proc / str(pid) / "status").read_text().splitlines()
        found = {name: text for name, _, text in (line.partition(":") for line in lines)}
        kib = {name: int(found[name].split()[0]) for name in ("VmRSS", "RssShmem")}
    except (OSError, LookupError) as error:  # a process that is just ending has no memory lines
        raise NotNowError(f"process {pid} has ended; see the server's log") from error
    return Resident(1024 * kib["VmRSS"], 1024 * kib["RssShmem"])


def snapshot_of(client: httpx.Client) -> Snapshot:
    """The newest snapshot of a server's only engine.

    Raises:
        NotNowError: the server has none.
    """
    try:
        reply = client.get("/xllm/snapshot").raise_for_status()
        (reading,) = msgspec.json.decode(reply.content, type=Readings).engines
    except (httpx.HTTPError, msgspec.DecodeError, ValueError) as error:
        raise NotNowError(f"{client.base_url} shows no snapshot of one engine: {error}") from error
    if reading.snapshot is None:
        raise NotNowError(f"{client.base_url} has no snapshot of its engine: {reading.error}")
    return reading.snapshot


def memory_of(snapshot: Snapshot) -> MemorySection:
    """What an engine says of its elastic KV cache.

    Raises:
        NotNowError: it has none.
    """
    section = snapshot.section(MEMORY_SECTION, MemorySection)
    if section is None:
        raise NotNowError("the engine's KV cache is not elastic; see the server's log")
    return section


def kv_bytes_per_token(model: Path) -> int:
    """Bytes of one token's keys and values, in a dense model in 16 bits.

    Raises:
        ModelError: the model's config.json does not name what that follows from.
    """
    config = json.loads((model / "config.json").read_text())
    try:
        heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except KeyError as error:
        raise ModelError(f"{model}/config.json names no {error}; use a dense text model") from error
    return int(2 * 2 * layers * heads * size)


class Sampler(Generic[SampleT]):
    """Takes samples in a thread of its own, for the length of a `with` block.

    Args:
        take: called at the beginning, every `every_s` and at the end; what it raises, the block
            raises at its end.
        every_s: pause between two calls.
    """

    def __init__(self, take: Callable[[], SampleT], *, every_s: float) -> None:
        self.samples: list[SampleT] = []
        self._take = take
        self._every_s = every_s
        self._stopping = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="xllm-bench-sampler", daemon=True)

    def __enter__(self) -> Self:
        self.samples.append(self._take())
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        if kind is not None:
            return
        if self._error is not None:
            raise self._error
        self.samples.append(self._take())

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._every_s):
                self.samples.append(self._take())
        except Exception as error:  # noqa: BLE001 - raised where the block ends
            self._error = error
