"""The step-time model against devices it knows nothing of: dense, experts, quantised, misjudged."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.scheduler.predictor import (
    DeviceSpeed,
    ModelShape,
    StepModel,
    StepShape,
    StepTimeLearner,
    Work,
)

ASSUMED = DeviceSpeed(bytes_per_s=20e9, flops_per_s=3e11)
DENSE_SHAPE = ModelShape(
    weight_bytes=270e6, flops_per_token=270e6, kv_bytes_per_token=23040, flops_per_pair=69120
)
EXPERTS_SHAPE = msgspec.structs.replace(
    DENSE_SHAPE, weight_bytes=70e6, expert_bytes=800e6, expert_share=0.125
)


def dense(step: StepShape) -> float:
    """Reads for 9 ms, or computes 0.09 ms a token."""
    return (
        8
        + max(9.0, 0.09 * step.num_tokens)
        + 0.05 * step.num_sequences
        + 4e-4 * step.context_tokens
        + 1e-5 * step.prefill_pairs
    )


def experts(step: StepShape) -> float:
    """Grows far less than its tokens do."""
    read_ms = 40 * (1 - 0.9**step.num_tokens)
    return 3 + read_ms + 0.2 * step.num_tokens**0.7 + 0.1 * step.num_sequences


def quantised(step: StepShape) -> float:
    """Reads little and dequantises for every token."""
    read_ms = max(3.0, 0.4 * step.num_tokens)
    return 2 + read_ms + 1e-4 * step.context_tokens + 2e-5 * step.prefill_pairs


def slow(step: StepShape) -> float:
    return 25 * dense(step)


def fast(step: StepShape) -> float:
    return 0.02 * dense(step)


DEVICES = [
    (dense, DENSE_SHAPE),
    (experts, EXPERTS_SHAPE),
    (quantised, DENSE_SHAPE),
    (slow, DENSE_SHAPE),
    (fast, DENSE_SHAPE),
]


def any_step(rng: random.Random) -> StepShape:
    num = rng.choice([0, 1, 4, 8, 16, 32, 64])
    step = StepShape().with_decodes(num, num * rng.randint(50, 2000))
    if not num or rng.random() < 0.3:
        step = step.with_prefill(rng.randint(16, 1024), rng.choice([0, 512, 1024]))
    return step


def taught(
    device: Callable[[StepShape], float],
    shape: ModelShape,
    num_steps: int = 400,
    noise: float = 0.0,
    outliers: float = 0.0,
) -> StepTimeLearner:
    rng = random.Random(1)
    learner = StepTimeLearner(Work.of(shape, ASSUMED))
    for _ in range(num_steps):
        step = any_step(rng)
        duration_ms = device(step) * max(0.1, rng.gauss(1, noise))
        if rng.random() < outliers:
            duration_ms *= rng.choice([10, 50])
        learner.observe(step, duration_ms)
    return learner


def errors(model: StepModel, device: Callable[[StepShape], float]) -> list[float]:
    rng = random.Random(2)
    steps = [any_step(rng) for _ in range(300)]
    return sorted(abs(model.predict_ms(step) / device(step) - 1) for step in steps)


@pytest.mark.parametrize(("device", "shape"), DEVICES)
def test_it_learns_any_device(device: Callable[[StepShape], float], shape: ModelShape) -> None:
    model = taught(device, shape).model
    found = errors(model, device)
    assert found[150] < 0.08, "the median"
    assert found[270] < 0.2, "nine in ten"
    assert model.is_reliable


@pytest.mark.parametrize(("device", "shape"), DEVICES)
def test_noise_and_outliers_do_not_lead_it_astray(
    device: Callable[[StepShape], float], shape: ModelShape
) -> None:
    model = taught(device, shape, num_steps=600, noise=0.1, outliers=0.03).model
    found = errors(model, device)
    assert found[150] < 0.12
    assert found[270] < 0.25
    assert model.is_reliable
    assert model.error > 0.05, "it knows that it is not exact"


def test_hours_of_decoding_do_not_wash_out_what_prefills_cost() -> None:
    learner = taught(dense, DENSE_SHAPE, noise=0.03)
    rng = random.Random(3)
    for _ in range(5000):
        step = StepShape().with_decodes(4, 4 * rng.randint(100, 2000))
        learner.observe(step, dense(step) * rng.gauss(1, 0.03))
    for tokens in (128, 512, 1024):
        step = StepShape().with_prefill(tokens)
        assert learner.model.predict_ms(step) == pytest.approx(dense(step), rel=0.4)
        assert Work.of(DENSE_SHAPE, ASSUMED).token_ms * tokens > 5 * dense(step), "the prior"


def test_a_device_that_changes_is_followed() -> None:
    learner = taught(dense, DENSE_SHAPE)
    rng = random.Random(4)
    before, reported = learner.model.error, []
    for _ in range(400):
        step = any_step(rng)
        learner.observe(step, 3 * dense(step))
        reported.append(learner.model.error)
    assert max(reported[:20]) > before + 0.05, "an error is reported"
    assert learner.model.is_reliable
    assert errors(learner.model, lambda step: 3 * dense(step))[150] < 0.2


def test_a_pace_that_changes_for_all_steps_is_followed_in_some_ten() -> None:
    """A neighbour on the same cores: every step takes three times as long, and then again not."""
    learner = taught(dense, DENSE_SHAPE, noise=0.05)
    rng = random.Random(5)
    for factor in (3.0, 1.0):
        for _ in range(25):
            step = any_step(rng)
            learner.observe(step, factor * dense(step) * rng.gauss(1, 0.05))
        found = errors(learner.model, lambda step, factor=factor: factor * dense(step))  # type: ignore[misc]
        assert found[150] < 0.25
    assert learner.model.error < 0.25, "and relied on again"


def test_a_kind_of_step_that_is_new_is_learned_at_once() -> None:
    """Thousands of decodes, all predicted well, do not make the first prompts outliers."""
    learner = StepTimeLearner(Work.of(DENSE_SHAPE, ASSUMED))
    rng = random.Random(6)

    def device(step: StepShape) -> float:
        return dense(step) + 0.5 * step.prefill_tokens

    for _ in range(1000):
        step = StepShape().with_decodes(rng.randint(1, 8), rng.randint(100, 4000))
        learner.observe(step, device(step) * rng.gauss(1, 0.03))
    for tokens in (300, 700, 500):
        prompt = StepShape().with_prefill(tokens)
        learner.observe(prompt, device(prompt))
    prompt = StepShape().with_prefill(600)
    assert learner.model.predict_ms(prompt) == pytest.approx(device(prompt), rel=0.25)


def test_one_wild_measurement_changes_little() -> None:
    learner = taught(dense, DENSE_SHAPE)
    step = StepShape().with_decodes(8, 4000)
    before_ms = learner.model.predict_ms(step)
    learner.observe(step, 1e6)
    assert learner.model.predict_ms(step) == pytest.approx(before_ms, rel=0.15)


@pytest.mark.parametrize("duration_ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_none_can_be_is_left_out(duration_ms: float) -> None:
    learner = StepTimeLearner(Work.of(DENSE_SHAPE, ASSUMED))
    learner.observe(StepShape().with_decodes(1, 10), duration_ms)
    learner.observe(StepShape(), 5.0)
    assert learner.model.num_samples == 0


def test_the_prior_is_a_roofline_and_not_trusted() -> None:
    model = StepTimeLearner(Work.of(DENSE_SHAPE, ASSUMED)).model
    assert not model.is_reliable
    assert model.predict_ms(StepShape().with_decodes(1, 0)) == pytest.approx(1 + 13.5, abs=0.1)
    thousand = StepShape().with_prefill(1000)
    assert model.predict_ms(thousand) == pytest.approx(1 + 900 + 115, rel=0.01)
    assert model.work.saturation_tokens == 15


def test_it_travels() -> None:
    model = taught(dense, DENSE_SHAPE).model
    there = msgspec.msgpack.decode(msgspec.msgpack.encode(model), type=StepModel)
    assert there == model
    step = StepShape().with_decodes(3, 700).with_prefill(20)
    assert there.predict_ms(step) == model.predict_ms(step)


STEPS = st.builds(
    StepShape,
    num_sequences=st.integers(0, 300),
    num_tokens=st.integers(1, 5000),
    context_tokens=st.integers(0, 10**6),
    prefill_tokens=st.integers(0, 5000),
    prefill_pairs=st.integers(0, 10**8),
)


@given(st.lists(st.tuples(STEPS, st.floats(1e-3, 1e5)), max_size=40), STEPS)
@settings(max_examples=60, deadline=None)
def test_whatever_it_is_told_more_work_never_takes_less(
    told: list[tuple[StepShape, float]], step: StepShape
) -> None:
    learner = StepTimeLearner(Work.of(EXPERTS_SHAPE, ASSUMED))
    for seen, duration_ms in told:
        learner.observe(seen, duration_ms)
    model = learner.model
    assert all(factor >= 0 for factor in model.factors)
    assert 0 <= model.error <= 1
    alone_ms = model.predict_ms(step)
    assert alone_ms >= 0
    assert model.predict_ms(step.with_prefill(7, 100)) >= alone_ms - 1e-9
    assert model.predict_ms(step.with_decodes(3, 900)) >= alone_ms - 1e-9


@given(STEPS, st.floats(0, 2000), st.integers(0, 3000), st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_the_largest_chunk_is_the_largest(
    step: StepShape, budget_ms: float, most: int, computed_tokens: int
) -> None:
    model = taught_dense()
    found = model.prefill_tokens_within(step, budget_ms, most, computed_tokens)
    assert 0 <= found <= most
    if found:
        assert model.bound_ms(step.with_prefill(found, computed_tokens)) <= budget_ms
    if found < most:
        assert model.bound_ms(step.with_prefill(found + 1, computed_tokens)) > budget_ms
    rows = model.decodes_within(step, budget_ms, 50, 100)
    assert rows == 50 or model.bound_ms(step.with_decodes(rows + 1, (rows + 1) * 100)) > budget_ms


_TAUGHT: list[StepModel] = []


def taught_dense() -> StepModel:
    if not _TAUGHT:
        _TAUGHT.append(taught(dense, DENSE_SHAPE).model)
    return _TAUGHT[0]
