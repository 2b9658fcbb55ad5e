"""A step computes with the adapters of its most urgent requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.scheduler.adapters import NO_ADAPTER, adapters_to_run

CLAIMS = st.lists(st.tuples(st.integers(0, 5), st.tuples(st.booleans(), st.floats(-9, 9))))


def test_the_most_urgent_request_decides_for_its_adapter() -> None:
    claims = [(1, (False, 5.0)), (2, (False, 3.0)), (1, (False, 1.0)), (3, (False, 4.0))]
    assert adapters_to_run(claims, 2, is_base_apart=False) == {NO_ADAPTER, 1, 2}
    assert adapters_to_run(claims, 9, is_base_apart=False) == {NO_ADAPTER, 1, 2, 3}


def test_somebody_who_waits_goes_before_nobody() -> None:
    claims = [(1, (True, -100.0)), (2, (False, 50.0))]
    assert adapters_to_run(claims, 1, is_base_apart=False) == {NO_ADAPTER, 2}


def test_the_base_model_runs_apart_where_it_has_to() -> None:
    claims = [(1, (False, 5.0)), (NO_ADAPTER, (False, 3.0)), (2, (False, 4.0))]
    assert adapters_to_run(claims, 2, is_base_apart=True) == {NO_ADAPTER}
    claims = [(1, (False, 5.0)), (NO_ADAPTER, (False, 4.5)), (2, (False, 4.0))]
    assert adapters_to_run(claims, 2, is_base_apart=True) == {1, 2}


@given(claims=CLAIMS, most=st.integers(1, 4), is_base_apart=st.booleans())
def test_the_most_urgent_of_all_runs_and_there_is_room_for_who_does(
    claims: list[tuple[int, tuple[bool, float]]], most: int, *, is_base_apart: bool
) -> None:
    chosen = adapters_to_run(claims, most, is_base_apart=is_base_apart)
    assert len(chosen - {NO_ADAPTER}) <= most
    if is_base_apart:
        assert NO_ADAPTER not in chosen or len(chosen) == 1
    else:
        assert NO_ADAPTER in chosen
    asked = {adapter for adapter, _ in claims}
    assert chosen <= asked | {NO_ADAPTER}
    if claims:
        assert min(claims, key=lambda claim: (claim[1], claim[0]))[0] in chosen
