"""When requests arrive: seeded open-loop arrivals with bursts.

Arrivals do not wait for answers, and they come in bursts: a Poisson process whose rate is higher
for a while in every cycle (a Markov-modulated one with the states' lengths fixed)::

    rate   ____            ____
          |    |          |    |
    ______|    |__________|    |____      time
    |<----- cycle ---->|

The number of arrivals is fixed and not drawn, and so are the bursts' length and share: the seed of
a short trial then says where things fall, and not how much there is to do.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from xllm_plugin.errors import ConfigError

__all__ = ["Bursts"]


@dataclass(frozen=True, slots=True)
class Bursts:
    """One burst in every cycle, at a seeded moment of it.

    Attributes:
        cycle_s: length of a cycle; a duration is cut into whole cycles of about this length.
        length_s: length of the burst in it.
        factor: the rate in a burst over the rate outside.

    Raises `ConfigError` when the burst does not fit into the cycle, or is none.
    """

    cycle_s: float = 8.0
    length_s: float = 2.0
    factor: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.length_s < self.cycle_s or self.factor < 1:
            raise ConfigError(
                f"bursts of {self.length_s:g} s in every {self.cycle_s:g} s with {self.factor:g} "
                "times the rate: a burst has to be shorter than its cycle and the factor at least 1"
            )

    def __str__(self) -> str:
        return f"{self.factor:g} times the rate for {self.length_s:g} s of every {self.cycle_s:g} s"

    def windows(self, duration_s: float, seed: int | str) -> tuple[tuple[float, float], ...]:
        """Begin and end of every burst, in seconds from the start, in order."""
        rng = random.Random(f"xllm-bench:bursts:{seed}")  # noqa: S311 - arrivals, not secrets
        cycles = max(1, round(duration_s / self.cycle_s))
        scale = duration_s / cycles / self.cycle_s
        length_s = self.length_s * scale
        begins = [
            (index + rng.uniform(0, 1 - self.length_s / self.cycle_s)) * duration_s / cycles
            for index in range(cycles)
        ]
        return tuple((begin, begin + length_s) for begin in begins)

    def arrivals(
        self, requests_per_s: float, duration_s: float, seed: int | str
    ) -> tuple[float, ...]:
        """Arrival times in [0, duration_s), not in order: `round(requests_per_s * duration_s)`.

        A higher rate adds arrivals behind those of a lower one and moves none.  So two rates of one
        seed are the same traffic, thinner and denser, and the n-th request may keep its lengths.
        """
        rng = random.Random(f"xllm-bench:arrivals:{seed}")  # noqa: S311 - arrivals, not secrets
        windows = self.windows(duration_s, seed)
        calm_s = self.cycle_s - self.length_s
        in_burst = self.factor * self.length_s / (self.factor * self.length_s + calm_s)
        times = []
        for _ in range(round(requests_per_s * duration_s)):
            cycle, is_burst, where = (
                rng.randrange(len(windows)),
                rng.random() < in_burst,
                rng.random(),
            )
            begin, end = windows[cycle]
            if is_burst:
                times.append(begin + where * (end - begin))
            else:
                length_s = duration_s / len(windows)
                at = cycle * length_s + where * (length_s - (end - begin))
                times.append(at if at < begin else at + end - begin)
        return tuple(times)
