"""Search for the highest rung at which a goal is met: bounded bisection over a geometric ladder.

Every measurement costs half a minute, so the search takes few, and all sides climb one ladder: what
they are compared at is then the same rate.  Pure: the caller measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xllm_plugin.errors import ConfigError

__all__ = ["Crossing", "Ladder"]


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where the goal stops being met.

    `value` is 0 if it is not met at the lowest rung (`is_met` False), and a measured rung if it was
    never seen broken (`is_limit` False): the true value is then at least this.
    """

    value: float
    is_met: bool
    is_limit: bool


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs from `lowest` up, each `ratio` times the one below."""

    lowest: float
    ratio: float
    rungs: int

    def __post_init__(self) -> None:
        if not (self.lowest > 0 and self.ratio > 1 and self.rungs > 0):
            raise ConfigError(
                f"a ladder of {self.rungs} rungs from {self.lowest:g} with ratio {self.ratio:g}: "
                "it needs a rung, to begin above 0, and a ratio above 1"
            )

    @classmethod
    def between(cls, lowest: float, highest: float, ratio: float) -> Ladder:
        """Rungs from `lowest` to `highest` or just below it."""
        if not 0 < lowest <= highest or ratio <= 1:
            raise ConfigError(
                f"rates from {lowest:g} to {highest:g} with ratio {ratio:g}: give 0 < lowest <= "
                "highest and a ratio above 1"
            )
        return cls(lowest, ratio, 1 + math.floor(math.log(highest / lowest, ratio) + 1e-9))

    def value(self, rung: int) -> float:
        """What a rung stands for, to three significant digits."""
        return float(f"{self.lowest * self.ratio**rung:.3g}")

    def nearest(self, value: float) -> int:
        """The rung nearest to `value` on a logarithmic scale."""
        steps = round(math.log(max(value, 1e-12) / self.lowest, self.ratio))
        return min(max(steps, 0), self.rungs - 1)

    def next_rung(
        self, measured: Mapping[int, float], *, goal: float, start: int, most: int
    ) -> int | None:
        """Which rung to measure next, or None when the search is over.

        Begins at `start`, goes up or down in growing steps until it has a rung that meets the goal
        and one that does not, and halves what is between them.  Ends when the two are neighbours,
        when the ladder ends, or after `most` measurements.

        Args:
            measured: what was found at which rung; it meets the goal if it is at least `goal`.
            goal: see there.
            start: where to begin, a rung.
            most: how many rungs may be measured in all.
        """
        if len(measured) >= most:
            return None
        if not measured:
            return min(max(start, 0), self.rungs - 1)
        kept, broken = _bracket(measured, goal)
        rungs = sorted(measured)
        if broken is None:
            step = 2 * (rungs[-1] - rungs[-2]) if len(rungs) > 1 else 1
            return None if rungs[-1] == self.rungs - 1 else min(rungs[-1] + step, self.rungs - 1)
        if kept is None:
            step = 2 * (rungs[1] - rungs[0]) if len(rungs) > 1 else 1
            return None if rungs[0] == 0 else max(rungs[0] - step, 0)
        return None if broken - kept <= 1 else (kept + broken) // 2

    def search(
        self,
        measure: Callable[[int], float | None],
        *,
        goal: float,
        start: int,
        most: int,
        known: Mapping[int, float] | None = None,
    ) -> dict[int, float] | None:
        """Measure rungs as `next_rung` says, on top of what is `known`, and return all there is.

        None as soon as `measure` gives None: the search was not finished.
        """
        found = dict(known or {})
        most += len(found)
        while (rung := self.next_rung(found, goal=goal, start=start, most=most)) is not None:
            value = measure(rung)
            if value is None:
                return None
            found[rung] = value
        return found

    def crossing(self, measured: Mapping[int, float], goal: float) -> Crossing:
        """The value at which `goal` is crossed, interpolated on a logarithmic scale.

        Between the lowest rung that breaks the goal and the next lower one that was measured.  That
        one meets it; a rung that meets it again further up is luck, and does not count.
        """
        if not measured:
            raise ConfigError("no rung was measured: there is no crossing to find")
        kept, broken = _bracket(measured, goal)
        if kept is None:
            return Crossing(0.0, is_met=False, is_limit=True)
        if broken is None:
            return Crossing(self.value(kept), is_met=True, is_limit=False)
        share = (measured[kept] - goal) / (measured[kept] - measured[broken])
        low, high = math.log(self.value(kept)), math.log(self.value(broken))
        return Crossing(math.exp(low + (high - low) * share), is_met=True, is_limit=True)


def _bracket(measured: Mapping[int, float], goal: float) -> tuple[int | None, int | None]:
    """The highest rung that meets the goal below the lowest that breaks it, and that one."""
    broken = min((rung for rung, found in measured.items() if found < goal), default=None)
    kept = max((rung for rung in measured if broken is None or rung < broken), default=None)
    return kept, broken
