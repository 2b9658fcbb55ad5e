"""The search finds the last rung that meets the goal, in few measurements, and always ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.errors import ConfigError

GOAL = 0.9
LADDER = Ladder(lowest=1.0, ratio=2.0, rungs=7)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_finds_the_edge_of_what_falls(rungs: int, data: st.DataObject) -> None:
    ladder = Ladder(1.0, 1.2, rungs)
    edge = data.draw(st.integers(-1, rungs - 1), label="last rung that meets the goal")
    start = data.draw(st.integers(0, rungs - 1), label="start")
    asked: list[int] = []

    def measure(rung: int) -> float:
        asked.append(rung)
        return 1.0 if rung <= edge else 0.5

    found = ladder.search(measure, goal=GOAL, start=start, most=rungs)
    assert found is not None
    assert len(asked) == len(set(asked)) <= 2 * math.log2(abs(edge - start) + 2) + 3
    crossing = ladder.crossing(found, GOAL)
    assert crossing.is_met == (edge >= 0)
    assert crossing.is_limit == (edge < rungs - 1)
    if crossing.is_met and crossing.is_limit:
        assert ladder.value(edge) <= crossing.value <= ladder.value(edge + 1)


@settings(deadline=None)
@given(
    st.integers(1, 20),
    st.lists(st.sampled_from([0.5, 0.89, 0.9, 1.0]), min_size=20, max_size=20),
    st.integers(-5, 30),
    st.integers(1, 8),
    st.dictionaries(st.integers(0, 19), st.just(0.95), max_size=3),
)
def test_whatever_is_measured_it_ends(
    rungs: int, shares: list[float], start: int, most: int, known: dict[int, float]
) -> None:
    ladder = Ladder(1.0, 1.2, rungs)
    known = {rung: share for rung, share in known.items() if rung < rungs}
    asked: list[int] = []

    def measure(rung: int) -> float:
        asked.append(rung)
        return shares[rung]

    found = ladder.search(measure, goal=GOAL, start=start, most=most, known=known)
    assert found is not None
    assert len(asked) == len(set(asked)) <= most
    assert not set(asked) & set(known)
    assert all(0 <= rung < rungs for rung in asked)
    if found:
        crossing = ladder.crossing(found, GOAL)
        assert 0 <= crossing.value <= ladder.value(rungs - 1)


def test_a_search_without_time_has_no_result() -> None:
    assert LADDER.search(lambda _: None, goal=GOAL, start=3, most=5) is None


def test_interpolates_on_a_logarithmic_scale() -> None:
    crossing = LADDER.crossing({1: 0.95, 2: 0.85}, GOAL)  # 2 and 4
    assert crossing.value == pytest.approx(2 * math.sqrt(2))
    assert LADDER.crossing({1: 0.9, 2: 0.1}, GOAL).value == pytest.approx(2)


def test_luck_above_a_broken_rung_does_not_count() -> None:
    crossing = LADDER.crossing({1: 1.0, 2: 0.8, 3: 1.0}, GOAL)
    assert 2 < crossing.value < 4


def test_never_met_and_never_broken() -> None:
    never = LADDER.crossing({0: 0.1}, GOAL)
    assert (never.value, never.is_met, never.is_limit) == (0, False, True)
    always = LADDER.crossing({0: 1.0, 6: 0.95}, GOAL)
    assert (always.value, always.is_met, always.is_limit) == (64, True, False)
    with pytest.raises(ConfigError, match="no rung"):
        LADDER.crossing({}, GOAL)


def test_rungs_between_two_rates() -> None:
    ladder = Ladder.between(1, 64, 2)
    assert (ladder.rungs, ladder.value(6)) == (7, 64)
    assert [ladder.nearest(value) for value in (0.1, 1, 2.9, 100)] == [0, 0, 2, 6]
    assert Ladder.between(2, 2, 1.5).rungs == 1


@pytest.mark.parametrize(("lowest", "highest", "ratio"), [(0, 1, 2), (2, 1, 2), (1, 2, 1)])
def test_no_ladder(lowest: float, highest: float, ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        Ladder.between(lowest, highest, ratio)
    with pytest.raises(ConfigError, match="rung"):
        Ladder(1, 2, 0)
