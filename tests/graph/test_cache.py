"""The cache of graphs, on a fake device with faults on demand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xllm_plugin.errors import InternalError
from xllm_plugin.graph.cache import GraphCache
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.graph.mode import BatchShape, GraphKey, GraphMode, Reason
from xllm_plugin.testing.fakes import FakeGraphBackend

FULL, PARTIAL = GraphMode.FULL, GraphMode.PARTIAL


class Device:
    """A fake device whose graph for n tokens doubles the n numbers in its input."""

    def __init__(self, **limits: Any) -> None:
        self.backend = FakeGraphBackend(**limits)
        self.inputs: dict[GraphKey, list[int]] = {}
        self.broken: set[GraphKey] = set()

    def work(self, key: GraphKey) -> Callable[[], list[int]]:
        source = self.inputs[key] = [0] * key.num_tokens

        def run() -> list[int]:
            if key in self.broken:
                raise RuntimeError("the kernel has no such shape")
            output = [0] * key.num_tokens

            def double() -> None:
                output[:] = [2 * number for number in source]

            self.backend.launch(double)
            return output

        return run


def make(device: Device, *, dynamic: bool = False, **config: Any) -> GraphCache:
    settings = {"min_uses": 4, "replan_steps": 8, "memory_bytes": 4096} | config
    modes = frozenset({FULL, PARTIAL})
    return GraphCache(device.backend, modes, GraphConfig(**settings), dynamic=dynamic)


def show(cache: GraphCache, num_tokens: int, times: int = 1) -> Reason:
    for _ in range(times):
        decision = cache.decide(BatchShape(num_tokens, is_decode=True))
    return decision.reason


def test_a_shape_gets_a_graph_once_it_is_frequent() -> None:
    device = Device()
    cache = make(device)
    assert show(cache, 3, times=3) is Reason.TOO_RARE
    assert cache.maintain(device.work) is None
    show(cache, 3)
    assert show(cache, 3) is Reason.NOT_CAPTURED
    assert cache.maintain(device.work) == GraphKey(FULL, 3)
    decision = cache.decide(BatchShape(3, is_decode=True))
    assert decision.key is not None
    device.inputs[decision.key][:] = [1, 2, 3]
    assert cache.replay(decision.key) == [2, 4, 6]


def test_one_dynamic_graph_serves_every_size() -> None:
    device = Device()
    cache = make(device, dynamic=True, max_tokens=64)
    for num_tokens in (1, 2, 3, 4):
        show(cache, num_tokens)
    assert cache.maintain(device.work) == GraphKey(FULL, 64, is_dynamic=True)
    assert show(cache, 37) is Reason.READY
    assert cache.statistics().num_padding_tokens == 0


def test_a_failed_capture_is_logged_once_with_its_shape_and_eager_serves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = Device()
    device.broken.add(GraphKey(FULL, 3))
    cache = make(device)
    with caplog.at_level(logging.ERROR, logger="vllm.xllm_plugin"):
        for _ in range(5):
            reason = show(cache, 3, times=8)
            cache.maintain(device.work)
    assert reason is Reason.FAILED
    (record,) = caplog.records
    assert "no full graph for 3 tokens" in record.message
    cache.check_integrity()


def test_a_device_without_memory_is_asked_again_after_the_next_plan() -> None:
    device = Device()
    device.backend.fail_capture()
    cache = make(device)
    show(cache, 3, times=4)
    assert cache.maintain(device.work) is None
    assert show(cache, 3) is Reason.OVER_BUDGET
    assert cache.maintain(device.work) is None
    show(cache, 3, times=8)
    assert cache.maintain(device.work) == GraphKey(FULL, 3)


def test_traffic_that_moves_takes_the_graphs_with_it() -> None:
    device = Device()
    cache = make(device, memory_bytes=2048, max_padding=0)
    for num_tokens in (10, 20, 30):
        for _ in range(40):
            show(cache, num_tokens)
            cache.maintain(device.work)
            cache.check_integrity()
    held = cache.statistics().held_bytes
    assert GraphKey(FULL, 30) in held
    assert len(held) == 2
    assert cache.statistics().num_evictions == 1


def test_a_graph_that_turns_out_too_large_is_given_back() -> None:
    device = Device(graph_bytes=5000)
    cache = make(device)
    show(cache, 3, times=4)
    assert cache.maintain(device.work) is None
    assert show(cache, 3) is Reason.OVER_BUDGET
    cache.check_integrity()


def test_decode_and_mixed_batches_get_graphs_of_their_own() -> None:
    device = Device()
    cache = make(device)
    for _ in range(20):
        show(cache, 3)
        cache.decide(BatchShape(9, is_decode=False))
    captured = {cache.maintain(device.work) for _ in range(2)}
    assert captured == {GraphKey(FULL, 3), GraphKey(PARTIAL, 9)}


def test_graphs_are_dropped_before_weights_move() -> None:
    device = Device()
    cache = make(device)
    show(cache, 3, times=4)
    cache.maintain(device.work)
    cache.drop_all()
    assert device.backend.memory_used_bytes() == 0
    assert show(cache, 3) is Reason.NOT_CAPTURED
    with pytest.raises(InternalError, match="not held"):
        cache.replay(GraphKey(FULL, 3))
    cache.check_integrity()


class CacheMachine(RuleBasedStateMachine):
    """Any traffic, captures and faults in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.device = Device(capacity_bytes=5 * 1024)
        self.cache = make(self.device, max_graphs=3, max_tokens=40)

    @rule(num_tokens=st.integers(1, 50), is_decode=st.booleans(), times=st.integers(1, 9))
    def batches(self, num_tokens: int, is_decode: bool, times: int) -> None:
        for _ in range(times):
            shape = BatchShape(num_tokens, is_decode)
            key = self.cache.decide(shape).key
            if key is None:
                continue
            assert num_tokens <= key.num_tokens
            self.device.inputs[key][:] = range(key.num_tokens)
            assert self.cache.replay(key) == [2 * n for n in range(key.num_tokens)]

    @rule()
    def maintain(self) -> None:
        captured = self.cache.maintain(self.device.work)
        assert captured is None or captured in self.cache.statistics().held_bytes

    @rule(at=st.integers(1, 2))
    def out_of_memory_soon(self, at: int) -> None:
        self.device.backend.fail_capture(at)

    @rule(key=st.builds(GraphKey, st.sampled_from([FULL, PARTIAL]), st.integers(1, 40)))
    def break_a_kernel(self, key: GraphKey) -> None:
        self.device.broken.add(key)

    @precondition(lambda self: self.cache.statistics().held_bytes)
    @rule()
    def drop_all(self) -> None:
        self.cache.drop_all()

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()
        held = self.cache.statistics().held_bytes
        assert sum(held.values()) == self.device.backend.memory_used_bytes()


TestCacheMachine = CacheMachine.TestCase
