"""How fast an instance is, fitted online from what was measured: two straight lines and a factor.

* Time to first token over the prompt tokens that have to be computed before it: the request's own
  and those of requests in front of it.
* Time per output token over the requests that run.

The lines are the fleet's; an instance has one factor for each, so a new one is neither shunned nor
flooded.  Lines of its own were tried: fitted to some fifty noisy times their slope is now and then
near 0, the queue there seems to cost nothing, and everybody is sent to it (benchmarks/fleet).  All
forget: an instance that was slow an hour ago is not slow now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

__all__ = ["Line", "Pace", "Paces", "Speed", "SpeedMeter"]

_FORGETTING: Final = 0.98
"""An observation of an instance weighs half after 34 more."""
_FLEET_FORGETTING: Final = 0.998
"""One of the fleet after 346 more."""
_PRIOR_WEIGHT: Final = 2.0
_TTFT_PRIOR_WEIGHT: Final = 10.0
_TPOT_PRIOR_WEIGHT: Final = 30.0
"""So many measurements like the fleet's are assumed of each instance.  What was computed meanwhile
bears on a time more than the device does: weights of 2 and 10 cost a fifth of TTFT's p90 in the
simulated fleet of equals."""
_HALF_LIFE_S: Final = 60.0
_MIN_TTFT_SPREAD_TOKENS: Final = 256.0
_MIN_TPOT_SPREAD: Final = 2.0


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicts an instance's times; all in seconds."""

    ttft_base_s: float = 0.02
    prefill_s_per_token: float = 1e-4
    tpot_base_s: float = 0.02
    tpot_s_per_request: float = 5e-4


@dataclass(slots=True)
class Line:
    """Least squares with forgetting of y = base + slope * x, neither negative.

    Args:
        spread: a typical distance of x; a prior weighs as observations that far apart.
        forgetting: weight of an observation when the next has come.
    """

    spread: float
    forgetting: float = _FLEET_FORGETTING
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take one measurement."""
        self.weight = self.forgetting * self.weight + 1.0
        self.x = self.forgetting * self.x + x
        self.y = self.forgetting * self.y + y
        self.xx = self.forgetting * self.xx + x * x
        self.xy = self.forgetting * self.xy + x * y

    def fit(self, base: float, slope: float) -> tuple[float, float]:
        """Base and slope, given what they are believed to be."""
        far = self.spread
        weight, x, y = self.weight, self.x, self.y
        xx, xy = self.xx, self.xy
        for prior_x in (0.0, far):
            prior_y = base + slope * prior_x
            weight += _PRIOR_WEIGHT / 2
            x += _PRIOR_WEIGHT / 2 * prior_x
            y += _PRIOR_WEIGHT / 2 * prior_y
            xx += _PRIOR_WEIGHT / 2 * prior_x * prior_x
            xy += _PRIOR_WEIGHT / 2 * prior_x * prior_y
        fitted = (weight * xy - x * y) / (weight * xx - x * x)
        if fitted < 0:
            return y / weight, 0.0
        start = (y - fitted * x) / weight
        if start < 0:
            return 0.0, xy / xx
        return start, fitted


@dataclass(slots=True)
class SpeedMeter:
    """Measurements of all instances together, and the speed that follows from them."""

    ttft: Line = field(default_factory=lambda: Line(_MIN_TTFT_SPREAD_TOKENS))
    tpot: Line = field(default_factory=lambda: Line(_MIN_TPOT_SPREAD))

    def observe_ttft(self, num_tokens: float, seconds: float) -> None:
        """A request got its first token after so many prompt tokens were computed."""
        self.ttft.observe(num_tokens, seconds)

    def observe_tpot(self, num_running: int, seconds: float) -> None:
        """So long a time lay between two tokens while so many requests ran."""
        self.tpot.observe(max(1, num_running), seconds)

    def speed(self, prior: Speed) -> Speed:
        """The speed of now, beginning from `prior`."""
        ttft = self.ttft.fit(prior.ttft_base_s, prior.prefill_s_per_token)
        tpot = self.tpot.fit(prior.tpot_base_s, prior.tpot_s_per_request)
        return Speed(*ttft, *tpot)


@dataclass(slots=True)
class Pace:
    """How many times as long as the fleet's line says an instance takes: sums that forget.

    They fade with time too: who was slow once gets nothing, is not measured and would stay slow.
    """

    prior_weight: float
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take one measurement."""
        self.weight = _FORGETTING * self.weight + 1.0
        self.x = _FORGETTING * self.x + x
        self.y = _FORGETTING * self.y + y

    def factor(self, base: float, slope: float) -> float:
        """What was measured over what the line gives for it; near 1 while little is known."""
        predicted = base * self.weight + slope * self.x
        if predicted <= 0:
            return 1.0
        prior = self.prior_weight * predicted / self.weight
        return (self.y + prior) / (predicted + prior)


@dataclass(slots=True)
class Paces:
    """Of one instance: both factors."""

    ttft: Pace = field(default_factory=lambda: Pace(_TTFT_PRIOR_WEIGHT))
    tpot: Pace = field(default_factory=lambda: Pace(_TPOT_PRIOR_WEIGHT))

    def fade(self, seconds: float) -> None:
        """So long a time has passed."""
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        for pace in (self.ttft, self.tpot):
            pace.weight *= kept
            pace.x *= kept
            pace.y *= kept

    def speed(self, prior: Speed) -> Speed:
        """The speed of now, where `prior` is the fleet's for its capacity."""
        ttft = self.ttft.factor(prior.ttft_base_s, prior.prefill_s_per_token)
        tpot = self.tpot.factor(prior.tpot_base_s, prior.tpot_s_per_request)
        return Speed(
            prior.ttft_base_s * ttft,
            prior.prefill_s_per_token * ttft,
            prior.tpot_base_s * tpot,
            prior.tpot_s_per_request * tpot,
        )
