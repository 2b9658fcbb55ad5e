"""Speeds are learned from measurements, begin as the fleet's and follow what changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.registration import Load
from xllm_plugin.service.config import InstanceEntry
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.lifecycle import Registered, Timings
from xllm_plugin.service.speed import Line, Pace, Paces, Speed, SpeedMeter
from xllm_plugin.service.upstream import Pool

PRIOR = Speed(0.02, 1e-4, 0.02, 5e-4)


def test_lines_are_found_under_noise() -> None:
    draw = random.Random(1)
    meter = SpeedMeter()
    for _ in range(300):
        tokens, running = draw.uniform(1, 8000), draw.randrange(1, 64)
        meter.observe_ttft(tokens, (0.05 + 3e-4 * tokens) * draw.uniform(0.8, 1.2))
        tpot_s = (0.03 + 1e-3 * running) * draw.uniform(0.8, 1.2)
        meter.observe_tpot(running, tpot_s)
    speed = meter.speed(PRIOR)
    assert speed.prefill_s_per_token == pytest.approx(3e-4, rel=0.1)
    assert speed.tpot_base_s + 32 * speed.tpot_s_per_request == pytest.approx(0.062, rel=0.1)


def test_without_measurements_the_prior_stands() -> None:
    speed = SpeedMeter().speed(PRIOR)
    assert vars_of(speed) == pytest.approx(vars_of(PRIOR))


def vars_of(speed: Speed) -> list[float]:
    return [getattr(speed, name) for name in Speed.__slots__]


def test_what_was_long_ago_is_forgotten() -> None:
    meter = SpeedMeter()
    for slope in (1e-3, 1e-4):
        for number in range(3000):
            meter.observe_ttft(number * 2, slope * number * 2)
    assert meter.speed(PRIOR).prefill_s_per_token == pytest.approx(1e-4, rel=0.1)


def test_a_pace_begins_at_one_is_found_and_forgets() -> None:
    pace = Pace(prior_weight=2.0)
    assert pace.factor(0.1, 0.01) == 1.0
    pace.observe(10, 4 * 0.2)
    assert 1.5 < pace.factor(0.1, 0.01) < 2.5  # one measurement is not believed alone
    for factor in (4.0, 0.5):
        for tokens in range(1, 400):
            pace.observe(tokens, factor * (0.1 + 0.01 * tokens))
        assert pace.factor(0.1, 0.01) == pytest.approx(factor, rel=0.1)


def test_a_slow_one_that_gets_nothing_is_tried_again() -> None:
    paces = Paces()
    for _ in range(50):
        paces.ttft.observe(100, 5.0)
        paces.tpot.observe(10, 5.0)
    slow = paces.speed(PRIOR)
    assert slow.prefill_s_per_token > 20 * PRIOR.prefill_s_per_token
    for _ in range(1500):
        paces.fade(1.0)
    assert vars_of(paces.speed(PRIOR)) == pytest.approx(vars_of(PRIOR), rel=0.01)


def test_no_queue_seems_to_cost_nothing_however_noisy_it_was() -> None:
    """Lines of single instances had a slope near 0 now and then, and all went there."""
    draw = random.Random(2)
    it = fleet()
    instances = [it.register(InstanceEntry(url=f"http://{n}:1"), source="t") for n in "abcd"]
    for number in range(4000):
        tokens = draw.uniform(500, 1500)
        seconds = (0.1 + 2e-4 * tokens) * draw.choice([0.5, 1.0, 2.0])
        it.observe_ttft(draw.choice(instances), tokens, seconds)
        if number % 10 == 0 and number > 500:
            it.tick()
            slopes = [one.speed.prefill_s_per_token for one in instances]
            assert max(slopes) < 3 * min(slopes)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e3)), max_size=30))
def test_no_prediction_is_negative_or_no_number(points: list[tuple[float, float]]) -> None:
    line = Line(256.0)
    for x, y in points:
        line.observe(x, y)
    base, slope = line.fit(0.02, 1e-4)
    assert base >= 0
    assert slope >= 0
    assert base + slope < float("inf")


def fleet() -> Fleet:
    return Fleet(
        Timings(), lambda entry: Pool(entry.host, entry.port, tls=None, connect_timeout_s=1)
    )


def test_a_new_instance_begins_as_the_fleet_is_scaled_by_its_capacity() -> None:
    it = fleet()
    old = it.register(InstanceEntry(url="http://a:1"), source="t")
    for number in range(200):
        it.observe_ttft(old, number * 50, 0.1 + 5e-4 * number * 50)
    before = old.speed
    it.tick()
    assert old.speed.prefill_s_per_token > before.prefill_s_per_token
    new = it.register(InstanceEntry(url="http://b:1", capacity=2.0), source="t")
    assert new.speed.prefill_s_per_token == pytest.approx(2.5e-4, rel=0.1)
    for number in range(200):
        it.observe_ttft(new, number * 50, 1e-4 * number * 50)
    it.tick()
    assert new.speed.prefill_s_per_token == pytest.approx(1e-4, rel=0.1)
    it.report(new, Registered("2"))  # another server, of which nothing is known
    assert new.speed.prefill_s_per_token > 1.2e-4
    slow = it.register(InstanceEntry(url="http://c:1", capacity=0.5), source="t")
    assert slow.speed.prefill_s_per_token == pytest.approx(4 * new.speed.prefill_s_per_token)


def test_a_heartbeat_without_output_says_nothing_of_speed() -> None:
    it = fleet()
    one = it.register(InstanceEntry(url="http://a:1"), source="t")
    before = one.speed
    it.set_load(one, Load(num_running=3, num_waiting=2))
    assert (one.foreign_requests, one.speed) == (5, before)
    it.set_load(one, Load(num_running=1, tpot_s=0.5))
    it.tick()
    assert one.speed.tpot_base_s > before.tpot_base_s
