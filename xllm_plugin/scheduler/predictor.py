"""How long a step takes, from what is in it: a roofline prior, corrected by every step measured.

`StepModel` is immutable, predicts, and travels in the engine's snapshot, so that others than the
scheduler can predict too.  `StepTimeLearner` makes the next one out of a measured step.

The prior is a roofline: linear layers take the longer of reading their weights and of computing;
attention reads keys and values, and computes each pair of query and key.  Its device figures may be
wrong by several times.  Each term is therefore one feature, in milliseconds of the prior, and its
factor is learned:

* recursive least squares on relative errors, in information form, with directional forgetting
  (L. Cao and H. Schwartz, "A directional forgetting algorithm based on the decomposition of the
  information matrix", Automatica 36, 2000): only what a step tells something about is forgotten, so
  hours of decoding do not wash out what prefills cost;
* a measurement far outside the usual error is pulled to its edge (Huber); the edge is wider for
  steps unlike those seen, of which the model knows little;
* factors are projected to be at least 0: more work never takes less time;
* beside them one pace for all steps follows what slows or speeds all of them for a while (clocks, a
  neighbour on the same cores); the factors learn from what is left when it is taken out.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import math
import operator
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["DeviceSpeed", "ModelShape", "StepModel", "StepShape", "StepTimeLearner", "Work"]

FORGOTTEN: Final = 0.01
"""Share of what is known in the direction of one step: about a hundred like it are remembered."""
FORGOTTEN_AT_FIRST: Final = 2.0
"""Over the number of steps measured: the first steps of an engine are slow, and soon forgotten."""
PACE_WEIGHT: Final = 0.2
"""Of the last step in the pace: about five steps are remembered."""
PACE_TAKEN_OUT: Final = 0.8
"""Exponent of the pace in what the factors learn from; at 1 nothing would say what is whose."""
MOST_PACE: Final = 10.0
PRIOR_INFORMATION: Final = 1e-3
"""The prior weighs as a thousandth of a step: it may be wrong by some ten times."""
ERROR_WEIGHT: Final = 0.05
OUTLIER_ERRORS: Final = 3.0
MARGIN_ERRORS: Final = 2.0
"""Mean errors on top of a prediction that is planned with.  With one, a fifth of the steps that
fill their budget end too late, and each may bring a request's last token."""
LEAST_ERROR: Final = 0.05
MIN_SAMPLES: Final = 32
RELIABLE_ERROR: Final = 0.25
SATURATED_GROWTH: Final = 1.9
TOLERANCE: Final = 1e-9
LEAST_MS: Final = 1e-6


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a step has to move and compute, whatever the device.

    Attributes:
        weight_bytes: read by every step: all weights but routed experts, as stored (quantised).
        flops_per_token: of all linear layers that one token goes through.
        expert_bytes: of all routed experts together; 0 for a dense model.
        expert_share: of the routed experts that one token uses, 0 to 1.
        kv_bytes_per_token: keys and values of one token, all layers.
        flops_per_pair: attention of one query with one key, all layers.
    """

    weight_bytes: float
    flops_per_token: float
    expert_bytes: float = 0.0
    expert_share: float = 0.0
    kv_bytes_per_token: float
    flops_per_pair: float


class DeviceSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Measured or assumed; only the start depends on it.

    Attributes:
        bytes_per_s: memory bandwidth.
        flops_per_s: of large matrix products in the model's type.
        overhead_ms: of a step with nothing in it.
    """

    bytes_per_s: float
    flops_per_s: float
    overhead_ms: float = 1.0


class StepShape(msgspec.Struct, frozen=True, gc=False):
    """What a step is made of.

    Attributes:
        num_sequences: rows that sample a token or take a chunk.
        num_tokens: that go through the linear layers.
        context_tokens: whose keys and values decoding rows read, summed.
        prefill_tokens: part of `num_tokens` that belongs to prompts.
        prefill_pairs: of query and key in prompts' attention, summed over chunks.
    """

    num_sequences: int = 0
    num_tokens: int = 0
    context_tokens: int = 0
    prefill_tokens: int = 0
    prefill_pairs: int = 0

    def with_decodes(self, num: int, context_tokens: int, tokens_each: int = 1) -> StepShape:
        """The same step with `num` more decoding rows of `context_tokens` in sum."""
        return StepShape(
            self.num_sequences + num,
            self.num_tokens + num * tokens_each,
            self.context_tokens + context_tokens,
            self.prefill_tokens,
            self.prefill_pairs,
        )

    def with_prefill(self, tokens: int, computed_tokens: int = 0) -> StepShape:
        """The same step with a chunk of `tokens` that follows `computed_tokens`."""
        return StepShape(
            self.num_sequences + 1,
            self.num_tokens + tokens,
            self.context_tokens,
            self.prefill_tokens + tokens,
            self.prefill_pairs + tokens * computed_tokens + tokens * (tokens + 1) // 2,
        )


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The prior: milliseconds of each kind of work on the device as it was assumed."""

    weight_ms: float
    token_ms: float
    expert_ms: float = 0.0
    expert_share: float = 0.0
    kv_token_ms: float
    pair_ms: float
    overhead_ms: float

    @classmethod
    def of(cls, model: ModelShape, device: DeviceSpeed) -> Work:
        """The roofline of `model` on `device`."""
        bytes_per_ms, flops_per_ms = device.bytes_per_s / 1e3, device.flops_per_s / 1e3
        return cls(
            weight_ms=model.weight_bytes / bytes_per_ms,
            token_ms=model.flops_per_token / flops_per_ms,
            expert_ms=model.expert_bytes / bytes_per_ms,
            expert_share=model.expert_share,
            kv_token_ms=model.kv_bytes_per_token / bytes_per_ms,
            pair_ms=model.flops_per_pair / flops_per_ms,
            overhead_ms=device.overhead_ms,
        )

    @property
    def saturation_tokens(self) -> int:
        """Tokens in a step from which the linear layers compute longer than they read."""
        return max(1, math.ceil((self.weight_ms + self.expert_ms) / self.token_ms))

    def terms(self, step: StepShape) -> tuple[float, ...]:
        """What each factor of a `StepModel` multiplies, in ms.  None falls when a part grows.

        The linear layers' roofline; a row's own costs; attention of decodes and of prompts.  The
        last three have no time in the prior: weights and tokens of a device that reads and computes
        one after the other, or at another ratio, and growth below proportion (caches, idle units).
        """
        tokens = step.num_tokens
        read_ms = self.weight_ms
        if self.expert_ms:
            read_ms += self.expert_ms * (1.0 - (1.0 - self.expert_share) ** tokens)
        compute_ms = self.token_ms * tokens
        return (
            self.overhead_ms,
            max(read_ms, compute_ms),
            self.overhead_ms * step.num_sequences / 64,
            self.kv_token_ms * step.context_tokens,
            self.pair_ms * step.prefill_pairs,
            read_ms,
            compute_ms,
            self.weight_ms * math.sqrt(tokens) / 8,
        )


PRIOR_FACTORS: Final = (1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


class StepModel(msgspec.Struct, frozen=True, kw_only=True):
    """Predicts the duration of steps.

    Attributes:
        work: the prior.
        factors: one for each of `Work.terms`.
        pace: how much longer than by the factors steps take of late.
        error: running mean of the relative error, 0 to 1; 1 before anything was measured.
        num_samples: steps measured.
    """

    work: Work
    factors: tuple[float, ...] = PRIOR_FACTORS
    pace: float = 1.0
    error: float = 1.0
    num_samples: int = 0

    @property
    def is_reliable(self) -> bool:
        """Whether to plan by it; without, budgets are cautious."""
        return self.num_samples >= MIN_SAMPLES and self.error <= RELIABLE_ERROR

    def predict_ms(self, step: StepShape) -> float:
        """The expected duration."""
        return self.pace * sum(map(operator.mul, self.factors, self.work.terms(step)))

    def bound_ms(self, step: StepShape) -> float:
        """The duration that nine in ten stay below; what deadlines are planned with."""
        return self.predict_ms(step) * (1.0 + MARGIN_ERRORS * self.error)

    def is_saturated(self, step: StepShape) -> bool:
        """Whether twice the rows would take about twice the time: a larger batch gains nothing."""
        twice = step.with_decodes(step.num_sequences, step.context_tokens)
        return self.predict_ms(twice) >= SATURATED_GROWTH * self.predict_ms(step)

    def prefill_tokens_within(
        self, step: StepShape, budget_ms: float, most: int, computed_tokens: int = 0
    ) -> int:
        """The largest chunk, up to `most`, with which `step` still ends within `budget_ms`."""
        if self.bound_ms(step.with_prefill(most, computed_tokens)) <= budget_ms:
            return most
        fits, too_many = 0, most
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.bound_ms(step.with_prefill(middle, computed_tokens)) <= budget_ms:
                fits = middle
            else:
                too_many = middle
        return fits

    def decodes_within(
        self, step: StepShape, budget_ms: float, most: int, context_tokens_each: int
    ) -> int:
        """How many more decoding rows, up to `most`, end with `step` within `budget_ms`."""
        fits, too_many = 0, most + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            more = step.with_decodes(middle, middle * context_tokens_each)
            if self.bound_ms(more) <= budget_ms:
                fits = middle
            else:
                too_many = middle
        return fits


class StepTimeLearner:
    """Learns a `StepModel` from the steps of one engine."""

    def __init__(self, work: Work) -> None:
        self.model = StepModel(work=work)
        size = len(PRIOR_FACTORS)
        self._information: NDArray[np.float64] = np.eye(size) * PRIOR_INFORMATION
        # Unconstrained; the model's factors are these, projected.
        self._factors: NDArray[np.float64] = np.array(PRIOR_FACTORS)

    def observe(self, step: StepShape, duration_ms: float) -> None:
        """Take in one measured step; durations that no step has are left out."""
        if not (step.num_tokens and math.isfinite(duration_ms) and duration_ms > 0):
            return
        model = self.model
        terms = np.array(model.work.terms(step))
        lasting_ms = max(float(np.array(model.factors) @ terms), LEAST_MS)
        predicted_ms = model.pace * lasting_ms
        # The geometric mean weighs too long and too short alike.
        taken_out = model.pace**PACE_TAKEN_OUT
        scale_ms = math.sqrt(lasting_ms * duration_ms / taken_out)
        usual = OUTLIER_ERRORS * max(model.error, LEAST_ERROR)
        edge_ms = usual * predicted_ms * math.sqrt(1.0 + self._novelty(terms / scale_ms))
        surprise_ms = duration_ms - predicted_ms
        taken_ms = predicted_ms + max(-edge_ms, min(edge_ms, surprise_ms))
        forgotten = max(FORGOTTEN, FORGOTTEN_AT_FIRST / (model.num_samples + 4))
        self._learn(terms / scale_ms, taken_ms / taken_out / scale_ms, forgotten)
        error = abs(surprise_ms) / max(predicted_ms, duration_ms)
        self.model = StepModel(
            work=model.work,
            factors=tuple(float(factor) for factor in self._projected()),
            pace=_followed(model.pace, math.log(duration_ms / predicted_ms), usual),
            error=model.error + ERROR_WEIGHT * (error - model.error),
            num_samples=model.num_samples + 1,
        )

    def _novelty(self, row: NDArray[np.float64]) -> float:
        """How little is known of steps like this one: the leverage of its row, 0 or more."""
        return float(row @ np.linalg.solve(self._information, row))

    def _learn(self, row: NDArray[np.float64], value: float, forgotten: float) -> None:
        seen = self._information @ row
        known = float(row @ seen)
        information = self._information - forgotten / known * np.outer(seen, seen)
        information += np.outer(row, row)
        information = (information + information.T) / 2
        # Rounding must not eat what is known of a direction that is never seen.
        np.fill_diagonal(information, np.maximum(information.diagonal(), PRIOR_INFORMATION))
        missing = value - float(row @ self._factors)
        self._factors = self._factors + np.linalg.solve(information, row * missing)
        self._information = information

    def _projected(self) -> NDArray[np.float64]:
        """The nearest factors that are at least 0, near in the sense of what the steps said.

        Non-negative least squares by active sets: C. Lawson and R. Hanson, "Solving Least Squares
        Problems" (1974), chapter 23.
        """
        if (self._factors >= 0).all():
            return self._factors
        information = self._information
        target = information @ self._factors
        size = len(target)
        found, free = np.zeros(size), np.zeros(size, dtype=bool)
        for _ in range(3 * size):
            gradient = np.where(free, 0.0, target - information @ found)
            if gradient.max() <= TOLERANCE * abs(target).max():
                break
            free[int(gradient.argmax())] = True
            found = _within(information, target, found, free)
        return found


def _followed(pace: float, surprise: float, usual: float) -> float:
    """The pace after a step that took e to the `surprise` times as long as predicted."""
    step = PACE_WEIGHT * max(-usual, min(usual, surprise))
    return min(MOST_PACE, max(1.0 / MOST_PACE, pace * math.exp(step)))


def _within(
    information: NDArray[np.float64],
    target: NDArray[np.float64],
    found: NDArray[np.float64],
    free: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """The best factors that are 0 outside `free`; what would fall below 0 is taken out of it."""
    while True:
        best = np.zeros_like(found)
        best[free] = np.linalg.solve(information[np.ix_(free, free)], target[free])
        below = free & (best <= 0)
        if not below.any():
            return best
        shares = found[below] / (found[below] - best[below])
        found = found + shares.min() * (best - found)
        free &= found > 0
        found[~free] = 0.0
