"""One simulated instance: known times, its cache, its books."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.bench.fleet_simulator.engine import Engine, Job
from xllm_plugin.bench.fleet_simulator.profile import StepProfile
from xllm_plugin.errors import InternalError

MakeProfile = Callable[..., StepProfile]
BLOCK = 10


def drain(engine: Engine) -> tuple[list[float], list[Job], list[Job]]:
    """Run to the end; durations of steps, and jobs by first and by last token."""
    durations, first, done = [], [], []
    while engine.is_busy:
        durations.append(engine.begin())
        outcome = engine.end()
        first += outcome.first
        done += outcome.done
        engine.check_integrity()
    return durations, first, done


def job(number: int, blocks: Sequence[int], output: int = 1, prompt: int | None = None) -> Job:
    return Job(number, tuple(blocks), prompt or len(blocks) * BLOCK, output)


def test_one_request_takes_its_prompt_and_a_step_a_token(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(), BLOCK)
    engine.add(job(0, range(10), output=3))
    durations, first, done = drain(engine)
    assert durations == pytest.approx([0.110, 0.010, 0.010])
    assert first == done
    assert engine.used_tokens == 0
    assert engine.cached_blocks == 10
    assert engine.busy_s == pytest.approx(0.130)


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(max_step_tokens=100, ms_per_pair=1e-3, ms_per_decode=5), BLOCK)
    engine.add(job(0, range(1), output=10))
    engine.begin()
    engine.end()
    engine.add(job(1, range(1, 26)))
    # 99 tokens a step beside the one that decodes
    assert engine.begin() == pytest.approx(0.010 + 0.099 + 99 * 50 * 1e-6 + 0.005)
    engine.end()
    assert engine.begin() == pytest.approx(0.010 + 0.099 + 99 * (99 + 50) * 1e-6 + 0.005)


def test_a_prefix_is_computed_once_and_its_last_token_again(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(), BLOCK)
    engine.add(job(0, [1, 2, 3]))
    drain(engine)
    same, longer, other = job(1, [1, 2, 3]), job(2, [1, 2, 3, 4]), job(3, [9, 12, 13])
    for one in (same, longer, other):
        engine.add(one)
        drain(engine)
    assert [one.cached_tokens for one in (same, longer, other)] == [20, 30, 0]
    assert engine.computed_tokens == 30 + 10 + 10 + 30


def test_requests_of_one_step_share_what_it_computes(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(), BLOCK)
    jobs = [job(number, [1, 2, 3, 10 + number]) for number in range(3)]
    for one in jobs:
        engine.add(one)
    durations, _, _ = drain(engine)
    assert durations == pytest.approx([0.010 + 0.060])
    assert [one.cached_tokens for one in jobs] == [0, 30, 30]


def test_what_was_used_last_stays_and_a_chain_loses_its_end_first(
    make_profile: MakeProfile,
) -> None:
    engine = Engine(make_profile(kv_tokens=60), BLOCK)
    for number, blocks in enumerate(([1, 2], [3, 4], [1, 2], [5, 6, 7])):
        engine.add(job(number, blocks, prompt=len(blocks) * BLOCK))
        drain(engine)
    engine.add(job(4, [3, 4, 8], prompt=25))
    engine.begin()
    outcome = engine.end()
    assert outcome.removed == [2, 1]  # block 4 went before
    assert outcome.done[0].cached_tokens == 10


def test_the_last_that_joined_is_preempted_and_still_finishes(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(kv_tokens=100), BLOCK)
    jobs = [job(0, [1, 2], output=60), job(1, [3, 4], output=60)]
    for one in jobs:
        engine.add(one)
    _, first, done = drain(engine)
    assert [one.num_preemptions > 0 for one in jobs] == [False, True]
    assert first == done == jobs


def test_a_request_that_never_fits_is_our_bug(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(kv_tokens=10), BLOCK)
    engine.add(job(0, [1, 2]))
    with pytest.raises(InternalError, match="too small"):
        engine.begin()


def test_a_heartbeat_says_what_runs_and_how_fast_since_the_last(make_profile: MakeProfile) -> None:
    engine = Engine(make_profile(max_requests=1), BLOCK, slowness=2.0)
    engine.add(job(0, [1], output=5))
    engine.add(job(1, [2]))
    engine.begin()
    engine.end()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.tpot_s) == (1, 1, None)
    engine.begin()
    engine.end()
    assert engine.load().tpot_s == pytest.approx(0.020)
    assert engine.load().tpot_s is None


@st.composite
def _jobs(draw: st.DrawFn) -> list[tuple[int, Job]]:
    """Jobs whose prompts begin as one of three; each comes after so many steps."""
    found = []
    for number in range(draw(st.integers(1, 25))):
        root = draw(st.integers(0, 2)) * 1000
        shared = draw(st.integers(0, 6))
        own = draw(st.integers(0, 3))
        blocks = [root + depth for depth in range(shared)]
        blocks += [100_000 + number * 10 + depth for depth in range(own)]
        prompt = max(1, len(blocks) * BLOCK - draw(st.integers(0, BLOCK - 1)))
        after = draw(st.integers(0, 40))
        found.append((after, Job(number, tuple(blocks), prompt, draw(st.integers(1, 40)))))
    return sorted(found, key=lambda one: one[0])


@settings(deadline=None, max_examples=60)
@given(jobs=_jobs(), kv_tokens=st.integers(140, 400), step_tokens=st.integers(20, 200))
def test_every_job_ends_once_and_events_tell_what_is_cached(
    make_profile: MakeProfile, jobs: list[tuple[int, Job]], kv_tokens: int, step_tokens: int
) -> None:
    profile = make_profile(kv_tokens=kv_tokens, max_step_tokens=step_tokens, max_requests=20)
    engine = Engine(profile, BLOCK)
    known: set[int] = set()
    first, done = [], []
    step, queue = 0, list(jobs)
    while queue or engine.is_busy:
        while queue and (queue[0][0] <= step or not engine.is_busy):
            engine.add(queue.pop(0)[1])
        engine.begin()
        outcome = engine.end()
        engine.check_integrity()
        step += 1
        first += outcome.first
        done += outcome.done
        known -= set(outcome.removed)
        for stored in outcome.stored:
            assert stored.parent is None or stored.parent in known
            assert not known & set(stored.blocks)
            known |= set(stored.blocks)
        assert len(known) == engine.cached_blocks
    assert sorted(one.number for one in done) == list(range(len(jobs)))
    assert sorted(one.number for one in first) == list(range(len(jobs)))
    assert engine.used_tokens == 0


def test_many_random_jobs_leave_the_books_even(make_profile: MakeProfile) -> None:
    draw = random.Random(5)
    engine = Engine(make_profile(kv_tokens=600, max_step_tokens=120), BLOCK)
    for number in range(400):
        root = draw.randrange(8)
        depth = draw.randrange(1, 12)
        engine.add(job(number, [root * 100 + n for n in range(depth)], draw.randrange(1, 50)))
    _, first, done = drain(engine)
    assert len(first) == len(done) == 400
