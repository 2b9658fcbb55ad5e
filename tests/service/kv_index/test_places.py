"""From groups of caches to tokens by instance: the mean of the ranks, however it is said."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.cached import CachedTokens
from xllm_plugin.service.kv_index.index import Cache, Held, Holders
from xllm_plugin.service.kv_index.places import Places


def weigh(held: Held, size: int) -> float:
    return (held.device + 0.5 * held.host) * size


@given(seed=st.integers(0, 2**32), count=st.integers(1, 60), has_ranks=st.booleans())
def test_each_instance_has_the_mean_of_its_ranks(seed: int, count: int, has_ranks: bool) -> None:
    draw = random.Random(seed)
    caches: dict[str, list[Cache]] = {}
    bits = iter(draw.sample(range(200), 200))
    for number in range(count):
        num_ranks = draw.choice((0, 1, 2)) if has_ranks else draw.choice((0, 1, 1, 1, 1, 1))
        caches[f"i{number}"] = [Cache(1 << next(bits)) for _ in range(num_ranks)]
    known = [cache.bit for own in caches.values() for cache in own]
    foreign = [1 << next(bits) for _ in range(3)]  # of instances that are no candidates
    kinds = [Held(4), Held(4), Held(4), Held(2, 1), Held(0, 3), Held()]
    held = {bit: draw.choice(kinds) for bit in (*known, *foreign)}
    groups: dict[Held, int] = {}
    for bit, one in held.items():
        groups[one] = groups.get(one, 0) | bit
    found = [Holders(mask, one, 16) for one, mask in groups.items() if sum(one)]
    cached = Places(list(caches.items())).cached(found, weigh)
    for name, own in caches.items():
        tokens = [weigh(held[cache.bit], 16) for cache in own]
        assert cached.get(name, 0.0) == (sum(tokens) / len(tokens) if tokens else 0.0)
    assert set(cached) <= set(caches)


def test_what_all_hold_is_said_once() -> None:
    caches = [(f"i{number}", [Cache(1 << number)]) for number in range(40)]
    everybody = (1 << 40) - 1
    places = Places([*caches, ("none", [])])
    found = [Holders(everybody & ~0b111, Held(1), 16), Holders(0b011, Held(9), 16)]
    cached = places.cached(found, weigh)
    assert isinstance(cached, CachedTokens)
    assert cached.usual == 16
    assert cached.others == {"none": 0.0, "i0": 144.0, "i1": 144.0, "i2": 0.0}
    few = places.cached([Holders(0b111, Held(1), 16)], weigh)
    assert few == {"i0": 16.0, "i1": 16.0, "i2": 16.0}
    assert places.cached([Holders(everybody, Held(0, 0, 5), 16)], weigh) == {}
