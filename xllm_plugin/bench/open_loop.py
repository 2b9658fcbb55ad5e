"""Send requests when they are due, whatever has become of those before, and note what comes back.

Beside them a backlog of work that nobody waits for may be kept full.  vLLM's own benchmark client
cannot give each request its own fields, nor end those that have no chance left, which is what
bounds a trial at a rate that the server does not sustain.

Definitions are in `xllm_plugin.bench.promises`.  The client runs in the benchmark's process, on the
server's cores; its CPU time is part of what it reports.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from xllm_plugin.bench.promises import REFUSALS, Outcome
from xllm_plugin.bench.traces import Request
from xllm_plugin.errors import NotNowError

__all__ = ["Backlog", "BacklogTally", "Sending", "Sent", "evenly", "send"]

HEADERS = {"Content-Type": "application/json"}
ALIVE_EVERY_S = 0.5
RETRY_AFTER_S = 0.2
SETTLED_S, SETTLE_ATTEMPTS, SETTLE_TIMEOUT_S = 0.5, 40, 60.0


@dataclass(frozen=True, slots=True)
class Sending:
    """One request, ready to go.

    Attributes:
        due_s: seconds after the start of the trial.
        trace: where its lengths come from.
        prompt: token ids.
        output_tokens: how many to generate.
        give_up_s: seconds after the start from which on no promise can be kept.  It is ended then,
            or at the end of the window of arrivals if that is later.
        extra: further fields of the body, e.g. `priority` or `vllm_xargs`.
    """

    due_s: float
    trace: str
    prompt: tuple[int, ...]
    output_tokens: int
    give_up_s: float
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> bytes:
        """The JSON of a streamed greedy completion of exactly that many tokens."""
        fields = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            # A chunk may hold several tokens: each says how many there are so far.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **self.extra,
        }
        return json.dumps(fields).encode()


def evenly(
    requests: Sequence[Request], *, give_up_s: float, over_s: float = 0.0
) -> tuple[Sending, ...]:
    """Requests with equal pauses between them, all within `over_s`; by default all at once."""
    return tuple(
        Sending(over_s * at / len(requests), "", one.prompt, one.output_tokens, give_up_s)
        for at, one in enumerate(requests)
    )


@dataclass(frozen=True, slots=True)
class Backlog:
    """Work that nobody waits for: `at_once` requests are always at the server.

    Attributes:
        request: the n-th request; its times do not count.
        at_once: how many are kept in flight.
        lead_s: how long before the first arrival it begins.
    """

    request: Callable[[int], Sending]
    at_once: int
    lead_s: float = 3.0


@dataclass(slots=True)
class BacklogTally:
    """What the backlog got within the window of arrivals."""

    output_tokens: int = 0
    prompt_tokens: int = 0
    """Of requests whose first token came in the window."""
    finished: int = 0
    refused: int = 0
    failed: int = 0
    first_error: str = ""


@dataclass(frozen=True, slots=True)
class Sent:
    """What a trial gave: an outcome for each sending, in their order."""

    outcomes: tuple[Outcome, ...]
    backlog: BacklogTally
    duration_s: float
    client_cpu_s: float


def send(
    url: str,
    model: str,
    sendings: Sequence[Sending],
    *,
    window_s: float,
    backlog: Backlog | None = None,
    check_alive: Callable[[], None] = lambda: None,
) -> Sent:
    """Send all at their times and wait until each is answered or without a chance.

    When it returns the server is idle again.

    Args:
        url: without `/v1`.
        model: the name that the server serves.
        sendings: in any order.
        window_s: arrivals fall into [0, window_s); nothing is ended before that.
        backlog: kept full until the last of `sendings` has ended.
        check_alive: called twice a second; what it raises ends the trial.

    Raises:
        NotNowError: the server does not become idle afterwards.
    """
    return asyncio.run(_Trial(url, model, window_s, check_alive).run(sendings, backlog))


class _Trial:
    """One run of `send`."""

    def __init__(
        self, url: str, model: str, window_s: float, check_alive: Callable[[], None]
    ) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        self._window_s = window_s
        self._check_alive = check_alive
        self._tally = BacklogTally()
        self._start_s = 0.0

    async def run(self, sendings: Sequence[Sending], backlog: Backlog | None) -> Sent:
        bodies = [one.body(self._model) for one in sendings]  # before the clock starts
        cpu_before_s = time.process_time()
        # A connection a request: one that the server closes while idle would fail a request.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            lead_s = backlog.lead_s if backlog is not None else 0.0
            self._start_s = asyncio.get_running_loop().time() + lead_s
            online = asyncio.gather(
                *(self._one(session, *pair) for pair in zip(sendings, bodies, strict=True))
            )
            others = [asyncio.create_task(self._watch())]
            others += self._backlog_workers(session, backlog)
            outcomes = await _first(online, others)
            duration_s = self._now_s()
            cpu_s = time.process_time() - cpu_before_s
            await self._settle(session)
        return Sent(tuple(outcomes), self._tally, duration_s, cpu_s)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time() - self._start_s

    async def _watch(self) -> None:
        while True:
            self._check_alive()
            await asyncio.sleep(ALIVE_EVERY_S)

    async def _one(self, session: aiohttp.ClientSession, sending: Sending, body: bytes) -> Outcome:
        answer = _Answer()
        sent_s, was_cut = None, False
        await asyncio.sleep(sending.due_s - self._now_s())
        try:
            async with asyncio.timeout(max(self._window_s, sending.give_up_s) - self._now_s()):
                sent_s = self._now_s()
                await self._stream(session, body, answer)
        except TimeoutError:
            was_cut = True
        return Outcome(
            trace=sending.trace,
            due_s=sending.due_s,
            prompt_tokens=len(sending.prompt),
            output_tokens=sending.output_tokens,
            sent_s=sent_s,
            first_s=answer.first_s,
            last_s=answer.last_s,
            received_tokens=answer.tokens,
            status=answer.status,
            was_cut=was_cut,
            error=answer.error,
        )

    def _backlog_workers(
        self, session: aiohttp.ClientSession, backlog: Backlog | None
    ) -> list[asyncio.Task[None]]:
        if backlog is None:
            return []
        numbers = itertools.count()
        return [
            asyncio.create_task(self._keep_busy(session, backlog, numbers))
            for _ in range(backlog.at_once)
        ]

    async def _keep_busy(
        self, session: aiohttp.ClientSession, backlog: Backlog, numbers: itertools.count[int]
    ) -> None:
        """Send the backlog's next request whenever the last is answered, until cancelled."""
        while True:
            sending = backlog.request(next(numbers))
            answer = _Answer(on_tokens=self._counter(len(sending.prompt)))
            await self._stream(session, sending.body(self._model), answer)
            tally = self._tally
            if answer.status in REFUSALS:
                tally.refused += 1
            elif answer.error:
                tally.failed += 1
                tally.first_error = tally.first_error or answer.error
            elif 0 <= self._now_s() <= self._window_s:
                tally.finished += 1
            if answer.error:
                await asyncio.sleep(RETRY_AFTER_S)

    def _counter(self, prompt_tokens: int) -> Callable[[int, bool], None]:
        def count(new_tokens: int, is_first: bool) -> None:
            if 0 <= self._now_s() <= self._window_s:
                self._tally.output_tokens += new_tokens
                self._tally.prompt_tokens += prompt_tokens * is_first

        return count

    async def _stream(self, session: aiohttp.ClientSession, body: bytes, answer: _Answer) -> None:
        """Fill `answer` while the stream comes; what goes wrong is written there."""
        try:
            async with session.post(self._url, data=body, headers=HEADERS) as response:
                answer.status = response.status
                if response.status != 200:  # noqa: PLR2004 - OK
                    answer.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                    return
                async for line in response.content:
                    answer.take(line, self._now_s())
        except (aiohttp.ClientError, OSError) as error:
            answer.error = repr(error)
            return
        if not answer.is_done and not answer.error:
            answer.error = "the stream ended without [DONE]"

    async def _settle(self, session: aiohttp.ClientSession) -> None:
        """Wait until the server has let go of what was ended: a small request is answered soon."""
        probe = Sending(0.0, "", (1, 2, 3), 1, 0.0).body(self._model)
        for _ in range(SETTLE_ATTEMPTS):
            self._check_alive()
            began_s, answer = self._now_s(), _Answer()
            try:
                async with asyncio.timeout(SETTLE_TIMEOUT_S):
                    await self._stream(session, probe, answer)
            except TimeoutError:
                break
            if not answer.error and self._now_s() - began_s < SETTLED_S:
                return
            await asyncio.sleep(RETRY_AFTER_S)
        raise NotNowError(
            f"{self._url} does not become idle after a trial (last answer: "
            f"{answer.error or 'slow'}); is something else using the server or the machine?"
        )


@dataclass(slots=True)
class _Answer:
    """One stream, as far as it has come."""

    on_tokens: Callable[[int, bool], None] | None = None
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    status: int = 0
    error: str = ""
    is_done: bool = False

    def take(self, line: bytes, now_s: float) -> None:
        """Read one line of the event stream."""
        if not line.startswith(b"data: "):
            return
        if line.startswith(b"data: [DONE]"):
            self.is_done = True
            return
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            self.error = str(event["error"])[:300]
        elif event["choices"]:
            self._grow(int(event["usage"]["completion_tokens"]), now_s)

    def _grow(self, tokens: int, now_s: float) -> None:
        new, self.tokens = tokens - self.tokens, tokens
        if new <= 0:
            return
        is_first = self.first_s is None
        self.first_s = now_s if is_first else self.first_s
        self.last_s = now_s
        if self.on_tokens is not None:
            self.on_tokens(new, is_first)


async def _first(
    wanted: asyncio.Future[list[Outcome]], others: Sequence[asyncio.Task[None]]
) -> list[Outcome]:
    """The result of `wanted`; the others never end but by an error, which is raised."""
    everything: list[asyncio.Future[Any]] = [wanted, *others]
    try:
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            if other.done():
                other.result()
        return await wanted
    finally:
        for future in everything:
            future.cancel()
        await asyncio.gather(*everything, return_exceptions=True)
