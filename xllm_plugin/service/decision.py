"""What is asked of a policy, what it has decided, and what is remembered of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from xllm_plugin.service.policy import Slo

if TYPE_CHECKING:
    from xllm_plugin.service.fleet import Instance

__all__ = ["Asked", "Decision", "Sent"]


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """One choice that was made, as the admin API shows it."""

    unix_s: float
    model: str | None
    instance: str
    policy: str
    reason: Any
    """For people; `str` makes the text, which few read."""
    num_candidates: int
    attempt: int
    """1 for the first instance, 2 for the one after it failed, ..."""
    cause: str
    """The reason in a few words that many decisions share."""

    def settled(self) -> Decision:
        """The same with its reason as text, for those who keep or send it."""
        return msgspec.structs.replace(self, reason=str(self.reason))

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return msgspec.structs.asdict(self.settled())


class Asked(msgspec.Struct, frozen=True, gc=False):
    """A request as policies see it (`RequestView`)."""

    sequence: int
    draw: int
    session_key: str
    cost_tokens: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: Mapping[str, float]
    slo: Slo | None = None


class Sent(msgspec.Struct, eq=False):
    """What the router remembers of a request on its way."""

    prompt_tokens: int = 0
    """0: not known, to be estimated."""
    cached_tokens: Mapping[str, float] = {}
    instance: Instance | None = None
    """Where `uncached_tokens` are counted as not computed yet."""
    uncached_tokens: int = 0
    ahead_tokens: float = 0.0
    """That had to be computed before, when it was sent."""
    is_exact: bool = False
    """Whether `prompt_tokens` were counted, not estimated."""
