"""Sleep and waking of a server under load, beside reading as many bytes from the page cache."""

from __future__ import annotations

import mmap
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from xllm_plugin.bench.engine_memory import memory_of, resident, snapshot_of
from xllm_plugin.bench.open_loop import Sending, Sent, evenly, send
from xllm_plugin.bench.promises import whole_check
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.servers import Server
from xllm_plugin.bench.traces import Lengths, Vocabulary, synthesise
from xllm_plugin.channel.messages import Snapshot
from xllm_plugin.errors import NotNowError

__all__ = ["Sleep", "checks", "figures", "measure"]

NUM_REQUESTS, PROMPT_TOKENS = 8, 1000
STEPS_BEFORE_SLEEP = 20
TOKENS_PER_SLEEP = 100
"""Output tokens of a request for each time that it is put to sleep; more than it gets to."""
GIVE_UP_S = 600.0
LOAD_TIMEOUT_S, LOOK_S = 240.0, 0.05
KV_MS: Final = 100.0
FREED_AT_LEAST: Final = 0.95
TIMES_A_READ: Final = 1.25
"""Waking writes where nothing is, as the read does; the rest is the machine's noise."""
CHUNK_BYTES = 16 * 2**20

_ASLEEP = re.compile(
    r"asleep at level 1: KV cache away in ([\d.]+) ms, ([\d.]+) MiB of weights in ([\d.]+) ms"
)
_AWAKE = re.compile(r"awake: weights in ([\d.]+) ms, KV cache in ([\d.]+) ms")


@dataclass(frozen=True, slots=True)
class Sleep:
    """One sleep and waking.

    Attributes:
        kv_bytes: behind blocks of requests and the prefix cache, before.
        weight_bytes: that went.
        freed_bytes: resident memory of the engine before, without that during sleep.
        kv_away_ms, kv_back_ms, weights_away_ms, weights_back_ms: by the engine's log.
        read_ms: as many bytes, from the page cache into fresh memory, in this process.
    """

    kv_bytes: int
    weight_bytes: int
    freed_bytes: int
    kv_away_ms: float
    kv_back_ms: float
    weights_away_ms: float
    weights_back_ms: float
    read_ms: float


def measure(
    server: Server, model: str, vocabulary: Vocabulary, folder: Path, num_sleeps: int
) -> tuple[list[Sleep], Sent]:
    """Put a server to sleep under load, with its requests kept, and let them end afterwards.

    Args:
        server: with sleep mode.
        model: the name that it serves.
        vocabulary: what prompts are made of.
        folder: where its weights lie meanwhile.
        num_sleeps: how many times.
    """
    sent: list[Sent] = []
    sendings = requests(vocabulary, num_sleeps)

    def load() -> None:
        sent.append(send(server.url, model, sendings, window_s=1.0))

    loading = threading.Thread(target=load, name="xllm-bench-load", daemon=True)
    loading.start()
    sleeps: list[Sleep] = []
    steps = 0
    for _ in range(num_sleeps):
        sleep, steps = one_sleep(server, folder, steps + STEPS_BEFORE_SLEEP)
        sleeps.append(sleep)
    loading.join(GIVE_UP_S)
    if not sent:
        raise NotNowError("the requests that slept were not answered; see the server's log")
    return sleeps, sent[0]


def requests(vocabulary: Vocabulary, num_sleeps: int) -> tuple[Sending, ...]:
    """The load: all at once."""
    lengths = Lengths(PROMPT_TOKENS, TOKENS_PER_SLEEP * num_sleeps)
    wanted = synthesise((lengths,), vocabulary, count=NUM_REQUESTS, seed="sleep")
    return evenly(wanted, give_up_s=GIVE_UP_S)


def one_sleep(server: Server, folder: Path, at_step: int) -> tuple[Sleep, int]:
    """Wait until all requests decode, sleep at level 1, wake the weights and then the KV cache.

    Returns:
        What it took, and the number of the step before.
    """
    with server.client(GIVE_UP_S) as client:
        loaded = wait_for_load(client, at_step)
        memory, pid = memory_of(loaded), loaded.engine.pid
        before = resident(pid).all_bytes
        client.post("/sleep", params={"level": 1, "mode": "keep"}).raise_for_status()
        freed_bytes = before - resident(pid).all_bytes
        for tag in ("weights", "kv_cache"):
            client.post("/wake_up", params={"tags": tag}).raise_for_status()
    weight_bytes, kv_away_ms, weights_away_ms, kv_back_ms, weights_back_ms = told(
        server.log_path.read_text(errors="replace")
    )
    sleep = Sleep(
        kv_bytes=memory.kept_bytes,
        weight_bytes=weight_bytes,
        freed_bytes=freed_bytes,
        kv_away_ms=kv_away_ms,
        kv_back_ms=kv_back_ms,
        weights_away_ms=weights_away_ms,
        weights_back_ms=weights_back_ms,
        read_ms=page_cache_read_ms(folder, weight_bytes),
    )
    return sleep, loaded.load.num_steps


def wait_for_load(client: httpx.Client, at_step: int) -> Snapshot:
    """The engine once no prompt is left to compute, at that step or later.

    Raises:
        NotNowError: that does not come about.
    """
    deadline_s = time.monotonic() + LOAD_TIMEOUT_S
    while time.monotonic() < deadline_s:
        seen = snapshot_of(client)
        load = seen.load
        # Decoding alone, a step has a token for each request.
        is_decoding = load.num_running == load.num_scheduled_tokens == NUM_REQUESTS
        if is_decoding and load.num_steps >= at_step:
            return seen
        time.sleep(LOOK_S)
    raise NotNowError(
        f"the server does not decode {NUM_REQUESTS} requests at once: {seen.load}; is something "
        "else using it?"
    )


def told(log: str) -> tuple[int, float, float, float, float]:
    """What a log says of the last sleep.

    Returns:
        Bytes of the weights; milliseconds of KV cache and weights away, KV cache and weights back.

    Raises:
        NotNowError: there is none.
    """
    asleep, awake = _ASLEEP.findall(log), _AWAKE.findall(log)
    if not asleep or len(awake) < 2 * len(asleep):
        raise NotNowError("the server's log tells of no sleep and two wakings after it")
    kv_away, mib, weights_away = map(float, asleep[-1])
    (weights_back, _), (_, kv_back) = awake[-2:]
    return round(mib * 2**20), kv_away, weights_away, float(kv_back), float(weights_back)


def page_cache_read_ms(folder: Path, num_bytes: int) -> float:
    """Milliseconds to read so many bytes of a file that was just written, into fresh memory."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        chunk = memoryview(bytes(CHUNK_BYTES))
        left = num_bytes
        while left:
            left -= file.write(chunk[: min(left, CHUNK_BYTES)])
        file.seek(0)
        target = memoryview(memory)
        started_s = time.perf_counter()
        while target:
            target = target[file.readinto(target) :]
        return (time.perf_counter() - started_s) * 1e3


def figures(sleeps: Sequence[Sleep]) -> list[Row]:
    """One line for each thing that takes time."""
    table = "Sleep and waking at level 1, requests kept"
    kv_mib = [sleep.kv_bytes / 2**20 for sleep in sleeps]
    weights_mib = [sleep.weight_bytes / 2**20 for sleep in sleeps]
    lines = (
        ("KV cache away", kv_mib, [s.kv_away_ms for s in sleeps]),
        ("KV cache back", kv_mib, [s.kv_back_ms for s in sleeps]),
        ("weights away, into a file", weights_mib, [s.weights_away_ms for s in sleeps]),
        ("weights back", weights_mib, [s.weights_back_ms for s in sleeps]),
        ("as much, read from the page cache", weights_mib, [s.read_ms for s in sleeps]),
    )
    return [
        Row(
            table=table,
            labels={"what": what},
            figures=(
                Figure.of("size", "MiB", size),
                Figure.of("time", "ms", times),
                Figure.of(
                    "time a GiB", "ms", [1024 * t / s for t, s in zip(times, size, strict=True)]
                ),
            ),
        )
        for what, size, times in lines
    ]


def checks(sleeps: Sequence[Sleep], sent: Sent) -> list[Check]:
    """Fast enough, memory is given back, and every request that slept is answered."""
    kv_ms = Figure.of("", "", [s.kv_away_ms + s.kv_back_ms for s in sleeps]).median
    times = Figure.of("", "", [s.weights_back_ms / s.read_ms for s in sleeps]).median
    freed = min(s.freed_bytes / (s.kv_bytes + s.weight_bytes) for s in sleeps)
    return [
        Check(
            name=f"KV cache away and back: at most {KV_MS:g} ms together",
            passed=kv_ms <= KV_MS,
            detail=f"{kv_ms:.0f} ms, by the median",
        ),
        Check(
            name=f"weights back: at most {TIMES_A_READ:g} times a read from the page cache",
            passed=times <= TIMES_A_READ,
            detail=f"{times:.2f} times, by the median",
        ),
        Check(
            name="asleep the memory is with the system",
            passed=freed >= FREED_AT_LEAST,
            detail=f"{freed:.0%} of KV cache and weights, at least",
        ),
        whole_check(sent.outcomes, "every request that was kept asleep is"),
    ]
