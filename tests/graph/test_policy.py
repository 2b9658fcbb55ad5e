"""The choices, as pure functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.graph.mode import BatchShape, Decision, GraphKey, GraphMode, Reason
from xllm_plugin.graph.policy import GraphView, choose, evictions

FULL, PARTIAL = GraphMode.FULL, GraphMode.PARTIAL
VIEW = GraphView(frozenset({FULL, PARTIAL}), max_tokens=512, max_padding=0.25)
KEYS = st.builds(GraphKey, st.sampled_from([FULL, PARTIAL]), st.integers(1, 64), st.booleans())
VIEWS = st.builds(
    GraphView,
    st.frozensets(st.sampled_from([FULL, PARTIAL])),
    st.integers(1, 64),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.frozensets(KEYS),
    st.frozensets(KEYS),
    st.dictionaries(KEYS, st.sampled_from([Reason.OVER_BUDGET, Reason.FAILED])),
)
SHAPES = st.builds(BatchShape, st.integers(1, 80), st.booleans())


def decode(num_tokens: int) -> BatchShape:
    return BatchShape(num_tokens, is_decode=True)


def mixed(num_tokens: int) -> BatchShape:
    return BatchShape(num_tokens, is_decode=False)


def test_the_graph_with_least_padding_is_taken() -> None:
    keys = frozenset(GraphKey(FULL, n) for n in (8, 9, 10))
    assert choose(decode(8), replace(VIEW, ready=keys)).key == GraphKey(FULL, 8)
    assert choose(decode(9), replace(VIEW, ready=keys)).key == GraphKey(FULL, 9)


def test_a_full_graph_is_for_decode_alone() -> None:
    view = replace(VIEW, ready=frozenset({GraphKey(FULL, 8), GraphKey(PARTIAL, 8)}))
    assert choose(decode(8), view).mode is FULL
    assert choose(mixed(8), view).mode is PARTIAL


def test_a_partial_graph_serves_decode_until_a_full_one_is_there() -> None:
    view = replace(VIEW, ready=frozenset({GraphKey(PARTIAL, 8)}))
    assert choose(decode(8), view) == Decision(GraphKey(PARTIAL, 8), Reason.READY)


def test_a_dynamic_graph_needs_no_padding() -> None:
    key = GraphKey(FULL, 512, is_dynamic=True)
    assert choose(decode(3), replace(VIEW, ready=frozenset({key}))).key == key


@pytest.mark.parametrize(
    ("shape", "view", "reason"),
    [
        (decode(8), replace(VIEW, modes=frozenset()), Reason.UNSUPPORTED),
        (mixed(8), replace(VIEW, modes=frozenset({FULL})), Reason.UNSUPPORTED),
        (decode(513), VIEW, Reason.TOO_LARGE),
        (decode(8), VIEW, Reason.TOO_RARE),
        (decode(5), replace(VIEW, ready=frozenset({GraphKey(FULL, 8)})), Reason.TOO_RARE),
        (decode(8), replace(VIEW, wanted=frozenset({GraphKey(FULL, 8)})), Reason.NOT_CAPTURED),
        (
            decode(8),
            replace(
                VIEW,
                wanted=frozenset({GraphKey(FULL, 8)}),
                refused={GraphKey(FULL, 8): Reason.FAILED},
            ),
            Reason.FAILED,
        ),
    ],
)
def test_eager_says_why(shape: BatchShape, view: GraphView, reason: Reason) -> None:
    assert choose(shape, view) == Decision(None, reason)


@given(SHAPES, VIEWS)
def test_whatever_is_chosen_can_run_the_batch(shape: BatchShape, view: GraphView) -> None:
    decision = choose(shape, view)
    key = decision.key
    assert (key is None) == (decision.reason is not Reason.READY)
    if key is None:
        return
    assert key in view.ready
    assert key.mode in view.modes
    assert shape.is_decode or key.mode is PARTIAL
    assert shape.num_tokens <= min(key.num_tokens, view.max_tokens)
    padding = key.padding(shape.num_tokens)
    assert 0 <= padding <= view.max_padding * (shape.num_tokens + padding)


@given(SHAPES, VIEWS, KEYS)
def test_another_ready_graph_never_makes_a_batch_eager(
    shape: BatchShape, view: GraphView, key: GraphKey
) -> None:
    more = replace(view, ready=view.ready | {key})
    assert choose(shape, view).key is None or choose(shape, more).key is not None


def graph(num_tokens: int) -> GraphKey:
    return GraphKey(FULL, num_tokens)


HELD = {graph(1): 100, graph(2): 100, graph(3): 50}
USES = {graph(1): 10.0, graph(2): 1.0, graph(3): 20.0, graph(4): 100.0, graph(5): 1.5}


def held_evictions(
    candidate: GraphKey, num_bytes: int, budget_bytes: int, max_graphs: int = 9
) -> tuple[GraphKey, ...] | None:
    return evictions(
        candidate,
        num_bytes,
        held_bytes=HELD,
        uses=USES,
        budget_bytes=budget_bytes,
        max_graphs=max_graphs,
    )


def test_what_is_worth_least_for_each_byte_goes_first() -> None:
    assert held_evictions(graph(4), 100, 350) == ()
    assert held_evictions(graph(4), 100, 300) == (graph(2),)
    assert held_evictions(graph(4), 100, 200) == (graph(2), graph(1))


def test_a_limit_on_graphs_is_kept_too() -> None:
    assert held_evictions(graph(4), 1, 1000, max_graphs=3) == (graph(2),)


def test_graphs_of_about_the_same_worth_do_not_take_turns() -> None:
    assert held_evictions(graph(5), 100, 300) is None


def test_a_graph_larger_than_the_budget_displaces_nothing() -> None:
    assert held_evictions(graph(4), 301, 300) is None


@given(
    st.dictionaries(KEYS, st.integers(0, 100)),
    st.dictionaries(KEYS, st.integers(0, 100).map(float)),
    st.integers(0, 120),
    st.integers(0, 400),
    st.integers(1, 5),
)
def test_after_the_evictions_the_candidate_fits(
    held: dict[GraphKey, int],
    uses: dict[GraphKey, float],
    num_bytes: int,
    budget_bytes: int,
    max_graphs: int,
) -> None:
    candidate = GraphKey(FULL, 1000)
    dropped = evictions(
        candidate,
        num_bytes,
        held_bytes=held,
        uses=uses,
        budget_bytes=budget_bytes,
        max_graphs=max_graphs,
    )
    if dropped is None:
        return
    left = {key: size for key, size in held.items() if key not in dropped}
    assert len(left) == len(held) - len(dropped)
    assert sum(left.values()) + num_bytes <= budget_bytes
    assert len(left) < max_graphs
