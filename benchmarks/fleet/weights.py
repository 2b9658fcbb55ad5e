"""What other weights of promises than those of `service/cost.py` would do, in the same code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xllm_plugin.bench.commands import names_in
from xllm_plugin.bench.fleet_simulator.promises import ShareSummary
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.errors import ConfigError
from xllm_plugin.service import cost

__all__ = ["NOTES", "Outcome", "Weights", "checks", "in_force", "parsed", "rows"]


@dataclass(frozen=True, slots=True)
class Weights:
    """Of a second, beside one of an online request that is in time."""

    offline: float
    late: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    shares: Mapping[str, ShareSummary]
    hit_share: float
    """Of prompt tokens, those found in a cache."""


Run = Callable[[Weights | None, int], Outcome]
"""A run with these weights, or told of no promise, and of this repeat."""


def parsed(text: str) -> tuple[Weights, ...]:
    """The pairs OFFLINE:LATE of an option.  Raises `ConfigError` for what is none."""
    found = []
    for name in names_in(text):
        offline, _, late = name.partition(":")
        try:
            pair = Weights(float(offline), float(late))
        except ValueError:
            pair = Weights(-1.0, -1.0)
        if not 0 <= pair.offline <= 1 or not 0 <= pair.late < float("inf"):
            raise ConfigError(
                f"--weights {text}: {name!r} is no pair OFFLINE:LATE, of a number from 0 to 1 and "
                "one from 0 on; write them as 0.2:0.25,0.2:0"
            )
        found.append(pair)
    if not found:
        raise ConfigError("--weights: give pairs OFFLINE:LATE, as 0.2:0.25,0.2:0")
    return tuple(found)


@contextlib.contextmanager
def in_force(weights: Weights) -> Iterator[None]:
    """Have the policy weigh so.  For one run at a time: these are the module's own."""
    before = cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT
    cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT = weights.offline, weights.late
    try:
        yield
    finally:
        cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT = before


def rows(
    title: str, run: Run, grid: Sequence[Weights], repeats: int, say: Callable[[str], None]
) -> list[Row]:
    """A table, a row for each of `grid` after one of requests that tell nothing."""
    found = []
    for weights in (None, *grid):
        outcomes = [run(weights, repeat) for repeat in range(repeats)]
        row = Row(table=title, labels=_labels(weights), figures=_figures(outcomes))
        found.append(row)
        kept = row.figure("interactive kept")
        assert kept is not None
        say(f"{title}, {weights or 'told of no promise'}: {kept.median:.1f} % kept")
    return found


def checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """Nothing is lost: a run raises if it is."""
    num_requests = sum(one.num_requests for run in outcomes for one in run.shares.values())
    return [
        Check(
            name="every request ended once, none was rejected",
            passed=True,
            detail=f"{num_requests} requests; a run that loses one raises",
        )
    ]


def _labels(weights: Weights | None) -> dict[str, str]:
    if weights is None:
        return {"offline second": "told of no promise", "late second": ""}
    is_ours = (weights.offline, weights.late) == (cost.OFFLINE_WEIGHT, cost.LATE_WEIGHT)
    late = f"{weights.late:g}" + (" (in force)" if is_ours else "")
    return {"offline second": f"{weights.offline:g}", "late second": late}


def _figures(outcomes: Sequence[Outcome]) -> tuple[Figure, ...]:
    def of(name: str, unit: str, value: Callable[[Outcome], float]) -> Figure:
        return Figure.of(name, unit, [round(value(one), 3) for one in outcomes])

    def kept(share: str) -> Callable[[Outcome], float]:
        return lambda one: 100 * one.shares[share].num_kept / one.shares[share].num_requests

    return (
        of("interactive kept", "%", kept("interactive")),
        of("relaxed kept", "%", kept("relaxed")),
        of("offline, mean to its end", "s", lambda one: one.shares["offline"].mean_s),
        of("prompt tokens cached", "%", lambda one: 100 * one.hit_share),
    )


NOTES = (
    (
        "The policy's own code, with other numbers in place of `OFFLINE_WEIGHT` and `LATE_WEIGHT` "
        "(xllm_plugin/service/cost.py). Cases, promises and draws are those of the table above."
    ),
    "Uneven: every second instance takes 1.8 times as long.",
)
