"""The order of things: which backlog is tried when, beside which online load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import Side
from xllm_plugin.bench.schema import Figure
from xllm_plugin.bench.trials import Stage, Trial

FIRST_BACKLOG = 4


@dataclass(frozen=True, slots=True)
class Found:
    """What one search gave.

    Attributes:
        side: its name.
        load_percent: of the goodput rate, sent as online requests.
        repeat: from 0.
        alone: the trial without offline work.
        best: the one with the largest backlog that keeps the bound; None if none does.
        is_limit: whether a larger backlog was seen to break it.
    """

    side: str
    load_percent: float
    repeat: int
    alone: Trial
    best: Trial | None
    is_limit: bool

    @property
    def offline_output_tok_s(self) -> float:
        """Offline output tokens a second; 0 if no offline work keeps the bound."""
        return 0.0 if self.best is None else self.best.offline_output_tok_s


@dataclass(slots=True)
class Search:
    """All searches of a run.

    Attributes:
        stage: measures.
        backlogs: ladder of offline requests at once.
        sides: in their order.
        loads_percent: of `goodput_rate`.
        goodput_rate: requests a second that stock's scheduler sustains.
        repeats: searches of a side and load, each with traffic of its own seed.
        max_violations: share of the online requests that may be violated.
        most: trials of one search beside the one without offline work.
        found: what came out.
        skipped: side, load and repeat that there was no time to search to its end.
    """

    stage: Stage
    backlogs: Ladder
    sides: Sequence[Side]
    loads_percent: Sequence[float]
    goodput_rate: float
    repeats: int
    max_violations: float
    most: int
    found: list[Found] = field(default_factory=list)
    skipped: list[tuple[str, int]] = field(default_factory=list)

    @property
    def promise(self) -> Promise:
        """The one that is judged."""
        return self.stage.promises[0]

    def run(self) -> None:
        """Search everything, sides interleaved, or as much as there is time for."""
        self.stage.reporter.peer(self.stage.reference.name, 0, self.repeats)
        self.stage.prepare(self.stage.reference)
        for repeat in range(self.repeats):
            first = repeat % len(self.sides)
            for load in self.loads_percent:
                for side in [*self.sides[first:], *self.sides[:first]]:
                    self._search(side, load, repeat)

    def rate(self, load_percent: float) -> float:
        """Online requests a second."""
        return float(f"{self.goodput_rate * load_percent / 100:.3g}")

    def of(self, side: Side, load_percent: float) -> dict[int, Found]:
        """What was found for a side and load, by repeat."""
        return {
            one.repeat: one
            for one in self.found
            if (one.side, one.load_percent) == (side.name, load_percent)
        }

    def best_static(self, load_percent: float) -> Side | None:
        """Of the sides without our scheduler, the one with most offline work."""
        found = {s.name: self.of(s, load_percent) for s in self.sides if not s.is_slo}
        medians = {
            name: Figure.of("", "", [one.offline_output_tok_s for one in ones.values()]).median
            for name, ones in found.items()
            if ones
        }
        best = max(medians, key=lambda name: medians[name]) if medians else None
        return next((side for side in self.sides if side.name == best), None)

    def _search(self, side: Side, load: float, repeat: int) -> None:
        stage, rate = self.stage, self.rate(load)
        stage.reporter.peer(f"{load:g} %, {side.name}", repeat, self.repeats)

        def measure(rung: int) -> float | None:
            if stage.deadline.is_over:
                return None
            backlog = round(self.backlogs.value(rung))
            trial = stage.measure(side, rate, repeat, self.promise, backlog)
            return trial.attainment(self.promise).share

        goal = 1 - self.max_violations
        rungs = None
        if not stage.deadline.is_over:
            alone = stage.measure(side, rate, repeat, self.promise)
            rungs = self.backlogs.search(
                measure, goal=goal, start=self._start(side, load), most=self.most
            )
        stage.reporter.done()
        if rungs is None:
            self.skipped.append((f"{side.name} at {load:g} %", repeat))
            return
        broken = [rung for rung, share in rungs.items() if share < goal]
        kept = [rung for rung in rungs if rung < min(broken, default=self.backlogs.rungs)]
        best = None
        if kept:
            backlog = round(self.backlogs.value(max(kept)))
            best = stage.measure(side, rate, repeat, self.promise, backlog)
        found = Found(side.name, load, repeat, alone, best, bool(broken))
        self.found.append(found)
        stage.reporter.line(f"offline {found.offline_output_tok_s:.0f} tok/s")

    def _start(self, side: Side, load: float) -> int:
        """Where this side ended before, else where the last one did."""
        before = list(self.of(side, load).values()) or self.found
        best = before[-1].best if before else None
        return self.backlogs.nearest(best.key.backlog if best else FIRST_BACKLOG)
