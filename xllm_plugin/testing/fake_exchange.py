"""A request before the router, without a service: the fields of an `Exchange` that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xllm_plugin.service.decision import Decision, Sent
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.flow.wishes import NO_WISHES, Wishes
from xllm_plugin.service.routes import route_of

__all__ = ["FakeExchange", "StoppedLoop"]


class StoppedLoop:
    """Time stands still; what is to happen later does not."""

    def time(self) -> float:
        """Seconds."""
        return 0.0

    def call_later(self, delay_s: float, call: Callable[..., object], *args: Any) -> None:
        """Do nothing: its time never comes."""
        del delay_s, call, args


class FakeExchange:
    """A request for completions as the router sees it.

    Args:
        model: that it names.
        body: of which only the length counts.
        draw: its random number.
        session_key: whose requests stay together.
    """

    def __init__(self, model: str | None, body: bytes, *, draw: int, session_key: str = "") -> None:
        self.proxy = self
        self.loop = StoppedLoop()
        self.model = model
        self.route = route_of(b"/v1/completions")
        self.body = body
        self.draw = draw
        self.cost_tokens = len(body) // 4 + 128
        self.response_id = ""
        self.session_key = session_key
        self.sequence = 0
        self.started_s = self.sent_s = 0.0
        self.ttft_s = -1.0
        self.wishes: Wishes = NO_WISHES
        self.tried: tuple[Instance, ...] = ()
        self.sent: Sent | None = None
        self.wants_stream = True
        self.decision: Decision | None = None
