"""Buckets are the best there are for the sizes seen."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.graph.buckets import NUM_SIZES, learn_buckets, wasted_tokens

WEIGHTS = st.dictionaries(st.integers(1, 64), st.integers(1, 50).map(float), max_size=7)
PADDINGS = st.sampled_from([0.0, 0.1, 0.25, 0.5])


def test_few_buckets_go_where_the_traffic_is() -> None:
    weights = {1: 100.0, 7: 5.0, 8: 50.0, 30: 1.0, 32: 40.0}
    assert learn_buckets(weights, 3, 0.25) == (1, 8, 32)
    assert learn_buckets(weights, 1, 0.25) == (32,)
    assert learn_buckets(weights, 9, 0.25) == (1, 7, 8, 30, 32)


def test_no_padding_allowed_means_exact_sizes() -> None:
    assert learn_buckets({3: 1.0, 4: 1.0}, 1, 0.0) == (4,)
    assert learn_buckets({3: 1.0, 4: 1.0}, 1, 0.25) == (4,)
    assert wasted_tokens({3: 1.0}, (4,), 0.0) == 3.0
    assert wasted_tokens({3: 1.0}, (4,), 0.25) == 1.0


def test_nothing_seen_needs_nothing() -> None:
    assert learn_buckets({}, 4, 0.25) == ()


@given(WEIGHTS, st.integers(1, 4), PADDINGS)
def test_no_other_choice_wastes_less(
    weights: dict[int, float], max_buckets: int, max_padding: float
) -> None:
    found = learn_buckets(weights, max_buckets, max_padding)
    assert len(found) <= max_buckets
    assert list(found) == sorted(set(found))
    assert set(found) <= weights.keys()
    others = (
        wasted_tokens(weights, buckets, max_padding)
        for number in range(max_buckets + 1)
        for buckets in combinations(sorted(weights), number)
    )
    assert wasted_tokens(weights, found, max_padding) == pytest.approx(min(others))


def test_many_sizes_are_cut_to_the_heaviest() -> None:
    weights = dict.fromkeys(range(1, 400), 1.0) | {1000 + size: 9.0 for size in range(NUM_SIZES)}
    assert min(learn_buckets(weights, 4, 0.25)) >= 1000
