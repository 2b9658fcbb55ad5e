"""Shapes and keys."""

from __future__ import annotations

import pytest

from xllm_plugin.graph.mode import BatchShape, Decision, GraphKey, GraphMode, Reason


def test_an_empty_batch_has_no_shape() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        BatchShape(0, is_decode=True)


def test_padding_is_what_a_fixed_graph_computes_for_nothing() -> None:
    fixed, dynamic = (GraphKey(GraphMode.FULL, 8, is_dynamic=d) for d in (False, True))
    assert [fixed.padding(n) for n in (5, 8, 9)] == [3, 0, -1]
    assert [dynamic.padding(n) for n in (5, 8, 9)] == [0, 0, -1]


def test_a_decision_names_its_mode() -> None:
    assert Decision(None, Reason.TOO_RARE).mode is GraphMode.EAGER
    assert Decision(GraphKey(GraphMode.PARTIAL, 8), Reason.READY).mode is GraphMode.PARTIAL
