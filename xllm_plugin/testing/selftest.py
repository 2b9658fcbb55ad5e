"""What `xllm selftest` asks of a device family: checks with a number for each.

A family that has one names it `SELFTEST` in the module ``testkit`` beside its platform: a function
without arguments that yields a `Check` as soon as it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Check", "SelfTest"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried on the device.

    Attributes:
        name: of the operator or part.
        what: the case, such as its shapes.
        error: how far the result is from the expected one, relative to 1 + its size; None where
            there is no result.
        tolerance: the largest error that passes.
        time_us: of one call on the device; None where none was timed.
        problem: what went wrong instead, empty where nothing did.
    """

    name: str
    what: str
    error: float | None = None
    tolerance: float = 0.0
    time_us: float | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the device did what it should; an error that is not a number did not."""
        return not self.problem and self.error is not None and self.error <= self.tolerance


SelfTest = Callable[[], Iterator[Check]]
