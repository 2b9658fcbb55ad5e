"""How fast an instance is, fitted online from what was measured: two straight lines.

* Time to first token over the prompt tokens that have to be computed before it: the request's own
  and those of requests in front of it.
* Time per output token over the requests that run.

The lines forget (an instance that was slow an hour ago is not slow now) and begin as those of the
whole fleet, so that a new instance is neither shunned nor flooded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Line", "Speed", "SpeedMeter"]

_FORGETTING = 0.98
"""An observation weighs half after 34 more."""
_PRIOR_WEIGHT = 2.0
_MIN_TTFT_SPREAD_TOKENS = 256.0
_MIN_TPOT_SPREAD = 2.0


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
    """

    spread: float
    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def observe(self, x: float, y: float) -> None:
        """Take one measurement."""
        self.weight = _FORGETTING * self.weight + 1.0
        self.x = _FORGETTING * self.x + x
        self.y = _FORGETTING * self.y + y
        self.xx = _FORGETTING * self.xx + x * x
        self.xy = _FORGETTING * self.xy + x * y

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
    """Measurements of one instance, or of all together, and the speed that follows from them."""

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
