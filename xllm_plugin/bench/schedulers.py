"""The sides of a scheduling benchmark: one engine under several schedulers, and stock vLLM.

A ratio between schedulers means something where nothing else differs.  So `fcfs`, `fcfs-N`,
`priority` and `slo` are all xllm's engine on the same flags; the first three run vLLM's own
scheduler in it.  `stock` and its tuned forms are vLLM without us, for the whole distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from xllm_plugin.bench.peers import PEER_NAMES, PeerServer, peer_servers
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.errors import ConfigError

__all__ = ["OFFLINE_PRIORITY", "SLO", "Side", "Told", "choose_sides", "reference_of"]

SLO = "slo"
STOCK_NAMES = tuple(name for name in PEER_NAMES if name != "xllm")
POLICY = "XLLM_SCHEDULER__POLICY"
OFFLINE_PRIORITY = 1_000_000
"""Beyond every online request's, which is the length of its prompt; lower goes first in vLLM."""


class Told(StrEnum):
    """What a side's scheduler learns about a request beside its length."""

    NOTHING = "nothing"
    PRIORITY = "priority"
    PROMISE = "promise"


@dataclass(frozen=True, slots=True)
class Side:
    """A server and how its scheduler is told what matters.

    Attributes:
        server: how it is started.
        engine: `xllm` or `stock`; sides of one engine differ in the scheduler alone.
        told: see `Told`.
    """

    server: PeerServer
    engine: str
    told: Told

    @property
    def name(self) -> str:
        """As on the command line and in tables."""
        return self.server.name

    @property
    def is_slo(self) -> bool:
        """Whether it is the scheduler in question, and not one it is compared with."""
        return self.told is Told.PROMISE

    def fields(
        self, promise: Promise, prompt_tokens: int, *, is_offline: bool = False
    ) -> dict[str, Any]:
        """What a request's body says to this side beyond prompt and length.

        With one promise for all, its deadlines are in the order of arrival and a priority by them
        would be first come, first served.  Shortest prompt first is what static priorities can add.
        """
        if self.told is Told.PRIORITY:
            return {"priority": OFFLINE_PRIORITY if is_offline else prompt_tokens}
        if self.told is Told.PROMISE:
            told = {
                "xllm_ttft_ms": promise.ttft_ms,
                "xllm_tpot_ms": promise.tpot_ms,
                "xllm_class": "offline" if is_offline else "online",
            }
            return {"vllm_xargs": told}
        return {}


def choose_sides(model: str, names: Sequence[str], flags: Sequence[str]) -> tuple[Side, ...]:
    """The sides called `names`, in that order, each on a port of its own.

    Names are `stock`, `stock-2t`, `stock-best` (stock vLLM, see `xllm_plugin.bench.peers`), `fcfs`,
    `fcfs-N` (chunks of at most N tokens), `priority` and `slo`.

    Args:
        model: folder of the model.
        names: raises `ConfigError` for others, and for none.
        flags: vLLM flags that every side gets.
    """
    if not names:
        raise ConfigError(f"no sides; choose from {', '.join(_KNOWN)}")
    return tuple(_side(model, name, flags) for name in names)


def reference_of(sides: Sequence[Side]) -> Side:
    """The one that outputs are compared with: vLLM's own scheduler on xllm's engine, if any is."""
    ours = [side for side in sides if side.engine == "xllm"]
    return next((side for side in ours if not side.is_slo), (ours or sides)[0])


_KNOWN = (*STOCK_NAMES, "fcfs", "fcfs-N", "priority", SLO)


def _side(model: str, name: str, flags: Sequence[str]) -> Side:
    is_stock = name in STOCK_NAMES
    peer = name if is_stock else "xllm"
    (server,) = peer_servers(model, port=find_free_port(), flags=flags, names=(peer,))
    if is_stock:
        return Side(server, "stock", Told.NOTHING)
    what, policy, told, more = _scheduler(name)
    server = server.changed(
        name, f"xllm's engine, {what}", flags=more, environment={POLICY: policy}
    )
    return Side(server, "xllm", told)


def _scheduler(name: str) -> tuple[str, str, Told, tuple[str, ...]]:
    """In words, `scheduler.policy`, what it is told, and further flags."""
    kind, _, tokens = name.partition("-")
    if name == "fcfs":
        return "vLLM's own scheduler", "fcfs", Told.NOTHING, ()
    if kind == "fcfs" and tokens.isdecimal() and int(tokens) > 0:
        what = f"vLLM's own scheduler, at most {tokens} tokens a step"
        return what, "fcfs", Told.NOTHING, ("--max-num-batched-tokens", tokens)
    if name == "priority":
        what = "vLLM's own scheduler, static priorities: shortest prompt first, offline last"
        return what, "fcfs", Told.PRIORITY, ("--scheduling-policy", "priority")
    if name == SLO:
        return "xllm's scheduler, told each request's promise", "slo", Told.PROMISE, ()
    raise ConfigError(f"side {name!r} unknown; choose from {', '.join(_KNOWN)}")
