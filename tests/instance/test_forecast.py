"""Forecasts, from models whose steps are easy to add up."""

from __future__ import annotations

import math

import msgspec
import pytest

from xllm_plugin.channel import EngineIdentity, EngineLoad, Reading, Snapshot
from xllm_plugin.instance.forecast import EngineLimits, Forecast, forecast_of
from xllm_plugin.scheduler.predictor import StepModel, StepShape, Work

LIMITS = EngineLimits(max_tokens=100, block_size=16)


def make_model(
    *, token: float = 1.0, step: float = 0.0, kv: float = 0.0, num_samples: int = 100
) -> StepModel:
    """Costs of a token, of a step and of a token of context, in ms."""
    work = Work(weight_ms=1, token_ms=1, kv_token_ms=1, pair_ms=1e-9, overhead_ms=1)
    factors = (step, 0.0, 0.0, kv, 0.0, 0.0, token, 0.0)
    return StepModel(work=work, factors=factors, error=0.0, num_samples=num_samples)


def make_reading(model: StepModel | None, dp_rank: int = 0, **load: float) -> Reading:
    snapshot = Snapshot(
        sequence=1,
        monotonic_s=0.0,
        wall_time_s=0.0,
        engine=EngineIdentity(
            instance_id="e", model="m", platform="xllm", device="cpu", pid=1, dp_rank=dp_rank
        ),
        load=msgspec.convert(load, EngineLoad),
        sections={} if model is None else {"predictor": msgspec.to_builtins(model)},
    )
    return Reading(dp_rank=dp_rank, snapshot=snapshot, age_s=0.0)


def forecast(*readings: Reading, limits: EngineLimits = LIMITS) -> Forecast:
    found = forecast_of(readings, "predictor", limits)
    assert found is not None
    return found


def test_an_idle_engine_takes_the_prompt_in_chunks() -> None:
    found = forecast(make_reading(make_model(step=10)))
    assert found.ttft_ms(50) == 60
    assert found.ttft_ms(250) == 100 + 10 + 100 + 10 + 50 + 10
    assert found.ttft_ms(50, ahead_tokens=200) == found.ttft_ms(250)
    assert found.alone_ms(50) == 60


def test_what_runs_takes_its_part_of_each_step() -> None:
    busy = make_reading(
        make_model(kv=0.5),
        num_running=20,
        num_blocks_total=10,
        num_blocks_free=8,
        smoothed_step_ms=30.0,
    )
    found = forecast(busy)
    assert found.decodes == StepShape(20, 20, 32)
    assert found.chunk_tokens == 80
    # Half of the running step; 80 tokens beside 20, 32 of context; 40 beside 20, again 32.
    assert found.ttft_ms(120) == 15 + (100 + 16) + (60 + 16)
    assert found.alone_ms(120) == 120


def test_where_steps_are_kept_short_chunks_are_small() -> None:
    limits = EngineLimits(max_tokens=100, block_size=16, step_ms=50.0)
    model = make_model()
    assert forecast(make_reading(model), limits=limits).chunk_tokens == 100
    assert forecast(make_reading(model, num_running=20), limits=limits).chunk_tokens == 30
    crowded = forecast(make_reading(model, num_running=60), limits=limits)
    assert crowded.chunk_tokens == 1
    assert math.isfinite(crowded.ttft_ms(10**6))


def test_the_least_busy_engine_is_the_one_that_is_asked() -> None:
    model = make_model()
    found = forecast(
        make_reading(model, 0, num_running=5, num_waiting=9),
        make_reading(model, 1, num_running=7),
    )
    assert found.decodes.num_sequences == 7
    assert found.num_engines == 2
    assert found.ttft_ms(0, ahead_tokens=40) == 20 + 7


@pytest.mark.parametrize(
    "readings",
    [
        (),
        (Reading(dp_rank=0, error="gone"),),
        (make_reading(None),),
        (make_reading(make_model(num_samples=3)),),
    ],
)
def test_nothing_is_foretold_without_a_model_to_rely_on(readings: tuple[Reading, ...]) -> None:
    assert forecast_of(readings, "predictor", LIMITS) is None
