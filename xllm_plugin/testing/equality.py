"""What "the same output" means, decided in one place for every test and benchmark.

Two engines that compute the same thing need not print the same text.  A bf16 matrix product sums in
an order that depends on the shape of the batch, so stock vLLM at another batch size differs from
itself; repeated at the same batch size it does not.  Comparing texts would therefore fail good
engines, and comparing "about the same" would pass bad ones.  There are three judgements; use the
strictest that the circumstances allow.

`check_bit_equal` -- same batch composition, threads and chunks.
    Tokens identical, and every log-probability (of the chosen token and of the candidates) the same
    floating-point number, bit for bit.  No tolerance.

`check_token_equal` -- another composition, a dense model in float32.
    Tokens identical.  Log-probabilities are reported and not judged.

`check_near_ties` -- another composition, in bf16, or MoE (which has no float32 on CPU).
    Tokens may differ where rounding decides.  The yardstick is a `Spread`: how far stock is from
    itself at another batch size, by `measure` on the same prompts.  Take the batch sizes that occur
    in the run to judge; if one sequence may run alone, take one (see `DRIFT_FACTOR`).  Four rules:

    1. *Near-tie.*  At the first differing token of a sequence, the margin (how much more likely the
       reference held its own token than the other one, in nats of its own log-probabilities) is at
       most what rounding was seen to move in the yardstick: the larger of its largest margin and
       `max_gap_shift`, its largest change of the gap between the two best candidates at one
       position of the same text.  The second is there because a yardstick of few flips knows its
       largest margin badly: stock SmolLM2 at 64 against 16 sequences a batch has one flip, an exact
       tie, and at 64 against 4 three, up to 0.125.  Gap shifts are seen at every position.  A token
       outside the reference's candidates has no margin, and is never a near-tie.
    2. *No more frequent.*  First differences per token compared, against those of the yardstick,
       by the exact one-sided test for two Poisson rates: it fails below `MIN_P_VALUE`.
    3. *No drift.*  The mean absolute change of log-probability over the common text is at most
       `DRIFT_FACTOR` times that of the yardstick.  An engine that is wrong by a little flips few
       tokens, but shifts all of them; this rule sees it with some thousand samples.  It does not
       apply to a yardstick without any change: there, rule 1 allows exact ties only.
    4. *Same length.*  A sequence that merely ends earlier has no tie to explain it, and a prompt
       missing on one side is a difference.

Only the first difference of a sequence counts.  Behind it the two sides continue different texts,
so their tokens and numbers are answers to different questions; ten differing tokens after a flip
are no more evidence than one.  Tokens compared are those up to and including it.

The file imports neither torch nor vLLM; `xllm_plugin.testing.collect` makes the completions.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from xllm_plugin.errors import MisuseError

__all__ = [
    "DRIFT_FACTOR",
    "MIN_P_VALUE",
    "Completion",
    "Difference",
    "Kind",
    "Report",
    "Spread",
    "Verdict",
    "check_bit_equal",
    "check_near_ties",
    "check_token_equal",
    "measure",
    "read_completions",
]

MIN_P_VALUE = 0.001
"""Flips this improbable under stock's own rate are too many.  One false alarm in 1000 runs; with
equal text on both sides, 10 flips against none, or 37 against 14, are the fewest that fail."""

DRIFT_FACTOR = 3.0
"""Mean changes between stock runs of SmolLM2 in bf16 on CPU: 0.0027 nats at 64 against 16 sequences
a batch, 0.0047 at 64 against 4, 0.0060 at 16 against 4: 2.2 times between one yardstick and the
next.  At 64 against 1 it is 0.049, since one sequence alone runs other kernels."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated sequence, as an engine reported it.

    `logprobs[i]` is the log-probability (nats) of `token_ids[i]`; `candidates[i]` the likeliest
    tokens there, the chosen one among them.  Raises `MisuseError` when the lengths differ or a
    chosen token is not among its candidates.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    candidates: tuple[Mapping[int, float], ...]

    def __post_init__(self) -> None:
        lengths = (len(self.token_ids), len(self.logprobs), len(self.candidates))
        if len(set(lengths)) != 1:
            raise MisuseError(
                f"completion {self.prompt_id!r} has {lengths[0]} tokens, {lengths[1]} log-probs "
                f"and {lengths[2]} candidate sets; give one of each per token"
            )
        for position, token in enumerate(self.token_ids):
            if token not in self.candidates[position]:
                raise MisuseError(
                    f"completion {self.prompt_id!r}: token {token} at position {position} is not "
                    "among its candidates; collect with logprobs >= 1"
                )

    def to_dict(self) -> dict[str, Any]:
        """A form for JSON; `from_dict` reads it back without loss."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Completion:
        """The inverse of `to_dict`, also after JSON has made the candidates' keys strings."""
        return cls(
            prompt_id=str(data["prompt_id"]),
            token_ids=tuple(data["token_ids"]),
            logprobs=tuple(data["logprobs"]),
            candidates=tuple({int(k): v for k, v in c.items()} for c in data["candidates"]),
        )


class Kind(StrEnum):
    """What was found at the first difference of a sequence."""

    NEAR_TIE = "near-tie"
    TOKEN = "token"  # noqa: S105 - a language model's token
    LOG_PROB = "log-prob"
    LENGTH = "length"
    MISSING = "missing"


class Verdict(StrEnum):
    """What a report concludes; only `DIFFERENT` is a failure."""

    BIT_EQUAL = "bit-equal"
    TOKEN_EQUAL = "token-equal"  # noqa: S105 - a language model's token
    NEAR_TIES = "near-ties"
    DIFFERENT = "different"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where two completions of one prompt part.

    Tokens are None where a side has none.  `margin` (nats, never negative) is the gap between the
    two tokens under the reference's own log-probs; None when it did not list both.
    """

    prompt_id: str
    position: int
    reference_token: int | None
    other_token: int | None
    margin: float | None
    kind: Kind

    def __str__(self) -> str:
        if self.kind is Kind.MISSING:
            return f"{self.prompt_id}: only one side has a completion"
        margin = "not among the candidates" if self.margin is None else f"margin {self.margin:.4g}"
        return (
            f"{self.prompt_id} at {self.position}: {self.reference_token} -> {self.other_token} "
            f"({margin}; {self.kind})"
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """How far two sets of completions are apart, without a judgement.

    Everything counts over the common text: positions up to and including the first differing token,
    where both sides still continue the same prefix.

    `max_margin` is over first differing tokens that have one; `max_gap_shift` is the largest change
    of the gap between the reference's two best candidates; the log-prob differences are those of
    candidates that both sides list.  All in nats.
    """

    num_prompts: int
    num_tokens: int
    num_differing: int
    max_margin: float
    max_gap_shift: float
    max_abs_logprob_difference: float
    mean_abs_logprob_difference: float


@dataclass(frozen=True, slots=True)
class Report:
    """A judgement: what was compared, what differed, and what follows."""

    verdict: Verdict
    spread: Spread
    differences: tuple[Difference, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def equal(self) -> bool:
        """Whether the two sides are equal in the sense of the check that was made."""
        return self.verdict is not Verdict.DIFFERENT

    @property
    def num_unexplained(self) -> int:
        """Differences that are no near-tie."""
        return sum(difference.kind is not Kind.NEAR_TIE for difference in self.differences)

    def summary(self) -> str:
        """A few lines for a person: counts, verdict, problems, the first ten differences."""
        s = self.spread
        head = (
            f"{self.verdict}: {s.num_prompts} prompts, {s.num_tokens} tokens compared, "
            f"{s.num_differing} sequences differ, {self.num_unexplained} unexplained, "
            f"max |log-prob difference| {s.max_abs_logprob_difference:.4g}"
        )
        lines = [head, *(f"  problem: {problem}" for problem in self.problems)]
        lines += [f"  {difference}" for difference in self.differences[:10]]
        if len(self.differences) > 10:  # noqa: PLR2004 - as the docstring says
            lines.append(f"  ... and {len(self.differences) - 10} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "num_unexplained": self.num_unexplained}


def read_completions(path: Path) -> tuple[Completion, ...]:
    """The completions in a file of `xllm_plugin.testing.collect`."""
    return tuple(Completion.from_dict(c) for c in json.loads(path.read_text())["completions"])


def check_bit_equal(reference: Sequence[Completion], other: Sequence[Completion]) -> Report:
    """Same tokens and bit-identical log-probs.  Both sides must have run the same batches."""
    differences = []
    for prompt_id, a, b in _pairs(reference, other):
        if a is None or b is None:
            differences.append(_missing(prompt_id))
        elif (position := _first_unlike(a, b)) is not None:
            differences.append(_difference(a, b, position))
    return _report(Verdict.BIT_EQUAL, measure(reference, other), differences)


def check_token_equal(reference: Sequence[Completion], other: Sequence[Completion]) -> Report:
    """Same tokens.  For dense models in float32, whatever the batches."""
    differences = _token_differences(reference, other)
    return _report(Verdict.TOKEN_EQUAL, measure(reference, other), differences)


def check_near_ties(
    reference: Sequence[Completion], other: Sequence[Completion], self_noise: Spread
) -> Report:
    """Any differing token is a near-tie, and they are as rare as between two stock runs.

    Args:
        reference: stock vLLM's completions.
        other: those to judge, of the same prompts.
        self_noise: `measure(stock, stock at another batch size)` over the same prompts.
    """
    limit = _max((self_noise.max_margin, self_noise.max_gap_shift))
    if any(math.isnan(value) for value in (limit, self_noise.mean_abs_logprob_difference)):
        raise MisuseError(
            "the yardstick is not a number: a stock run has NaN log-probs; give one that works"
        )
    spread = measure(reference, other)
    differences = [_explain(d, limit) for d in _token_differences(reference, other)]
    problems = []
    if any(d.kind is not Kind.NEAR_TIE for d in differences):
        problems.append(f"a differing token is no near-tie: margin above {limit:.4g} or unknown")
    p_value = _rate_p_value(spread, self_noise)
    if not p_value >= MIN_P_VALUE:
        problems.append(
            f"{spread.num_differing} first differences in {spread.num_tokens} tokens are too many "
            f"(p = {p_value:.2g}): stock against itself has {self_noise.num_differing} in "
            f"{self_noise.num_tokens}"
        )
    noise, drift = self_noise.mean_abs_logprob_difference, spread.mean_abs_logprob_difference
    if noise > 0 and not drift <= DRIFT_FACTOR * noise:
        problems.append(
            f"log-probs drift by {drift:.4g} on average, stock against itself by {noise:.4g}"
        )
    return _report(Verdict.NEAR_TIES, spread, differences, problems)


def measure(reference: Sequence[Completion], other: Sequence[Completion]) -> Spread:
    """How far the two are apart.  Prompts on one side only count as differing."""
    num_prompts = num_tokens = num_differing = 0
    margins, shifts, changes = [0.0], [0.0], [0.0]
    for _, a, b in _pairs(reference, other):
        num_prompts += 1
        if a is None or b is None:
            num_differing += 1
            continue
        position = _first_other_token(a, b)
        num_differing += position is not None
        end = min(len(a.token_ids), len(b.token_ids))
        if position is not None:
            end = min(end, position + 1)
            margins.append(_margin(a, b, position) or 0.0)
        num_tokens += end
        for x, y in zip(a.candidates[:end], b.candidates[:end], strict=True):
            shifts.append(_gap_shift(x, y))
            changes.extend(abs(_minus(y[token], x[token])) for token in x.keys() & y.keys())
    return Spread(
        num_prompts=num_prompts,
        num_tokens=num_tokens,
        num_differing=num_differing,
        max_margin=_max(margins),
        max_gap_shift=_max(shifts),
        max_abs_logprob_difference=_max(changes),
        mean_abs_logprob_difference=math.fsum(changes) / max(1, len(changes) - 1),
    )


def _pairs(
    reference: Sequence[Completion], other: Sequence[Completion]
) -> Iterator[tuple[str, Completion | None, Completion | None]]:
    """Match by prompt.  Raises `MisuseError` for no completions at all, and for doubles."""
    a, b = _by_prompt(reference), _by_prompt(other)
    if not a and not b:
        raise MisuseError("no completions on either side: an empty comparison would always pass")
    for prompt_id in dict.fromkeys((*a, *b)):
        yield prompt_id, a.get(prompt_id), b.get(prompt_id)


def _by_prompt(completions: Iterable[Completion]) -> dict[str, Completion]:
    found: dict[str, Completion] = {}
    for completion in completions:
        if completion.prompt_id in found:
            raise MisuseError(
                f"prompt {completion.prompt_id!r} has two completions on one side; "
                "give every sequence its own id"
            )
        found[completion.prompt_id] = completion
    return found


def _first_other_token(a: Completion, b: Completion) -> int | None:
    """The first position whose tokens differ; the shorter length if only that does."""
    for position, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if x != y:
            return position
    shorter = min(len(a.token_ids), len(b.token_ids))
    return None if len(a.token_ids) == len(b.token_ids) else shorter


def _first_unlike(a: Completion, b: Completion) -> int | None:
    """The first position where anything differs, down to the last bit of a log-prob."""
    end = min(len(a.token_ids), len(b.token_ids))
    for position in range(end):
        if _bits(a, position) != _bits(b, position):
            return position
    return _first_other_token(a, b)


def _bits(completion: Completion, position: int) -> tuple[object, ...]:
    candidates = completion.candidates[position]
    return (
        completion.token_ids[position],
        struct.pack("<d", completion.logprobs[position]),
        {token: struct.pack("<d", logprob) for token, logprob in candidates.items()},
    )


def _token_differences(
    reference: Sequence[Completion], other: Sequence[Completion]
) -> list[Difference]:
    differences = []
    for prompt_id, a, b in _pairs(reference, other):
        if a is None or b is None:
            differences.append(_missing(prompt_id))
        elif (position := _first_other_token(a, b)) is not None:
            differences.append(_difference(a, b, position))
    return differences


def _missing(prompt_id: str) -> Difference:
    return Difference(prompt_id, 0, None, None, None, Kind.MISSING)


def _difference(a: Completion, b: Completion, position: int) -> Difference:
    x, y = (c.token_ids[position] if position < len(c.token_ids) else None for c in (a, b))
    kind = Kind.LENGTH if x is None or y is None else Kind.LOG_PROB if x == y else Kind.TOKEN
    return Difference(a.prompt_id, position, x, y, _margin(a, b, position), kind)


def _explain(difference: Difference, limit: float) -> Difference:
    if difference.kind is not Kind.TOKEN or difference.margin is None:
        return difference
    if not difference.margin <= limit:  # also when it is not a number
        return difference
    return Difference(
        difference.prompt_id,
        difference.position,
        difference.reference_token,
        difference.other_token,
        difference.margin,
        Kind.NEAR_TIE,
    )


def _margin(a: Completion, b: Completion, position: int) -> float | None:
    """Gap between both sides' tokens under `a`, or None where it does not list both."""
    if position >= min(len(a.token_ids), len(b.token_ids)):
        return None
    scores, token = a.candidates[position], b.token_ids[position]
    if token not in scores:
        return None
    return abs(_minus(scores[a.token_ids[position]], scores[token]))


def _gap_shift(x: Mapping[int, float], y: Mapping[int, float]) -> float:
    """Change of the gap between the best two of `x`; 0 where `y` does not list both."""
    if len(x) < 2:  # noqa: PLR2004 - a gap needs two
        return 0.0
    first, second = sorted(x, key=lambda token: (-x[token], token))[:2]
    if first not in y or second not in y:
        return 0.0
    return abs(_minus(_minus(x[first], x[second]), _minus(y[first], y[second])))


def _minus(a: float, b: float) -> float:
    """`a - b`, where equal infinities (a token that a grammar forbids) are no difference."""
    return 0.0 if a == b else a - b


def _max(values: Iterable[float]) -> float:
    """The largest; NaN if any is, so that no comparison with it passes."""
    values = list(values)
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _rate_p_value(spread: Spread, noise: Spread) -> float:
    """Probability of at least so many differences as in `spread`, were its rate that of `noise`.

    Given their total, differences of two Poisson processes with one rate fall on either side in
    proportion to the tokens (Przyborowski and Wilenski, 1940): a binomial tail.
    """
    total = spread.num_differing + noise.num_differing
    tokens = spread.num_tokens + noise.num_tokens
    if total == 0 or tokens == 0:
        return 1.0
    share = spread.num_tokens / tokens
    tail = math.fsum(
        math.comb(total, k) * share**k * (1 - share) ** (total - k)
        for k in range(spread.num_differing, total + 1)
    )
    return min(1.0, tail)


def _report(
    goal: Verdict,
    spread: Spread,
    differences: Sequence[Difference],
    problems: Sequence[str] = (),
) -> Report:
    """`goal` if nothing speaks against it.  Equal tokens make near-ties token-equal."""
    if goal is not Verdict.NEAR_TIES and differences:
        problems = [f"{len(differences)} of {spread.num_prompts} prompts differ"]
    if problems:
        goal = Verdict.DIFFERENT
    elif goal is Verdict.NEAR_TIES and not differences:
        goal = Verdict.TOKEN_EQUAL
    return Report(goal, spread, tuple(differences), tuple(problems))
