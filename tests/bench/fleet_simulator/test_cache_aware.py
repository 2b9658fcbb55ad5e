"""The peer's policy does what its description says, step by step."""

from __future__ import annotations

from xllm_plugin.bench.fleet_simulator.cache_aware import CacheAware, CacheAwareSettings
from xllm_plugin.service.decision import Asked
from xllm_plugin.testing.fake_view import FakeView

DEFAULTS = CacheAwareSettings()


def chooser(
    *prompts: tuple[int, ...], settings: CacheAwareSettings = DEFAULTS
) -> tuple[CacheAware, list[Asked]]:
    """A policy, and the requests with these prompts of blocks of 10 tokens."""
    asked = [Asked(n, 0, "", 0, 10 * len(one), 1, {}) for n, one in enumerate(prompts)]
    return CacheAware(prompts.__getitem__, 10, settings), asked


def test_a_prompt_goes_where_its_prefix_went_last() -> None:
    it, asked = chooser((1, 2, 3), (1, 2, 4), (7, 8))
    there = [FakeView("a", in_flight=5), FakeView("b", in_flight=3), FakeView("c", in_flight=4)]
    assert it.choose(asked[0], there).index == 1
    there[1].in_flight = 60
    assert it.choose(asked[1], there).index == 1  # not imbalanced by more than 64
    assert it.choose(asked[2], there).index == 2


def test_a_short_match_goes_to_the_shortest_queue() -> None:
    it, asked = chooser((1, 2, 3, 4), (1, 5, 6, 7), (1, 2, 8, 9))
    there = [FakeView("a"), FakeView("b", in_flight=1)]
    it.choose(asked[0], there)
    there[0].in_flight = 9
    assert it.choose(asked[1], there).index == 1  # 25 % are not more than 30
    assert it.choose(asked[2], there).index == 0  # 50 % are


def test_imbalance_needs_both_thresholds() -> None:
    it, asked = chooser((1, 2), (1, 2), (1, 2), (1, 2))
    there = [FakeView("a"), FakeView("b", in_flight=1)]
    it.choose(asked[0], there)
    there[0].in_flight, there[1].in_flight = 150, 101
    assert it.choose(asked[1], there).index == 0
    there[0].in_flight, there[1].in_flight = 166, 101
    assert it.choose(asked[2], there).index == 1
    there[0].in_flight, there[1].in_flight = 0, 0
    assert it.choose(asked[3], there).index == 1  # learned while imbalanced too


def test_what_is_old_is_forgotten() -> None:
    settings = CacheAwareSettings(max_tree_tokens=30)
    it, asked = chooser((1, 2), (3, 4), (1, 2), settings=settings)
    there = [FakeView("a"), FakeView("b", in_flight=1)]
    it.choose(asked[0], there)
    it.choose(asked[1], there)  # the end of the first prompt goes
    there[0].in_flight = 2
    assert it.choose(asked[2], there).index == 0  # half of it is still known
    assert it._match((1, 2))[0] == 2


def test_an_instance_that_has_gone_is_not_chosen() -> None:
    it, asked = chooser((1, 2), (1, 2))
    it.choose(asked[0], [FakeView("gone")])
    assert it.choose(asked[1], [FakeView("a", in_flight=1), FakeView("b")]).index == 1
