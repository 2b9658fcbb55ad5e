"""One physical page: its states, and which may follow which."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from xllm_plugin.accelerator.memory import Fence, PageHandle
from xllm_plugin.errors import InternalError

__all__ = ["Mapping", "Page", "PageState"]


class PageState(Enum):
    """The states of xLLM's paper (section 4.3), and Retired.

    ::

        Free <---> Allocated ---> Mapped ---> Retired ---> Reusable
                       ^                                      |
                       +--------------------------------------+

    A reusable page becomes Mapped again, or Free, by way of Allocated, so that nobody else takes it
    while the device is at work; from Allocated a failure leads back to where the page came from.
    """

    FREE = "free"
    """Created, mapped nowhere, of no owner."""
    ALLOCATED = "allocated"
    """Promised: the device is mapping it for an owner or ahead of one, or unmapping it."""
    MAPPED = "mapped"
    """An owner uses it, at one address or several."""
    RETIRED = "retired"
    """Given up by its last owner, while work that was launched before may still read it."""
    REUSABLE = "reusable"
    """Not in use, but still mapped: the next owner of the address has it at once."""

    # By identity.  That of Enum is written in Python, and every change of a state asks for six:
    # measured a fifth of what it takes to give 183 MiB of pages back.
    __hash__ = object.__hash__


_FOLLOWING: dict[PageState, frozenset[PageState]] = {
    PageState.FREE: frozenset({PageState.ALLOCATED}),
    PageState.ALLOCATED: frozenset({PageState.FREE, PageState.MAPPED, PageState.REUSABLE}),
    PageState.MAPPED: frozenset({PageState.RETIRED}),
    PageState.RETIRED: frozenset({PageState.REUSABLE}),
    PageState.REUSABLE: frozenset({PageState.ALLOCATED}),
}


@dataclass(slots=True, eq=False)
class Mapping:
    """One page at one address.

    Attributes:
        owner: who uses it; None when nobody does.
        fence: set from when the owner gave it up until the work launched before is done.
        idle_since_s: when it was last given up or made, by the pool's clock.
    """

    address: int
    page: Page
    owner: Hashable | None = None
    fence: Fence | None = None
    idle_since_s: float = 0.0


@dataclass(slots=True, eq=False)
class Page:
    """A physical page and where it is mapped.

    `idle_since_s` is when it was last in use, by the pool's clock.
    """

    handle: PageHandle
    state: PageState = PageState.FREE
    mappings: list[Mapping] = field(default_factory=list)
    idle_since_s: float = 0.0

    def becomes(self, state: PageState) -> None:
        """Change the state.

        Raises:
            InternalError: no rule leads from the present state to that.
        """
        if state not in _FOLLOWING[self.state]:
            raise InternalError(
                f"page {self.handle} cannot go from {self.state.value} to {state.value}; "
                "please report this with the log"
            )
        self.state = state
