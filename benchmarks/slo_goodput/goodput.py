"""The order of things: who is searched when, from where, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from xllm_plugin.bench.ladder import Crossing, Ladder
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import Side
from xllm_plugin.bench.schema import Figure
from xllm_plugin.bench.trials import Stage, Trial

CHUNKED = "fcfs-"


@dataclass(frozen=True, slots=True)
class Found:
    """What one search gave; `crossing` is in requests a second."""

    side: str
    promise: Promise
    repeat: int
    crossing: Crossing


@dataclass(slots=True)
class Search:
    """All searches of a run.

    Attributes:
        stage: measures.
        ladder: of rates.
        sides: in their order.
        promises: the first is the headline.
        repeats: searches of a side and promise, each with traffic of its own seed.
        goal: share of requests that has to keep the promise.
        most: trials that one search may take.
        start_rate: where the first search begins, requests a second.
        found: what came out.
        skipped: side, promise and repeat that there was no time to search to its end.
    """

    stage: Stage
    ladder: Ladder
    sides: Sequence[Side]
    promises: Sequence[Promise]
    repeats: int
    goal: float
    most: int
    start_rate: float
    found: list[Found] = field(default_factory=list)
    skipped: list[tuple[str, int]] = field(default_factory=list)

    def run(self) -> None:
        """Search everything, or as much as there is time for.

        Stock vLLM first, one server at a time, once: it is there for the distance, and starts
        slowly.  Then the sides of one engine, all started, promise by promise and repeat by repeat,
        each time beginning with another one.
        """
        engine = self.stage.reference.engine
        self.stage.reporter.peer(self.stage.reference.name, 0, self.repeats)
        self.stage.prepare(self.stage.reference)
        for side in self.sides:
            if side.engine != engine:
                for promise in self.promises:
                    self._search(side, promise, 0)
                self.stage.fleet.stop(side.name)
        sides = [side for side in self.sides if side.engine == engine]
        for repeat, promise in self._turns():
            first = repeat % len(sides)
            for side in sides[first:] + sides[:first]:
                if repeat == 0 or self._is_contender(side, promise):
                    self._search(side, promise, repeat)
            if repeat == 0 and promise == self.promises[-1]:
                self._stop_losers(sides)

    def crossings(self, side: str, promise: Promise) -> dict[int, Crossing]:
        """What was found for a side and promise, by repeat."""
        return {
            one.repeat: one.crossing
            for one in self.found
            if one.side == side and one.promise == promise
        }

    def goodput(self, side: str, promise: Promise) -> list[float]:
        """Requests a second, for each repeat."""
        return [crossing.value for crossing in self.crossings(side, promise).values()]

    def best_static(self, promise: Promise) -> str | None:
        """Of the contenders that differ in their scheduler alone, the best; None without any."""
        engine = self.stage.reference.engine
        medians = {
            side.name: Figure.of("", "", values).median
            for side in self.sides
            if side.engine == engine and not side.is_slo and self._is_contender(side, promise)
            if (values := self.goodput(side.name, promise))
        }
        return max(medians, key=lambda name: medians[name]) if medians else None

    def trials(self, side: Side, promise: Promise) -> list[Trial]:
        """All trials that say something about a side and promise."""
        return [
            trial
            for key, trial in self.stage.trials.items()
            if key == self.stage.key(side, key.requests_per_s, key.repeat, promise)
        ]

    def details(self) -> dict[str, Any]:
        """For the result: every trial, and what later benchmarks start from."""
        return {
            "goodput_req_s": {
                str(promise): {s.name: self.goodput(s.name, promise) for s in self.sides}
                for promise in self.promises
            },
            "best_static": {str(promise): self.best_static(promise) for promise in self.promises},
            "ready_s": self.stage.fleet.ready_s,
            "trials": [trial.summary(self.promises) for trial in self.stage.trials.values()],
        }

    def _turns(self) -> Iterator[tuple[int, Promise]]:
        """Every promise once, then the headline's repeats, then the others'."""
        headline, *others = self.promises
        later = range(1, self.repeats)
        yield from ((0, promise) for promise in self.promises)
        yield from ((repeat, headline) for repeat in later)
        yield from ((repeat, promise) for repeat in later for promise in others)

    def _is_contender(self, side: Side, promise: Promise) -> bool:
        """Of the chunk sizes only the best is repeated."""
        return not side.name.startswith(CHUNKED) or side.name == self._best_chunk(promise)

    def _best_chunk(self, promise: Promise) -> str | None:
        """By the first repeat, which all of them have."""
        first = {
            one.side: one.crossing.value
            for one in self.found
            if one.promise == promise and one.repeat == 0 and one.side.startswith(CHUNKED)
        }
        return max(first, key=lambda name: first[name]) if first else None

    def _stop_losers(self, sides: Sequence[Side]) -> None:
        for side in sides:
            if not any(self._is_contender(side, promise) for promise in self.promises):
                self.stage.fleet.stop(side.name)

    def _search(self, side: Side, promise: Promise, repeat: int) -> None:
        self.stage.reporter.peer(f"{promise}, {side.name}", repeat, self.repeats)

        def measure(rung: int) -> float | None:
            if self.stage.deadline.is_over:
                return None
            trial = self.stage.measure(side, self.ladder.value(rung), repeat, promise)
            return trial.attainment(promise).share

        rungs = self.ladder.search(
            measure,
            goal=self.goal,
            start=self._start(side, promise),
            most=self.most,
            known=self._known(side, promise, repeat),
        )
        self.stage.reporter.done()
        if rungs is None:
            self.skipped.append((f"{side.name} at {promise}", repeat))
            return
        crossing = self.ladder.crossing(rungs, self.goal)
        self.found.append(Found(side.name, promise, repeat, crossing))
        self.stage.reporter.line(f"goodput {crossing.value:.2f} req/s")

    def _known(self, side: Side, promise: Promise, repeat: int) -> dict[int, float]:
        """Rungs that were measured for another promise and hold for this one too."""
        trials = [trial for trial in self.trials(side, promise) if trial.key.repeat == repeat]
        return {
            self.ladder.nearest(trial.key.requests_per_s): trial.attainment(promise).share
            for trial in trials
        }

    def _start(self, side: Side, promise: Promise) -> int:
        """Just below what this side reached before, else what the last one did."""
        before = self.goodput(side.name, promise)
        others = [one.crossing.value for one in self.found if one.promise == promise]
        guess = next((v for v in reversed(before or others) if v > 0), self.start_rate)
        rung = self.ladder.nearest(guess)
        return rung - 1 if self.ladder.value(rung) > guess and rung else rung
