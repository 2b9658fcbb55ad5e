"""Replay requests at rising load against one server after another.

The order of things is what makes the figures comparable: one server at a time, all on the same
requests, interleaved over the repeats so that a slow hour of the machine hits everybody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from rich.console import Console

from xllm_plugin.bench import outputs
from xllm_plugin.bench.commands import log_folder
from xllm_plugin.bench.curve import AtBound, LoadPoint, at_bound
from xllm_plugin.bench.load import Load, LoadClient, LoadResult
from xllm_plugin.bench.peers import PeerServer
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Peer
from xllm_plugin.bench.servers import Waiting
from xllm_plugin.bench.traces import Lengths, Request, Vocabulary, synthesise
from xllm_plugin.errors import ConfigError
from xllm_plugin.testing.equality import Completion, Spread

__all__ = ["External", "Measured", "Plan", "Target", "answer_checks", "replay", "served_model"]

STOP_FACTOR = 1.5
"""A peer's curve ends after the first load this far beyond the bound: no more is asked of it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every peer."""

    loads: tuple[Load, ...]
    repeats: int
    requests_per_load: int | None
    is_quick: bool
    tpot_ms: float
    lengths: tuple[Lengths, ...]
    vocabulary: Vocabulary
    max_input: int
    max_output: int
    seed: int

    def num_requests(self, load: Load) -> int:
        """A few per client, so that all clients are busy most of the time, and some at least."""
        if self.requests_per_load is not None:
            return self.requests_per_load
        size = load.clients if load.clients is not None else round(20 * load.size)
        return 4 + size if self.is_quick else 6 + 2 * size

    def requests(self, load: Load) -> tuple[Request, ...]:
        """The same for every peer and repeat; other tokens, of the same lengths, for every load."""
        return self._synthesise(self.num_requests(load), str(load), self.max_input, self.max_output)

    def warm_up(self) -> tuple[Request, ...]:
        """Touches every code path once; not measured."""
        return self._synthesise(4, "warm-up", self.max_input, 16)

    def output_requests(self) -> tuple[Request, ...]:
        """Short prompts whose greedy outputs are compared between peers."""
        return outputs.prompts(self.vocabulary, seed=self.seed, max_input=self.max_input)

    def _synthesise(
        self, count: int, purpose: str, max_input: int, max_output: int
    ) -> tuple[Request, ...]:
        return synthesise(
            self.lengths,
            self.vocabulary,
            count=count,
            seed=f"{self.seed}:{purpose}",
            max_input=max_input,
            max_output=max_output,
        )


@dataclass(frozen=True, slots=True)
class External:
    """A server that runs already and is left running."""

    name: str
    url: str

    def record(self, model: str) -> Peer:
        """The peer as a result tells it."""
        return Peer(name=self.name, what=f"already running server, asked as {model}")


Target = PeerServer | External


@dataclass(slots=True)
class Measured:
    """What one peer gave, gathered over the repeats."""

    target: Target
    repeats: list[list[LoadResult]] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    outputs: tuple[Completion, ...] = ()
    noise: Spread | None = None

    @property
    def name(self) -> str:
        """The peer's name."""
        return self.target.name

    def points(self) -> list[LoadResult]:
        """All load points of all repeats."""
        return [point for repeat in self.repeats for point in repeat]

    def at(self, load: Load) -> list[LoadResult]:
        """The repeats of one load (fewer than others if the curve ended before it)."""
        return [point for point in self.points() if point.load == load]

    def at_bound(self, tpot_ms: float) -> list[AtBound]:
        """For each repeat, the best within the bound."""
        return [
            at_bound(
                [LoadPoint(p.load.size, p.output_tok_s, p.tpot_p90_ms, p.ttft_p90_ms) for p in one],
                tpot_ms,
            )
            for one in self.repeats
        ]


@dataclass(frozen=True, slots=True)
class Session:
    """What a run holds open."""

    plan: Plan
    client: LoadClient
    reporter: Reporter
    log_folder: Path

    def measure_all(self, targets: Sequence[Target]) -> list[Measured]:
        """Interleave the peers: every repeat runs each of them, beginning with another one."""
        measured = [Measured(target) for target in targets]
        for repeat in range(self.plan.repeats):
            turn = repeat % len(measured)
            for one in measured[turn:] + measured[:turn]:
                self.reporter.peer(one.name, repeat, self.plan.repeats)
                log = self.log_folder / f"{one.name}.{repeat + 1}.log"
                with running(one.target, log, self.reporter.waiting) as (url, ready_s, check_alive):
                    if ready_s is not None:
                        one.ready_s.append(ready_s)
                    self._measure_one(one, url, check_alive, is_reference=one is measured[0])
        return measured

    def _measure_one(
        self, one: Measured, url: str, check_alive: Callable[[], None], *, is_reference: bool
    ) -> None:
        model = served_model(url)
        self.reporter.doing("warming up")
        warm_up = Load(clients=4)
        self.client.measure(url, model, warm_up, self.plan.warm_up(), on_wait=check_alive)
        if not one.outputs:
            self._collect_outputs(one, url, model, is_reference=is_reference)
        self.reporter.done()
        one.repeats.append(points := [])
        for index, load in enumerate(self.plan.loads):
            self.reporter.doing(str(load))
            requests = self.plan.requests(load)
            points.append(
                self.client.measure(
                    url, model, load, requests, seed=self.plan.seed, on_wait=check_alive
                )
            )
            self.reporter.point(points[-1])
            self.reporter.done()
            if points[-1].tpot_p90_ms > STOP_FACTOR * self.plan.tpot_ms:
                self.reporter.done(len(self.plan.loads) - index - 1)
                break

    def _collect_outputs(self, one: Measured, url: str, model: str, *, is_reference: bool) -> None:
        self.reporter.doing("collecting outputs to compare")
        prompts = self.plan.output_requests()
        one.outputs = outputs.collect(url, model, prompts)
        if is_reference:
            together = outputs.collect(url, model, prompts, at_once=len(prompts))
            one.noise = outputs.self_noise(one.outputs, together)


@contextlib.contextmanager
def running(
    target: Target, log: Path, on_wait: Callable[[Waiting], None]
) -> Iterator[tuple[str, float | None, Callable[[], None]]]:
    """Yield URL, seconds until ready (None if it ran before) and a check that it is alive."""
    if isinstance(target, External):
        yield target.url, None, lambda: None
        return
    with target.server(log, on_wait=on_wait) as server:
        yield server.url, server.ready_after_s, server.check_alive


def served_model(url: str) -> str:
    """The name of the first model that the server offers."""
    try:
        answer = httpx.get(f"{url}/v1/models", trust_env=False, timeout=30).raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise ConfigError(
            f"{url}/v1/models lists no model ({error!r}); give the URL of an OpenAI-compatible "
            "server, without /v1"
        ) from error


def replay(
    plan: Plan, targets: Sequence[Target], console: Console, keep_logs: Path | None
) -> list[Measured]:
    """Run everything, with the client and one server at a time open.

    Args:
        plan: what is asked of each.
        targets: the first is the one that outputs are compared with.
        console: shows progress.
        keep_logs: folder for the logs; a temporary one by default.
    """
    total = plan.repeats * len(targets) * (1 + len(plan.loads))
    with (
        log_folder(keep_logs) as logs,
        Reporter(console, total) as reporter,
        LoadClient(logs / "client.log") as client,
    ):
        return Session(plan, client, reporter, logs).measure_all(targets)


def answer_checks(measured: Sequence[Measured]) -> list[Check]:
    """Every request answered in full; no outputs further from the first's than its own noise."""
    reference, *others = measured
    points = [point for one in measured for point in one.points()]
    failed, short = sum(p.failed for p in points), sum(p.short for p in points)
    error = next((f": {point.first_error}" for point in points if point.first_error), "")
    assert reference.noise is not None
    noise = reference.noise
    total = sum(point.requests for point in points)
    return [
        Check(
            name="every request was answered in full",
            passed=failed == short == 0,
            detail=f"{total} requests, {failed} failed, {short} short{error}",
        ),
        *(
            outputs.compare(other.name, reference.name, reference.outputs, other.outputs, noise)
            for other in others
        ),
    ]
