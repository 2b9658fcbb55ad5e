"""Tell apart, item by item, what two lm-eval runs of the same task answered.

An item (one question of a task) is

* *identical*: lm-eval got the same log-likelihoods down to the last bit, or the same text;
* *rounding*: the numbers differ as much as stock differs from itself, and the item's answer is the
  same;
* *near-tie*: the answer changed, where rounding decides;
* *unexplained*: anything else, and a failure.

The yardstick is `Noise`: stock against itself on the same items, at another batch size; where xllm
runs its own kernels, also compiled against eager, whichever is further.  With it,

1. no log-likelihood may move by more than `SLACK` times the largest move of the yardstick;
2. another choice may win only if the margin under stock is at most what the yardstick's largest
   move of both choices bridges (in the metric's units: divided by length for `acc_norm`);
3. another token may be the likeliest only where `xllm_plugin.testing.equality` finds a near-tie;
   this is what decides generated text and LAMBADA's greedy flag.

The same checker also judges the task as a whole: token flips must not be more frequent, and
log-probabilities not further off on average, than between two stock runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from xllm_plugin.errors import InternalError
from xllm_plugin.testing import equality
from xllm_plugin.testing.equality import Completion, Difference, Report, Spread

__all__ = ["SLACK", "Finding", "Item", "Kind", "Noise", "Outcome", "compare", "read_items"]

SLACK = 2.0
"""The largest of some hundred moves is exceeded by another sample's largest half of the time; twice
that size is not, unless something is wrong."""

Weights = tuple[float, ...]


class Kind(StrEnum):
    """What became of an item; only the last is a failure."""

    IDENTICAL = "identical"
    ROUNDING = "rounding"
    NEAR_TIE = "near-tie"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True)
class Item:
    """One question as one run answered it.

    `logliks` (nats) has one entry per choice and is empty for a generated `text`; `lengths` are the
    characters of the choices, by which lm-eval divides for `acc_norm`.
    """

    id: int
    logliks: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    lengths: tuple[int, ...]
    text: str | None
    completions: tuple[Completion, ...]

    @property
    def result(self) -> tuple[object, ...]:
        """What lm-eval scores, compared bit by bit (as Python compares floats: no NaN is equal)."""
        return (self.logliks, self.is_greedy, self.text)


@dataclass(frozen=True, slots=True)
class Noise:
    """How far stock is from itself: the largest move of a log-likelihood (nats), and of tokens."""

    max_move: float
    spread: Spread

    @classmethod
    def measure(cls, reference: Sequence[Item], other: Sequence[Item]) -> Noise:
        """Compare two stock runs of the same items: at different batch sizes, or in two forms."""
        moves = [move for a, b in _pairs(reference, other) for move in _moves(a, b)]
        spread = equality.measure(_completions(reference), _completions(other))
        return cls(max(moves, default=0.0), spread)

    @classmethod
    def wider(cls, one: Noise, other: Noise) -> Noise:
        """The one in which stock is further from itself."""
        return max(one, other, key=lambda noise: (noise.max_move, noise.spread.num_differing))


@dataclass(frozen=True, slots=True)
class Finding:
    """The judgement of one item; `why` says what was seen where it is not identical."""

    id: int
    kind: Kind
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The judgement of one task: every item, and all tokens together."""

    findings: tuple[Finding, ...]
    tokens: Report
    max_move: float

    def count(self, kind: Kind) -> int:
        """Number of items of that kind."""
        return sum(finding.kind is kind for finding in self.findings)

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against equality; empty when nothing does."""
        unexplained = [f for f in self.findings if f.kind is Kind.UNEXPLAINED]
        items = tuple(f"item {finding.id}: {finding.why}" for finding in unexplained)
        return items + self.tokens.problems


def read_items(records: Sequence[Mapping[str, Any]]) -> tuple[Item, ...]:
    """The items of one task and pass, as `driver.py` wrote them."""
    return tuple(_read_item(record) for record in records)


def compare(reference: Sequence[Item], other: Sequence[Item], noise: Noise) -> Outcome:
    """Judge every item of `other` by stock's answers and by how far stock is from itself.

    Raises `InternalError` when the two are not runs of the same items.
    """
    pairs = list(_pairs(reference, other))
    tokens = equality.check_near_ties(
        _completions(reference), _completions(other), self_noise=noise.spread
    )
    flips: dict[int, list[Difference]] = {}
    for difference in tokens.differences:
        flips.setdefault(int(difference.prompt_id.partition("/")[0]), []).append(difference)
    findings = tuple(_judge(a, b, noise, flips.get(a.id, [])) for a, b in pairs)
    moves = [move for a, b in pairs for move in _moves(a, b)]
    return Outcome(findings, tokens, max(moves, default=0.0))


def _judge(a: Item, b: Item, noise: Noise, flips: Sequence[Difference]) -> Finding:
    if a.result == b.result:
        return Finding(a.id, Kind.IDENTICAL)
    wrong = [str(flip) for flip in flips if flip.kind is not equality.Kind.NEAR_TIE]
    largest, allowed = max(_moves(a, b), default=0.0), SLACK * noise.max_move
    if not largest <= allowed:  # also when it is not a number
        wrong.append(f"a log-likelihood moved by {largest:.4g} nats, allowed are {allowed:.4g}")
    changes = list(_changed_choices(a, b, noise.max_move))
    wrong += [why for why, is_near in changes if not is_near]
    if a.text != b.text and not flips:
        wrong.append("another text from the same tokens")
    if wrong:
        return Finding(a.id, Kind.UNEXPLAINED, "; ".join(wrong))
    # With one choice the greedy flag is the answer; with several only their order is.
    is_same = (
        not changes and a.text == b.text and (len(a.logliks) > 1 or a.is_greedy == b.is_greedy)
    )
    if is_same:
        return Finding(a.id, Kind.ROUNDING, f"moved by {largest:.4g} nats")
    return Finding(a.id, Kind.NEAR_TIE, "; ".join([why for why, _ in changes] + [*map(str, flips)]))


def _changed_choices(a: Item, b: Item, max_move: float) -> Iterator[tuple[str, bool]]:
    """Where another choice wins: what was seen, and whether it is a near-tie."""
    if len(a.logliks) < 2:  # noqa: PLR2004 - a choice is between two or more
        return
    for metric, weights in _metrics(a):
        before, after = _winner(a, weights), _winner(b, weights)
        if before == after:
            continue
        margin = abs(a.logliks[before] * weights[before] - a.logliks[after] * weights[after])
        allowed = max_move * (weights[before] + weights[after])
        yield (
            f"{metric} {before} -> {after} (margin {margin:.4g} of {allowed:.4g})",
            margin <= allowed,
        )


def _metrics(item: Item) -> tuple[tuple[str, Weights], ...]:
    """The ways in which lm-eval weighs the log-likelihoods of the choices."""
    return (
        ("acc", tuple(1.0 for _ in item.lengths)),
        ("acc_norm", tuple(1.0 / max(1, length) for length in item.lengths)),
    )


def _winner(item: Item, weights: Weights) -> int:
    scores = [loglik * weight for loglik, weight in zip(item.logliks, weights, strict=True)]
    return scores.index(max(scores))


def _moves(a: Item, b: Item) -> list[float]:
    # Equal infinities are no move, and their difference is no number.
    pairs = zip(a.logliks, b.logliks, strict=True)
    return [0.0 if before == after else abs(after - before) for before, after in pairs]


def _pairs(reference: Sequence[Item], other: Sequence[Item]) -> Iterator[tuple[Item, Item]]:
    ids, others = [item.id for item in reference], [item.id for item in other]
    if ids != others:
        raise InternalError(
            f"two runs of one task answered different items: {ids[:5]}... ({len(ids)}) and "
            f"{others[:5]}... ({len(others)}); please report this with the command line"
        )
    return zip(reference, other, strict=True)


def _completions(items: Sequence[Item]) -> list[Completion]:
    return [completion for item in items for completion in item.completions]


def _read_item(record: Mapping[str, Any]) -> Item:
    answers = record["answers"]
    if isinstance(answers[0], str):
        written = _completion(f"{record['id']}", record["positions"][0])
        return Item(record["id"], (), (), (), answers[0], (written,))
    # Positions of given text are independent questions: each is a completion of one token.
    completions = tuple(
        _completion(f"{record['id']}/{choice}/{number}", [position])
        for choice, positions in enumerate(record["positions"])
        for number, position in enumerate(positions)
    )
    return Item(
        id=record["id"],
        logliks=tuple(float(loglik) for loglik, _ in answers),
        is_greedy=tuple(bool(flag) for _, flag in answers),
        lengths=tuple(len(text.removeprefix(" ")) for text in record["continuations"]),
        text=None,
        completions=completions,
    )


def _completion(prompt_id: str, positions: Sequence[Mapping[str, Any]]) -> Completion:
    candidates = [{int(t): p for t, p in x["candidates"].items()} for x in positions]
    tokens = [int(position["token"]) for position in positions]
    logprobs = [scores[token] for scores, token in zip(candidates, tokens, strict=True)]
    return Completion(prompt_id, tuple(tokens), tuple(logprobs), tuple(candidates))
