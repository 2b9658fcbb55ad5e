"""The index: token blocks, chained from the start of a prompt, to the caches that hold them.

A block's key is the hash of its parent's key, its tokens and what else tells it apart, so one
lookup walks a prompt's chain in one dict.  Tokens come with the events; no hash function of vLLM is
needed, and instances that hash differently share one index.

Rule 1: a cache holds a prefix only as far as it holds *every* block from the first on.
Rule 2: an event that cannot be placed (its parent is not known) adds nothing: what is reported is
at most what is there.
Rule 3: stores and removals of one hash are counted: vLLM announces a block as often as it is there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from struct import iter_unpack
from typing import Any, Final, NamedTuple

from xllm_plugin.errors import InternalError
from xllm_plugin.service.kv_index.wire import (
    AllBlocksCleared,
    BlockHash,
    BlockRemoved,
    BlockStored,
    Event,
)

__all__ = [
    "NO_EXTRA",
    "Cache",
    "Chains",
    "Extra",
    "Held",
    "Holders",
    "PrefixIndex",
    "Tier",
    "bits_of",
    "packed",
    "prompt_extra",
]

_TOKEN_BYTES: Final = 4
_MIN_MASKS: Final = 1024
_BLOCKS_A_MASK: Final = 16
"""Unused sets of holders are looked for once there is one for so many blocks."""
_PREFIX_KINDS: Final = frozenset(
    {None, "full_attention", "mla_attention", "sink_full_attention", "unknown"}
)
"""Of cache groups whose blocks make up a prefix; windows and states keep only its end."""


class Tier(IntEnum):
    """Where a block lies, the fastest first."""

    DEVICE = 0
    HOST = 1
    DISK = 2


_TIERS: Final = {None: Tier.DEVICE, "GPU": Tier.DEVICE, "CPU": Tier.HOST}


class Held(NamedTuple):
    """How many blocks from a prompt's start on a cache holds, each counted in its fastest tier."""

    device: int = 0
    host: int = 0
    disk: int = 0


class Holders(NamedTuple):
    """Caches that hold equally much of a prompt."""

    caches: int
    """Mask of their bits."""
    held: Held
    block_size: int

    @property
    def num_tokens(self) -> int:
        """That each of them holds, in whatever tier."""
        return sum(self.held) * self.block_size


class Extra(NamedTuple):
    """What beside its tokens tells a prompt's blocks apart."""

    first: tuple[str, ...] = ()
    """In the first block."""
    later: tuple[str, ...] = ()
    """In all others."""


NO_EXTRA = Extra()

Chains = dict[int, list[int]]
"""Keys of a prompt's blocks by block size, some 56 bytes each."""


@dataclass(slots=True, eq=False)
class Cache:
    """One data-parallel rank's caches, as the index knows them."""

    bit: int
    held: tuple[dict[BlockHash, int], ...] = field(default_factory=lambda: ({}, {}, {}))
    """By tier: vLLM's hash -> our key."""
    repeats: tuple[dict[BlockHash, int], ...] = field(default_factory=lambda: ({}, {}, {}))
    """By tier: how often beyond once, where there is such."""
    other_groups: set[int] = field(default_factory=set)
    """Cache groups that are no prefixes."""
    num_orphans: int = 0
    """Blocks that could not be placed."""


class PrefixIndex:
    """All caches of all instances.

    Instances of different models share it: a request is only compared with those that can take it.

    Args:
        min_kept_tokens: keys of shorter blocks are made anew for each lookup: they would take more
            memory than the tokens.
    """

    def __init__(self, *, min_kept_tokens: int = 16) -> None:
        self._min_kept_tokens = min_kept_tokens
        self._holders: tuple[dict[int, int], ...] = ({}, {}, {})
        """By tier: key -> bit mask of the caches that hold it."""
        self._masks: dict[int, int] = {}
        """Equal masks are one object.  Some are of no use any more (`_one_of`)."""
        self._max_masks = _MIN_MASKS
        self._bits = 0
        self._caches: dict[int, Cache] = {}
        self._block_sizes: dict[int, int] = {}
        """Block size -> key that chains of it begin with."""

    def __len__(self) -> int:
        """Blocks known in any tier; one that lies in two counts twice."""
        return sum(map(len, self._holders))

    @property
    def is_empty(self) -> bool:
        """Whether no block is known."""
        return not any(self._holders)

    def add(self) -> Cache:
        """A new, empty cache."""
        bit = 1
        while self._bits & bit:
            bit <<= 1
        self._bits |= bit
        cache = self._caches[bit] = Cache(bit)
        return cache

    def drop(self, cache: Cache) -> None:
        """Forget a cache with all that it holds."""
        self.clear(cache)
        self._bits &= ~cache.bit
        del self._caches[cache.bit]
        self._masks.clear()

    def clear(self, cache: Cache, tiers: Iterable[Tier] = Tier) -> None:
        """Forget what a cache holds."""
        for tier in tiers:
            for key in set(cache.held[tier].values()):
                self._remove_holder(tier, key, cache)
            cache.held[tier].clear()
            cache.repeats[tier].clear()

    def apply(self, cache: Cache, event: Event) -> None:
        """Take over one event of `cache`."""
        match event:
            case BlockStored():
                self._store(cache, event)
            case BlockRemoved():
                self._remove(cache, event)
            case AllBlocksCleared():
                self.clear(cache, (Tier.DEVICE,))

    def holders(
        self, tokens: bytes, extra: Extra = NO_EXTRA, chains: Chains | None = None
    ) -> list[Holders]:
        """How much of a prompt is held, by groups of caches that hold equally much of it.

        Many hold what all send.  Every cache is in one group at most; those that hold none of it
        are left out.

        Args:
            tokens: `packed` token ids.
            extra: `prompt_extra` of the request.
            chains: of a prompt that is asked for again; keys that are missing are added.
        """
        # The last token is always computed: only blocks that end before it can be used.
        usable = max(0, len(tokens) - _TOKEN_BYTES)
        found = []
        for block_size, root in self._block_sizes.items():
            width = block_size * _TOKEN_BYTES
            whole = memoryview(tokens)[: usable // width * width]
            keys: Iterable[int] = _chain(root, whole, width, extra)
            if chains is not None and extra == NO_EXTRA and block_size >= self._min_kept_tokens:
                if block_size not in chains:
                    chains[block_size] = list(keys)
                keys = chains[block_size]
            found += [Holders(caches, held, block_size) for caches, held in self._walk(keys)]
        return found if len(self._block_sizes) == 1 else _best_of(found)

    def check_integrity(self) -> None:
        """Raise `InternalError` unless holders and caches say the same."""
        expected: tuple[dict[int, int], ...] = ({}, {}, {})
        for cache in self._caches.values():
            for tier in Tier:
                for key in set(cache.held[tier].values()):
                    expected[tier][key] = expected[tier].get(key, 0) | cache.bit
                if not cache.repeats[tier].keys() <= cache.held[tier].keys():
                    raise InternalError(f"{tier.name}: repeats of blocks that are not held")
        if expected != self._holders:
            raise InternalError("the index and what the caches hold differ")

    def _walk(self, keys: Iterable[int]) -> list[tuple[int, Held]]:
        """(Mask, blocks held by each of its caches), along a chain until nobody goes on."""
        if self._holders[Tier.HOST] or self._holders[Tier.DISK]:
            return self._walk_tiers(keys)
        get = self._holders[Tier.DEVICE].get
        masks: Iterable[int | None] = map(get, keys)
        # If both ends have the same holders, the rest mostly has: then one pass tells, not a loop.
        if isinstance(keys, list) and keys:
            first = get(keys[0])
            if first and get(keys[-1]) == first:
                masks = looked_up = list(masks)
                if looked_up.count(first) == len(looked_up):
                    return [(first, Held(len(looked_up)))]
        alive, depth = self._bits, 0
        found = []
        # Neighbours mostly have the same holders, and these are one object: no look at each.
        for known, run in groupby(masks):
            mask = known or 0
            if mask & alive != alive:
                if depth:
                    found.append((alive & ~mask, Held(depth)))
                alive &= mask
                if not alive:
                    return found
            depth += len(list(run))
        return [*found, (alive, Held(depth))] if depth else found

    def _walk_tiers(self, keys: Iterable[int]) -> list[tuple[int, Held]]:
        """The same where blocks lie in slower memories too."""
        device, host, disk = (holders.get for holders in self._holders)
        alive, depth = self._bits, 0
        ended: dict[int, int] = {}  # mask of caches -> depth at which their prefix ends
        by_tier: list[tuple[int, int, int]] = []  # masks that hold it in device, host, disk
        for key in keys:
            masks = device(key, 0), host(key, 0), disk(key, 0)
            mask = masks[0] | masks[1] | masks[2]
            by_tier.append(masks)
            if mask & alive != alive:
                ended[alive & ~mask] = depth
                alive &= mask
                if not alive:
                    break
            depth += 1
        if alive:
            ended[alive] = depth
        return [
            (bit, _by_tier(bit, by_tier[:blocks]))
            for mask, blocks in ended.items()
            if blocks
            for bit in bits_of(mask)
        ]

    def _store(self, cache: Cache, event: BlockStored) -> None:
        if event.kv_cache_spec_kind not in _PREFIX_KINDS:
            if event.group_idx is not None:
                cache.other_groups.add(event.group_idx)
            return
        tier = _tier_of(event)
        if not event.token_ids:  # some connectors name only the hash of what they copied
            self._copy(cache, tier, event.block_hashes)
            return
        size, hashes = event.block_size, event.block_hashes
        parent = self._parent(cache, event)
        if parent is None or size <= 0 or len(event.token_ids) != size * len(hashes):
            cache.num_orphans += len(hashes)
            return
        key = parent
        raw = packed(event.token_ids)
        extras = event.extra_keys or (None,) * len(hashes)
        for (block,), block_hash, extra in zip(
            iter_unpack(f"{size * _TOKEN_BYTES}s", raw), hashes, extras, strict=False
        ):
            key = hash((key, block, _frozen(extra))) if extra else hash((key, block))
            self._hold(cache, tier, block_hash, key)

    def _parent(self, cache: Cache, event: BlockStored) -> int | None:
        """The key that a stored chain continues, if it is known."""
        if event.parent_block_hash is None:
            size = event.block_size
            return self._block_sizes.setdefault(size, hash(("block size", size)))
        return _known(cache, event.parent_block_hash)

    def _copy(self, cache: Cache, tier: Tier, hashes: Iterable[BlockHash]) -> None:
        for block_hash in hashes:
            key = _known(cache, block_hash)
            if key is None:
                cache.num_orphans += 1
            else:
                self._hold(cache, tier, block_hash, key)

    def _hold(self, cache: Cache, tier: Tier, block_hash: BlockHash, key: int) -> None:
        held = cache.held[tier]
        if block_hash in held:
            repeats = cache.repeats[tier]
            repeats[block_hash] = repeats.get(block_hash, 0) + 1
            return
        held[block_hash] = key
        holders = self._holders[tier]
        mask = holders.get(key, 0) | cache.bit
        holders[key] = self._one_of(mask)

    def _one_of(self, mask: int) -> int:
        """The object that stands for all equal masks.

        Sets of holders come and go.  Those that have gone are forgotten when there are many, which
        takes a walk through all blocks.
        """
        masks = self._masks
        found = masks.setdefault(mask, mask)
        if len(masks) > self._max_masks:
            masks.clear()
            for holders in self._holders:
                for used in holders.values():
                    masks.setdefault(used, used)
            found = masks.setdefault(found, found)
            self._max_masks = 2 * len(masks) + max(_MIN_MASKS, len(self) // _BLOCKS_A_MASK)
        return found

    def _remove(self, cache: Cache, event: BlockRemoved) -> None:
        if event.group_idx in cache.other_groups:
            return
        tier = _tier_of(event)
        held, repeats = cache.held[tier], cache.repeats[tier]
        for block_hash in event.block_hashes:
            more = repeats.get(block_hash, 0)
            if more > 1:
                repeats[block_hash] = more - 1
            elif more:
                del repeats[block_hash]
            else:
                key = held.pop(block_hash, None)
                if key is not None:
                    self._remove_holder(tier, key, cache)

    def _remove_holder(self, tier: Tier, key: int, cache: Cache) -> None:
        holders = self._holders[tier]
        mask = holders.get(key, 0) & ~cache.bit
        if mask:
            holders[key] = self._one_of(mask)
        else:
            holders.pop(key, None)


def _chain(key: int, tokens: memoryview, width: int, extra: Extra) -> Iterator[int]:
    """The keys of a prompt's blocks; made as they are asked for, since most are not."""
    more, later = extra
    for (block,) in iter_unpack(f"{width}s", tokens):
        key = hash((key, block, more)) if more else hash((key, block))
        more = later
        yield key


def packed(token_ids: Iterable[int]) -> bytes:
    """Token ids as the index takes them: 4 bytes each.

    Raises:
        OverflowError: one is negative or over 32 bits.
        TypeError: one is no integer.
    """
    return array("I", token_ids).tobytes()


def prompt_extra(lora_name: str | None = None, cache_salt: str | None = None) -> Extra:
    """What tells a prompt's blocks from those of equal tokens.

    vLLM has the LoRA's name in every block and the salt in the first alone
    (`vllm/v1/core/kv_cache_utils.py`, generate_block_hash_extra_keys).
    """
    later = (lora_name,) if lora_name else ()
    return Extra((*later, cache_salt) if cache_salt else later, later)


def _known(cache: Cache, block_hash: BlockHash) -> int | None:
    for held in cache.held:
        if block_hash in held:
            return held[block_hash]
    return None


def _tier_of(event: BlockStored | BlockRemoved) -> Tier:
    if event.locality == "REMOTE":
        return Tier.DISK
    return _TIERS.get(event.medium, Tier.DISK)


def _frozen(extra: Any) -> Any:
    return tuple(map(_frozen, extra)) if isinstance(extra, (list, tuple)) else extra


def bits_of(mask: int) -> Iterable[int]:
    """The masks of single caches that make up `mask`."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit


def _by_tier(bit: int, masks: Iterable[tuple[int, int, int]]) -> Held:
    counts = [0, 0, 0]
    for by_tier in masks:
        counts[next(tier for tier, mask in enumerate(by_tier) if mask & bit)] += 1
    return Held(*counts)


def _best_of(found: Iterable[Holders]) -> list[Holders]:
    """Of caches that are in several groups, each where it holds most."""
    best: dict[int, Holders] = {}
    for one in found:
        for bit in bits_of(one.caches):
            if bit not in best or one.num_tokens > best[bit].num_tokens:
                best[bit] = one._replace(caches=bit)
    return list(best.values())
