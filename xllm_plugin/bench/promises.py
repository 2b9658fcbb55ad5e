"""Whether a request's promise was kept.

A promise is two bounds: time to first token (TTFT, from the moment the request was due, so that a
late client or a refused connection hides nothing), and the mean time per output token after the
first (TPOT).  Attainment is the share of *all* requests that keep both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from xllm_plugin.bench.schema import Check
from xllm_plugin.errors import ConfigError

__all__ = [
    "Attainment",
    "Outcome",
    "Promise",
    "Verdict",
    "judge",
    "parse_promises",
    "whole_check",
]

REFUSALS = frozenset({429, 503})


@dataclass(frozen=True, slots=True)
class Promise:
    """Bounds on time to first token and on mean time per output token, both in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        return f"{self.ttft_ms:g}/{self.tpot_ms:g}"

    def latest_end_s(self, output_tokens: int) -> float:
        """Seconds after arrival from which on a request that is not finished has broken it."""
        return (self.ttft_ms + self.tpot_ms * (output_tokens - 1)) / 1e3


class Outcome(BaseModel):
    """What became of one request.  Times are seconds from the start of the trial.

    Attributes:
        trace: where its lengths come from.
        due_s: when it was to be sent.
        prompt_tokens: length of its prompt.
        output_tokens: how many tokens it asked for.
        sent_s: when it was sent; None if it never was.
        first_s: when its first token came; None if none did.
        last_s: when its last token so far came.
        received_tokens: how many tokens came.
        status: HTTP status; 0 without an answer.
        was_cut: ended by the client, after no promise could be kept any more.
        error: what went wrong, if something did.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trace: str
    due_s: float
    prompt_tokens: int
    output_tokens: int
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    received_tokens: int = 0
    status: int = 0
    was_cut: bool = False
    error: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it was answered with as many tokens as it asked for."""
        return not self.error and self.received_tokens == self.output_tokens

    @property
    def ttft_ms(self) -> float | None:
        """From due to the first token; None without one."""
        return None if self.first_s is None else (self.first_s - self.due_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean over the tokens after the first; 0 with one token, None without any."""
        if self.first_s is None or self.last_s is None:
            return None
        return (self.last_s - self.first_s) * 1e3 / max(1, self.received_tokens - 1)


def whole_check(outcomes: Sequence[Outcome], what: str = "every request is") -> Check:
    """Whether all were answered with all their tokens."""
    num_whole = sum(outcome.is_whole for outcome in outcomes)
    return Check(
        name=f"{what} answered with all its tokens",
        passed=num_whole == len(outcomes),
        detail=f"{num_whole} of {len(outcomes)}",
    )


class Verdict(StrEnum):
    """How a request fared; only `MET` is no violation."""

    MET = "met"
    LATE = "late"
    """Its first token came too late, whatever its TPOT."""
    SLOW = "slow"
    """Its first token came in time, the others too slowly."""
    REFUSED = "refused"
    """The server said 429 or 503."""
    FAILED = "failed"
    """Any other error, or another number of tokens than asked for."""
    CUT = "cut"
    """Ended by the client because nothing could be kept any more."""


def judge(outcome: Outcome, promise: Promise) -> Verdict:
    """Judge one request by one promise; bounds are inclusive."""
    if outcome.status in REFUSALS:
        return Verdict.REFUSED
    if outcome.was_cut:
        return Verdict.CUT
    ttft_ms, tpot_ms = outcome.ttft_ms, outcome.tpot_ms
    if not outcome.is_whole or ttft_ms is None or tpot_ms is None:
        return Verdict.FAILED
    if ttft_ms > promise.ttft_ms:
        return Verdict.LATE
    return Verdict.SLOW if tpot_ms > promise.tpot_ms else Verdict.MET


@dataclass(frozen=True, slots=True)
class Attainment:
    """How many of all requests kept a promise, and why the others did not."""

    counts: Counter[Verdict]

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], promise: Promise) -> Attainment:
        """Count.  Raises `ConfigError` when there is nothing to count."""
        counts = Counter(judge(outcome, promise) for outcome in outcomes)
        if not counts:
            raise ConfigError(
                "a trial without requests attains nothing; raise the rate or --seconds"
            )
        return cls(counts)

    @property
    def total(self) -> int:
        """All requests, refused and failed ones too."""
        return self.counts.total()

    @property
    def share(self) -> float:
        """Part of the requests that kept the promise, 0 to 1."""
        return self.counts[Verdict.MET] / self.total

    @property
    def violations(self) -> float:
        """The other part."""
        return 1 - self.share

    def __str__(self) -> str:
        why = [f"{n} {v}" for v, n in sorted(self.counts.items()) if v is not Verdict.MET]
        return f"{self.share:.0%} of {self.total}" + (f" ({', '.join(why)})" if why else "")


def parse_promises(text: str) -> tuple[Promise, ...]:
    """Read `1000/50,500/35`: TTFT and TPOT in milliseconds.  Raises `ConfigError` otherwise."""
    promises = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            ttft_ms, tpot_ms = (float(number) for number in part.split("/"))
        except ValueError as error:
            raise ConfigError(
                f"promise {part!r}: write TTFT/TPOT in milliseconds, e.g. 1000/50"
            ) from error
        if not (0 < ttft_ms < float("inf") and 0 < tpot_ms < float("inf")):
            raise ConfigError(f"promise {part!r}: both bounds have to be above 0 milliseconds")
        promises.append(Promise(ttft_ms, tpot_ms))
    if not promises:
        raise ConfigError(f"promises {text!r}: give at least one, e.g. 1000/50")
    return tuple(dict.fromkeys(promises))
