"""The policy that sglang's and vLLM's routers call cache_aware, to compare with.

Written from its description: the head comment of `src/policies/cache_aware.rs` in
github.com/vllm-project/router (commit 16917f4), which says the same as sglang's.  It remembers
which prompts it sent where, in a radix tree, and asks no instance what it holds.

1. If (max - min) > `balance_abs_threshold` and max > `balance_rel_threshold` * min, both of
   requests in flight, the request goes to the instance with the fewest.
2. Else, if the longest remembered prefix is more than `cache_threshold` of the prompt, it goes
   where that was sent last.
3. Else it goes to the instance with the fewest requests in flight.

The real one compares characters, this one the trace's blocks: a match ends at most a block early.
Of what is older than `max_tree_tokens` an instance the real one forgets in the background every two
minutes, this one at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xllm_plugin.service.policy import Choice, InstanceView, RequestView, RoutingPolicy

__all__ = ["CacheAware", "CacheAwareSettings"]


@dataclass(frozen=True, slots=True)
class CacheAwareSettings:
    """The defaults are those of the command lines of sglang's gateway and of vllm-router."""

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    max_tree_tokens: int = 67_108_864 // 4
    """The peers count characters; of English, four are about a token."""


class CacheAware:
    """Its tree lives as long as it does: make one for each run.

    Args:
        blocks_of: the prompt's block hashes by the request's sequence number.
        block_tokens: that a hash stands for.
        settings: its thresholds.
    """

    def __init__(
        self,
        blocks_of: Callable[[int], Sequence[int]],
        block_tokens: int,
        settings: CacheAwareSettings = CacheAwareSettings(),
    ) -> None:
        self.settings = settings
        self._blocks_of = blocks_of
        self._block_tokens = block_tokens
        self._last_sent: dict[int, str] = {}
        """Block -> the instance that a prompt with it was sent to last."""
        self._sent: dict[str, OrderedDict[int, None]] = {}
        """Instance -> blocks that were sent there, the oldest first."""

    def policy(self, name: str) -> RoutingPolicy:
        """As the router takes it."""
        return RoutingPolicy(name, "approximate prefixes, as peers do", self.choose)

    def choose(self, request: RequestView, candidates: Sequence[InstanceView]) -> Choice:
        """Choose, and remember what was sent where (the one policy here that is not pure)."""
        blocks = self._blocks_of(request.sequence)
        loads = [candidate.in_flight for candidate in candidates]
        least, most = min(loads), max(loads)
        settings = self.settings
        is_imbalanced = (
            most - least > settings.balance_abs_threshold
            and most > settings.balance_rel_threshold * least
        )
        index, reason = loads.index(least), "imbalanced: the shortest queue"
        if not is_imbalanced:
            matched, name = self._match(blocks)
            share = min(1.0, matched * self._block_tokens / max(1, request.prompt_tokens))
            reason = f"{share:.0%} match: the shortest queue"
            if share > settings.cache_threshold:
                names = [candidate.name for candidate in candidates]
                if name in names:
                    index, reason = names.index(name), f"{share:.0%} match"
        self._remember(blocks, candidates[index].name)
        return Choice(index, reason)

    def _match(self, blocks: Sequence[int]) -> tuple[int, str]:
        matched, name = 0, ""
        for block in blocks:
            holder = self._last_sent.get(block)
            if holder is None:
                break
            matched, name = matched + 1, holder
        return matched, name

    def _remember(self, blocks: Sequence[int], name: str) -> None:
        sent = self._sent.setdefault(name, OrderedDict())
        for block in reversed(blocks):  # so that a prompt's end is forgotten before its beginning
            sent[block] = None
            sent.move_to_end(block)
            self._last_sent[block] = name
        while len(sent) * self._block_tokens > self.settings.max_tree_tokens:
            block, _ = sent.popitem(last=False)
            if self._last_sent.get(block) == name:
                del self._last_sent[block]
