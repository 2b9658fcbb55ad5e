"""Counters in shared memory: every sum is what was counted, whoever looks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.service.processes.shared import MAX_INSTANCES, MAX_KEYS, SharedMemory

NUM_WORKERS = 3
SLOTS = st.sampled_from([0, 1, 7])
WORDS = st.integers(0, 4)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    made = SharedMemory(NUM_WORKERS)
    yield made
    made.close()


def opened(memory: SharedMemory, writer: int) -> SharedMemory:
    """As a worker opens it."""
    return SharedMemory(NUM_WORKERS, descriptor=memory.descriptor, writer=writer)


@settings(max_examples=40, deadline=None)
@given(
    counted=st.lists(
        st.tuples(st.integers(0, NUM_WORKERS - 1), SLOTS, WORDS, st.integers(-(2**40), 2**40))
    ),
    dead=st.integers(0, NUM_WORKERS - 1),
)
def test_a_total_is_the_sum_of_what_the_living_have_counted(
    counted: list[tuple[int, int, int, int]], dead: int
) -> None:
    memory = SharedMemory(NUM_WORKERS)
    workers = [opened(memory, writer) for writer in range(NUM_WORKERS)]
    sums: dict[tuple[int, int, int], int] = {}
    for writer, slot, word, amount in counted:
        workers[writer].instances.add(slot, word, amount)
        sums[writer, slot, word] = sums.get((writer, slot, word), 0) + amount
    memory.instances.clear(dead, (0, 1), 8)
    for slot in (0, 1, 7):
        for word in range(5):
            kept = [sums.get((writer, slot, word), 0) for writer in range(NUM_WORKERS)]
            if word < 2:
                kept[dead] = 0
            assert memory.instances.total(slot, word) == sum(kept)
            assert workers[2].instances.own(slot, word) == kept[2]
            assert workers[0].instances.totals(word, slot + 1)[slot] == sum(kept)
            assert memory.instances.is_idle(slot, (word,)) == (not any(kept))
    memory.close()


def test_keys_and_instances_lie_apart(memory: SharedMemory) -> None:
    one = opened(memory, 1)
    one.instances.add(MAX_INSTANCES - 1, 7, 5)
    one.keys.add(0, 0, 6)
    one.keys.add(MAX_KEYS - 1, 7, 8)
    assert memory.instances.total(MAX_INSTANCES - 1, 7) == 5
    assert memory.instances.total(0, 0) == 0
    assert memory.keys.total(0, 0) == 6
    assert memory.keys.total(MAX_KEYS - 1, 7) == 8


def test_lines_of_two_workers_share_no_cache_line(memory: SharedMemory) -> None:
    """Each slot of each row begins a cache line: no writer slows another one."""
    starts = {(row + slot * 8) * 8 for row in memory.instances._starts for slot in range(3)}
    assert len(starts) == 3 * NUM_WORKERS
    assert all(start % 64 == 0 for start in starts)
