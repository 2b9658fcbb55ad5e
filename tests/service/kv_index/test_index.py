"""The prefix index: against a plain model of what caches hold, and by the cases that matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from xllm_plugin.service.kv_index import index as index_module
from xllm_plugin.service.kv_index.index import (
    NO_EXTRA,
    Cache,
    Chains,
    Extra,
    Held,
    PrefixIndex,
    bits_of,
    packed,
    prompt_extra,
)
from xllm_plugin.service.kv_index.wire import AllBlocksCleared, BlockRemoved, BlockStored

SIZE = 4
PROMPT = list(range(40))


def stored(tokens: list[int], first: int = 0, **fields: Any) -> BlockStored:
    """Blocks `first` on of a prompt, under hashes that name their whole prefix, as vLLM's do."""
    hashes = [name(tokens[: (number + 1) * SIZE]) for number in range(len(tokens) // SIZE)]
    return BlockStored(
        block_hashes=hashes[first:],
        parent_block_hash=hashes[first - 1] if first else None,
        token_ids=tokens[first * SIZE : len(hashes) * SIZE],
        block_size=SIZE,
        **fields,
    )


def name(prefix: list[int]) -> bytes:
    return repr(prefix).encode()


def removed(tokens: list[int], *numbers: int, **fields: Any) -> BlockRemoved:
    hashes: list[bytes | int] = [name(tokens[: (number + 1) * SIZE]) for number in numbers]
    return BlockRemoved(block_hashes=hashes, **fields)


def match(
    index: PrefixIndex, tokens: bytes, extra: Extra = NO_EXTRA
) -> dict[Cache, tuple[Held, int]]:
    """What each cache holds, by tier, and its tokens a block."""
    return {
        index._caches[bit]: (one.held, one.block_size)
        for one in index.holders(tokens, extra)
        for bit in bits_of(one.caches)
    }


def held(index: PrefixIndex, cache: Cache, tokens: list[int], *extra: Any) -> Held:
    found = match(index, packed(tokens), prompt_extra(*extra))
    return found[cache][0] if cache in found else Held()


def test_each_cache_is_credited_with_what_it_holds_from_the_start_on() -> None:
    index = PrefixIndex()
    whole, half, other, hole = (index.add() for _ in range(4))
    index.apply(whole, stored(PROMPT))
    index.apply(half, stored(PROMPT[:20]))
    index.apply(other, stored([9, *PROMPT[1:]]))
    index.apply(hole, stored(PROMPT))
    index.apply(hole, removed(PROMPT, 0))  # evicted at its start: what follows is of no use
    longer = [*PROMPT, 1, 2, 3]
    assert held(index, whole, longer) == Held(10)
    assert held(index, half, longer) == Held(5)
    assert held(index, other, longer) == held(index, hole, longer) == Held()
    index.apply(hole, stored(PROMPT[:4]))
    assert held(index, hole, longer) == Held(10)
    index.check_integrity()


def test_the_last_token_is_always_computed() -> None:
    index = PrefixIndex()
    cache = index.add()
    index.apply(cache, stored(PROMPT))
    assert held(index, cache, PROMPT) == Held(9)
    assert held(index, cache, [*PROMPT, 1]) == Held(10)
    assert match(index, b"") == {}
    assert match(index, packed([1])) == {}


def test_a_chain_goes_on_from_its_parent_and_not_without_it() -> None:
    index = PrefixIndex()
    cache, late = index.add(), index.add()
    index.apply(cache, stored(PROMPT[:8]))
    index.apply(cache, stored(PROMPT, first=2))
    assert held(index, cache, [*PROMPT, 1]) == Held(10)
    index.apply(late, stored(PROMPT, first=2))
    assert held(index, late, [*PROMPT, 1]) == Held()
    assert late.num_orphans == 8


def test_a_block_that_was_computed_twice_is_there_until_both_are_gone() -> None:
    """vLLM announces each copy, and each removal."""
    index = PrefixIndex()
    cache = index.add()
    for _ in range(3):
        index.apply(cache, stored(PROMPT[:4]))
    for expected in (1, 1, 0):
        index.apply(cache, removed(PROMPT, 0))
        assert held(index, cache, PROMPT) == Held(expected)
    index.apply(cache, removed(PROMPT, 0))  # of something that is not known
    index.check_integrity()


def test_tiers_are_told_apart_and_join_to_one_prefix() -> None:
    index = PrefixIndex()
    cache = index.add()
    index.apply(cache, stored(PROMPT, medium="GPU"))
    index.apply(cache, stored(PROMPT[:24], medium="CPU"))
    index.apply(cache, stored(PROMPT[:8], medium="STORAGE"))
    index.apply(cache, removed(PROMPT, 0, 3, medium="GPU"))
    index.apply(cache, removed(PROMPT, 0, medium="CPU"))
    assert held(index, cache, [*PROMPT, 1]) == Held(8, 1, 1)
    index.apply(cache, AllBlocksCleared())  # of the device alone
    assert held(index, cache, [*PROMPT, 1]) == Held(0, 5, 1)
    index.apply(cache, removed(PROMPT, 0, medium="STORAGE"))
    assert held(index, cache, [*PROMPT, 1]) == Held()
    index.check_integrity()


def test_a_copy_may_be_announced_by_its_hash_alone() -> None:
    index = PrefixIndex()
    cache = index.add()
    index.apply(cache, stored(PROMPT[:8]))
    hashes = stored(PROMPT[:12]).block_hashes
    index.apply(cache, BlockStored(hashes, None, [], SIZE, medium="CPU"))
    index.apply(cache, AllBlocksCleared())
    assert held(index, cache, PROMPT) == Held(0, 2, 0)
    assert cache.num_orphans == 1


def test_adapters_salts_and_images_are_other_blocks() -> None:
    index = PrefixIndex()
    plain, lora, salted, both, image = (index.add() for _ in range(5))
    index.apply(plain, stored(PROMPT))
    index.apply(lora, stored(PROMPT, extra_keys=[["l"]] * 10, lora_name="l"))
    index.apply(salted, stored(PROMPT, extra_keys=[["s"], *[None] * 9]))
    index.apply(both, stored(PROMPT, extra_keys=[["l", "s"], *[["l"]] * 9], lora_name="l"))
    index.apply(image, stored(PROMPT, extra_keys=[None, None, [["hash", 3]], *[None] * 7]))
    asked = {plain: (), lora: ("l",), salted: (None, "s"), both: ("l", "s")}
    for one, extra in asked.items():
        for cache in asked:
            expected = Held(10) if cache is one else Held()
            assert held(index, cache, [*PROMPT, 1], *extra) == expected
    # What the service cannot know of an image ends the match before it.
    assert held(index, image, [*PROMPT, 1]) == Held(2)


def test_windows_are_no_prefixes() -> None:
    index = PrefixIndex()
    cache = index.add()
    index.apply(cache, stored(PROMPT, group_idx=0, kv_cache_spec_kind="full_attention"))
    index.apply(cache, stored(PROMPT, group_idx=1, kv_cache_spec_kind="sliding_window"))
    index.apply(cache, removed(PROMPT, 0, 1, group_idx=1))
    assert held(index, cache, [*PROMPT, 1]) == Held(10)
    index.apply(cache, removed(PROMPT, 0, group_idx=0))
    assert held(index, cache, [*PROMPT, 1]) == Held()


def test_block_sizes_and_kinds_of_hashes_may_differ() -> None:
    index = PrefixIndex()
    small, large = index.add(), index.add()
    index.apply(small, stored(PROMPT))
    index.apply(large, BlockStored([2**63, 7], None, PROMPT[:32], 16))
    found = match(index, packed([*PROMPT, 1]))
    assert found == {small: (Held(10), 4), large: (Held(2), 16)}
    index.apply(large, BlockRemoved([7]))
    assert match(index, packed(PROMPT))[large] == (Held(1), 16)


def test_what_is_malformed_is_not_placed() -> None:
    index = PrefixIndex()
    cache = index.add()
    index.apply(cache, BlockStored([b"a", b"b"], None, [1, 2, 3], 2))
    index.apply(cache, BlockStored([b"a"], None, [1], 0))
    assert (cache.num_orphans, len(index)) == (3, 0)
    for tokens in ([-1, 0], [2**32, 0]):
        with pytest.raises(OverflowError):
            index.apply(cache, BlockStored([b"a"], None, tokens, 2))


def test_a_cache_that_is_dropped_leaves_nothing() -> None:
    index = PrefixIndex()
    one, two = index.add(), index.add()
    index.apply(one, stored(PROMPT))
    index.apply(two, stored(PROMPT[:8], medium="CPU"))
    index.drop(one)
    assert held(index, two, PROMPT) == Held(0, 2)
    again = index.add()  # may take over the bit of the one before
    assert held(index, again, PROMPT) == Held()
    index.drop(two)
    assert len(index) == 0
    index.check_integrity()


@pytest.mark.parametrize("first_lacks", [(), (0,), (5,), (9,), (0, 9), range(10)])
@pytest.mark.parametrize("second_lacks", [(), (0,), (5,), (9,), range(1, 9), range(10)])
def test_a_prompt_that_is_asked_for_again_is_held_as_before(
    first_lacks: Iterable[int], second_lacks: Iterable[int]
) -> None:
    """Then all of its keys are known, and looked up together."""
    index = PrefixIndex(min_kept_tokens=SIZE)
    lacks = {index.add(): set(first_lacks), index.add(): set(second_lacks)}
    for cache, numbers in lacks.items():
        index.apply(cache, stored(PROMPT))
        index.apply(cache, removed(PROMPT, *numbers))
    expected = {cache.bit: min(numbers, default=10) for cache, numbers in lacks.items()}
    chains: Chains = {}
    for _ in range(2):
        found = index.holders(packed([*PROMPT, 1]), NO_EXTRA, chains)
        depths = {bit: one.held.device for one in found for bit in bits_of(one.caches)}
        assert depths == {bit: depth for bit, depth in expected.items() if depth}
    assert index.holders(packed([1]), NO_EXTRA, {}) == []


def test_sets_of_holders_that_have_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_MIN_MASKS", 8)
    index = PrefixIndex()
    caches = [index.add() for _ in range(10)]
    for number in range(2**10):
        for bit, cache in enumerate(caches):
            if number & ~(number - 1) & 1 << bit:
                index.apply(cache, stored(PROMPT))
            elif (number - 1) & ~number & 1 << bit:
                index.apply(cache, removed(PROMPT, *range(10)))
    assert len(index._masks) < 40
    masks = list(index._holders[0].values())
    assert all(mask is masks[0] for mask in masks), "equal ones are one object still"
    index.check_integrity()


class Caches(RuleBasedStateMachine):
    """Any events of three caches, against lists of blocks."""

    prompts = st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE).map(
        lambda tokens: tokens[: len(tokens) // SIZE * SIZE]
    )
    which = st.integers(0, 2)
    media = st.sampled_from(["GPU", "CPU", "STORAGE"])

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(min_kept_tokens=SIZE)
        self.chains: dict[tuple[int, ...], Chains] = {}
        self.caches = [self.index.add() for _ in range(3)]
        self.model: list[dict[tuple[str, bytes], int]] = [{}, {}, {}]

    @rule(which=which, tokens=prompts, medium=media)
    def store(self, which: int, tokens: list[int], medium: str) -> None:
        event = stored(tokens, medium=medium)
        self.index.apply(self.caches[which], event)
        for block_hash in event.block_hashes:
            assert isinstance(block_hash, bytes)
            key = (medium, block_hash)
            self.model[which][key] = self.model[which].get(key, 0) + 1

    @rule(which=which, tokens=prompts, medium=media, number=st.integers(0, 3))
    def remove(self, which: int, tokens: list[int], medium: str, number: int) -> None:
        event = removed(tokens, min(number, len(tokens) // SIZE - 1), medium=medium)
        self.index.apply(self.caches[which], event)
        key = (medium, event.block_hashes[0])
        if self.model[which].get(key, 0) > 1:  # type: ignore[call-overload]
            self.model[which][key] -= 1  # type: ignore[index]
        else:
            self.model[which].pop(key, None)  # type: ignore[call-overload]

    @rule(which=which)
    def clear(self, which: int) -> None:
        self.index.apply(self.caches[which], AllBlocksCleared())
        for key in [key for key in self.model[which] if key[0] == "GPU"]:
            del self.model[which][key]

    @rule(which=which)
    def restart(self, which: int) -> None:
        self.index.drop(self.caches[which])
        self.caches[which] = self.index.add()
        self.model[which].clear()

    @rule(tokens=prompts)
    def look(self, tokens: list[int]) -> None:
        found = match(self.index, packed([*tokens, 1]))
        chains = self.chains.setdefault(tuple(tokens), {})
        again = self.index.holders(packed([*tokens, 1]), NO_EXTRA, chains)
        assert again == self.index.holders(packed([*tokens, 1]))
        for cache, model in zip(self.caches, self.model, strict=True):
            counts = [0, 0, 0]
            for end in range(SIZE, len(tokens) + 1, SIZE):
                tiers = [
                    tier
                    for tier, medium in enumerate(("GPU", "CPU", "STORAGE"))
                    if (medium, name(tokens[:end])) in model
                ]
                if not tiers:
                    break
                counts[tiers[0]] += 1
            assert (found[cache][0] if cache in found else Held()) == Held(*counts)

    @invariant()
    def holds_together(self) -> None:
        self.index.check_integrity()


TestCaches: Any = Caches.TestCase
TestCaches.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
