"""Whose the caches are: from groups of caches that hold equally much to tokens by instance.

Where nearly all instances hold the same, a system prompt say, that is said once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from xllm_plugin.service.cached import CachedTokens
from xllm_plugin.service.kv_index.index import Cache, Held, Holders, bits_of

__all__ = ["Places"]

_FEW: Final = 16
"""Of so many each is said by itself."""


class Places:
    """Instances and their caches, one for each data-parallel rank.

    Args:
        caches: (name, caches) of each instance that can be chosen.
    """

    def __init__(self, caches: Sequence[tuple[str, Sequence[Cache]]]) -> None:
        self._names = [name for name, _ in caches]
        self._mask = 0
        self._owners: dict[int, tuple[str, float]] = {}
        """Number of a cache's bit -> whose it is, and its part in the mean of the ranks."""
        for name, own in caches:
            for cache in own:
                self._mask |= cache.bit
                self._owners[cache.bit.bit_length()] = (name, 1 / len(own))
        self._has_one_rank = all(len(own) <= 1 for _, own in caches)
        self._without = [name for name, own in caches if not own]

    def cached(
        self, found: Sequence[Holders], weigh: Callable[[Held, int], float]
    ) -> Mapping[str, float]:
        """Tokens that each instance need not compute; of several ranks the mean.

        Args:
            found: of the index.
            weigh: tokens that blocks of one size are worth, by the tiers that hold them.
        """
        groups = [
            (one.caches & self._mask, tokens)
            for one in found
            if (tokens := weigh(one.held, one.block_size)) > 0
        ]
        usual, usual_mask = 0.0, 0
        if self._has_one_rank and groups:
            usual_mask, usual = max(groups, key=lambda group: group[0].bit_count())
            if usual_mask.bit_count() <= max(_FEW, len(self._names) // 2):
                usual, usual_mask = 0.0, 0
        others = dict.fromkeys(self._without, 0.0) if usual else {}
        rest = self._mask & ~usual_mask if usual else 0
        for mask, tokens in groups:
            if usual and mask == usual_mask:
                continue
            rest &= ~mask
            for bit in bits_of(mask):
                name, part = self._owners[bit.bit_length()]
                others[name] = others.get(name, 0.0) + tokens * part
        for bit in bits_of(rest):
            others[self._owners[bit.bit_length()][0]] = 0.0
        return CachedTokens(usual, others, self._names) if usual else others
