"""What a routing policy is: a pure function from a request and its candidates to a choice.

The same function runs in production, in unit tests and in a simulator: it gets everything it needs
as arguments (a random number too) and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from xllm_plugin.service.speed import Speed

__all__ = ["Choice", "InstanceView", "Ranking", "RequestView", "RoutingPolicy", "Slo"]


class Slo(NamedTuple):
    """What one request was promised itself; inf where nothing was."""

    ttft_s: float = float("inf")
    """From now to its first token; negative if that is late already."""
    tpot_s: float = float("inf")
    """From one token to the next, on average."""
    is_offline: bool = False
    """Nobody waits for it; then both are inf."""


class RequestView(Protocol):
    """What a policy may know of a request."""

    @property
    def sequence(self) -> int:
        """How many requests were routed before this one; the next number on every attempt."""

    @property
    def draw(self) -> int:
        """A random number in [0, 2**64), drawn for this request."""

    @property
    def session_key(self) -> str:
        """What its requests have in common with others of one session; empty if unknown."""

    @property
    def cost_tokens(self) -> int:
        """Estimated work: prompt tokens plus the output tokens that are likely."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt: exact where its tokens are known, else estimated."""

    @property
    def output_tokens(self) -> int:
        """Output tokens that are likely."""

    @property
    def cached_tokens(self) -> Mapping[str, float]:
        """Instance's name -> tokens of the prompt that it need not compute; 0 where it lacks."""

    @property
    def slo(self) -> Slo | None:
        """Its own promise; None if it has none, which most have not."""


class InstanceView(Protocol):
    """What a policy may know of an instance.  Every candidate can take the request."""

    @property
    def name(self) -> str:
        """Unique and lasting, over restarts too."""

    @property
    def name_hash(self) -> int:
        """64 random-looking bits of the name."""

    @property
    def capacity(self) -> float:
        """Relative speed; 1 unless configured."""

    @property
    def in_flight(self) -> int:
        """Requests sent there and not finished, counted from dispatch."""

    @property
    def offline_requests(self) -> int:
        """Those of them that nobody waits for."""

    @property
    def outstanding_tokens(self) -> int:
        """Sum of `cost_tokens` of these requests."""

    @property
    def foreign_requests(self) -> int:
        """Requests there that somebody else sent, by its last report."""

    @property
    def prefill_tokens(self) -> float:
        """Prompt tokens of ours that it still has to compute before a new request's."""

    @property
    def speed(self) -> Speed:
        """How fast it is, by what was measured."""


class Choice(msgspec.Struct, frozen=True):
    """An index into the candidates, and the figure that decided, for people."""

    index: int
    reason: object
    """Its `str` is the text: some are made only if somebody reads them."""
    cause: str = ""
    """The same in a few words that many choices share: they are counted by it."""


class Ranking(Protocol):
    """A policy before many candidates: the same choices, without a look at each for every request.

    It keeps what it needs between requests, and is told whatever changes.
    """

    @property
    def num_open(self) -> int:
        """Candidates that can take a request."""

    def put(self, index: int) -> None:
        """Candidate `index` can take a request; it is new, or looks different."""

    def drop(self, index: int) -> None:
        """Candidate `index` can take none; may be called again."""

    def choose(self, request: RequestView) -> Choice:
        """What the policy's function gives for the open candidates, in their order.

        The index is one into all candidates.  Not called while none is open.
        """


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """A policy under a name.  `choose` gets one candidate or more and must not change anything."""

    name: str
    what: str
    choose: Callable[[RequestView, Sequence[InstanceView]], Choice]
    uses_prefixes: bool = False
    """Whether it looks at `cached_tokens`; else nobody tokenises for it."""
    ranking: Callable[[Sequence[InstanceView]], Ranking] | None = None
    """Makes what takes the place of `choose` before many candidates; all of them closed at first.
    None: `choose` gets a list of those that are open."""
