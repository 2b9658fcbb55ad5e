"""Trials: one side at one rate with one seed; and everything that a run of them holds open.

A side that is not told the promise is measured once for all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from xllm_plugin.bench import outputs
from xllm_plugin.bench.commands import log_folder
from xllm_plugin.bench.curve import percentile
from xllm_plugin.bench.fleet import Fleet
from xllm_plugin.bench.open_loop import Backlog, BacklogTally, send
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.promises import Attainment, Outcome, Promise, Verdict
from xllm_plugin.bench.replay import served_model
from xllm_plugin.bench.schedulers import Side, Told
from xllm_plugin.bench.schema import Check
from xllm_plugin.bench.traffic import Traffic
from xllm_plugin.testing.equality import Completion, Spread

__all__ = [
    "OUTPUTS_NOTE",
    "Deadline",
    "Key",
    "Stage",
    "Trial",
    "finished_check",
    "left_out",
    "open_stage",
]

OUTPUTS_NOTE = (
    f"Outputs compared before a side is timed: {outputs.NUM_OUTPUT_PROMPTS} prompts of "
    f"{outputs.OUTPUT_PROMPT_TOKENS} random tokens, {outputs.OUTPUT_TOKENS} greedy tokens each, "
    "sent all at once, so that the scheduler decides the batches, against the reference's answers "
    "one at a time. A difference has to be a near-tie, no larger and no more frequent than the "
    "reference's from itself."
)

WARM_UP_REQUESTS = 6
MAX_WAITING_CPU = 0.01
"""Servers that wait may take this part of a core, all together: they are paused."""


@dataclass(frozen=True, slots=True)
class Key:
    """What makes a trial: the same key is measured once.

    `told` is the promise that the side was told, or None; `backlog` the offline requests at once.
    """

    side: str
    requests_per_s: float
    repeat: int
    told: Promise | None
    backlog: int = 0


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial gave."""

    key: Key
    outcomes: tuple[Outcome, ...]
    backlog: BacklogTally
    window_s: float
    duration_s: float
    client_cpu_s: float
    waiting_cpu: float
    """Part of a core that the waiting servers used, all together."""

    def attainment(self, promise: Promise) -> Attainment:
        """Judge all requests."""
        return Attainment.of(self.outcomes, promise)

    @property
    def offline_output_tok_s(self) -> float:
        """Offline output tokens per second of the window of arrivals."""
        return self.backlog.output_tokens / self.window_s

    @property
    def offline_tok_s(self) -> float:
        """The same with the prompts of those that got their first token in the window."""
        return (self.backlog.output_tokens + self.backlog.prompt_tokens) / self.window_s

    @property
    def lateness_ms(self) -> float:
        """How late the client sent, 99th percentile."""
        late = [(o.sent_s - o.due_s) * 1e3 for o in self.outcomes if o.sent_s is not None]
        return percentile(late or [0.0], 99)

    def summary(self, promises: Sequence[Promise]) -> dict[str, Any]:
        """A record for the result's details."""
        first = [o.ttft_ms for o in self.outcomes if o.ttft_ms is not None]
        pace = [o.tpot_ms for o in self.outcomes if o.tpot_ms is not None]
        judged = {str(promise): self.attainment(promise) for promise in promises}
        return {
            "side": self.key.side,
            "requests_per_s": self.key.requests_per_s,
            "repeat": self.key.repeat,
            "told": None if self.key.told is None else str(self.key.told),
            "backlog": self.key.backlog,
            "requests": len(self.outcomes),
            "verdicts": {
                name: dict(sorted(found.counts.items())) for name, found in judged.items()
            },
            "ttft_ms": {f"p{p}": round(percentile(first, p), 1) for p in (50, 90, 99) if first},
            "tpot_ms": {f"p{p}": round(percentile(pace, p), 1) for p in (50, 90, 99) if pace},
            "offline": {
                "output_tokens": self.backlog.output_tokens,
                "prompt_tokens": self.backlog.prompt_tokens,
                "finished": self.backlog.finished,
                "refused": self.backlog.refused,
                "failed": self.backlog.failed,
            },
            "duration_s": round(self.duration_s, 2),
            "client_cpu_s": round(self.client_cpu_s, 3),
            "client_late_p99_ms": round(self.lateness_ms, 1),
            "waiting_cpu": round(self.waiting_cpu, 4),
        }


class Deadline:
    """How long a run may still begin new trials."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + limit_s

    @property
    def is_over(self) -> bool:
        """Whether no more trial begins."""
        return self._clock() >= self._end_s


@dataclass(slots=True)
class Stage:
    """Servers, client and what has been measured so far.

    Attributes:
        promises: what is judged; a trial's requests may be ended once they have broken those that
            the trial is for.
        reference: the side that outputs are compared with; it is prepared first.
    """

    traffic: Traffic
    promises: tuple[Promise, ...]
    fleet: Fleet
    reporter: Reporter
    deadline: Deadline
    reference: Side
    trials: dict[Key, Trial] = field(default_factory=dict)
    output_checks: dict[str, Check] = field(default_factory=dict)
    _models: dict[str, str] = field(default_factory=dict)
    _reference: tuple[tuple[Completion, ...], Spread] | None = None

    def key(
        self, side: Side, requests_per_s: float, repeat: int, promise: Promise, backlog: int = 0
    ) -> Key:
        """Under which a trial is kept; the promise counts where the side is told it."""
        told = promise if side.told is Told.PROMISE else None
        return Key(side.name, requests_per_s, repeat, told, backlog)

    def measure(
        self, side: Side, requests_per_s: float, repeat: int, promise: Promise, backlog: int = 0
    ) -> Trial:
        """Run a trial, or return the one that was run before."""
        key = self.key(side, requests_per_s, repeat, promise, backlog)
        if key not in self.trials:
            self.prepare(side)
            self.trials[key] = trial = self._run(side, key, promise)
            self.reporter.line(_told(trial, promise))
        return self.trials[key]

    def prepare(self, side: Side) -> None:
        """Start the side's server if it does not run, warm it up, and check its outputs once."""
        if self.fleet.is_started(side.name):
            return
        server = self.fleet.server(side.server)
        self._models[side.name] = model = served_model(server.url)
        self.reporter.doing("warming up")
        warm_up = self.traffic.at_once(side, self.promises[0], WARM_UP_REQUESTS)
        send(server.url, model, warm_up, window_s=0.0, check_alive=server.check_alive)
        if side.name not in self.output_checks:
            self.reporter.doing("collecting outputs to compare")
            self.output_checks[side.name] = self._check_outputs(side, server.url, model)

    def waiting(self) -> list[float]:
        """The part of a core that waiting servers used, of every trial."""
        return [trial.waiting_cpu for trial in self.trials.values()]

    def checks(self) -> list[Check]:
        """Outputs equal; nothing failed that was not refused; servers that waited did nothing."""
        trials = list(self.trials.values())
        failed = [
            outcome
            for trial in trials
            for outcome in trial.outcomes
            if Attainment.of([outcome], self.promises[0]).counts[Verdict.FAILED]
        ]
        errors = [outcome.error for outcome in failed] + [t.backlog.first_error for t in trials]
        total = sum(len(trial.outcomes) for trial in trials)
        num_failed = len(failed) + sum(trial.backlog.failed for trial in trials)
        waiting = self.waiting() or [0.0]
        return [
            *self.output_checks.values(),
            Check(
                name="no request failed (refused and ended ones are violations, not failures)",
                passed=num_failed == 0,
                detail=f"{total} requests in {len(trials)} trials, {num_failed} failed"
                + next((f": {error}" for error in errors if error), ""),
            ),
            Check(
                name=f"waiting servers used at most {MAX_WAITING_CPU:.0%} of a core, all together",
                passed=max(waiting) <= MAX_WAITING_CPU,
                detail=f"most {max(waiting):.2%}",
            ),
        ]

    def _run(self, side: Side, key: Key, promise: Promise) -> Trial:
        server = self.fleet.server(side.server)
        judged = (promise,) if side.told is Told.PROMISE else self.promises
        salt = f"{key.requests_per_s}:{key.told}:{key.backlog}"
        sendings = self.traffic.sendings(side, key.requests_per_s, key.repeat, judged, salt=salt)
        backlog = None
        if key.backlog:
            backlog = Backlog(
                self.traffic.offline(side, promise, f"{key.repeat}:{salt}"), key.backlog
            )
        self.reporter.doing(f"{key.requests_per_s:g} req/s" + f" + {key.backlog}" * bool(backlog))
        began_s, waiting_s = time.monotonic(), self.fleet.waiting_cpu_s(side.name)
        sent = send(
            server.url,
            self._models[side.name],
            sendings,
            window_s=self.traffic.window_s,
            backlog=backlog,
            check_alive=server.check_alive,
        )
        waiting_s = self.fleet.waiting_cpu_s(side.name) - waiting_s
        return Trial(
            key=key,
            outcomes=sent.outcomes,
            backlog=sent.backlog,
            window_s=self.traffic.window_s,
            duration_s=sent.duration_s,
            client_cpu_s=sent.client_cpu_s,
            waiting_cpu=waiting_s / (time.monotonic() - began_s),
        )

    def _check_outputs(self, side: Side, url: str, model: str) -> Check:
        """All prompts at once, so that the scheduler decides the batches, against one at a time."""
        prompts = outputs.prompts(self.traffic.vocabulary, seed=self.traffic.seed)
        if self._reference is None:
            assert side is self.reference, "the reference is to be prepared first"
            alone = outputs.collect(url, model, prompts)
            together = outputs.collect(url, model, prompts, at_once=len(prompts))
            self._reference = alone, outputs.self_noise(alone, together)
        alone, noise = self._reference
        together = outputs.collect(url, model, prompts, at_once=len(prompts))
        return outputs.compare(side.name, self.reference.name, alone, together, noise)


def _told(trial: Trial, promise: Promise) -> str:
    key = trial.key
    text = f"{key.requests_per_s:g} req/s"
    if key.backlog:
        text += f" + {key.backlog} offline at once ({trial.offline_output_tok_s:.0f} tok/s)"
    return f"{text}: {trial.attainment(promise)}, {trial.duration_s:.0f} s"


@contextlib.contextmanager
def open_stage(
    traffic: Traffic,
    promises: tuple[Promise, ...],
    reference: Side,
    console: Console,
    *,
    steps: int,
    limit_s: float,
    keep_logs: Path | None,
) -> Iterator[Stage]:
    """A stage whose servers are stopped at the end of the block.

    Args:
        traffic: what is sent.
        promises: what is judged.
        reference: the side that outputs are compared with.
        console: shows progress.
        steps: length of the progress bar.
        limit_s: after that no trial begins.
        keep_logs: folder for the servers' logs; a temporary one by default.
    """
    with (
        log_folder(keep_logs) as logs,
        Reporter(console, steps, first="starting") as reporter,
        Fleet(logs, reporter.waiting) as fleet,
    ):
        yield Stage(traffic, promises, fleet, reporter, Deadline(limit_s), reference)


def finished_check(skipped: Sequence[tuple[str, int]], what: str) -> Check:
    """Whether there was time for every first search.

    Args:
        skipped: what was not searched to its end, and in which repeat.
        what: names all that is searched, for people.
    """
    missing = [name for name, repeat in skipped if repeat == 0]
    return Check(
        name=f"every {what} was searched at least once",
        passed=not missing,
        detail="no time for " + ", ".join(missing) if missing else "",
    )


def left_out(skipped: Sequence[tuple[str, int]]) -> Iterator[str]:
    """The note that names what was not searched to its end, if anything was."""
    names = [f"{name}, repeat {repeat + 1}" for name, repeat in skipped]
    if names:
        yield f"Left out for lack of time: {'; '.join(names)}."
