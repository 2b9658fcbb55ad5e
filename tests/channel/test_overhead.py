"""Prints what the channel costs (`pytest -s`); asserts no time, since machines are shared."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

from xllm_plugin.channel import ChannelClient


def _report(what: str, call: Callable[[], object], number: int) -> None:
    best_us = min(timeit.repeat(call, number=number, repeat=5)) / number * 1e6
    print(f"\n{what}: {best_us:.2f} us", end="")  # noqa: T201 - it is what this file is for


def test_cost_of_a_step(engine: Any) -> None:
    channel = engine.channel
    _report("publish_if_due, not due, time given", lambda: channel.publish_if_due(0.0), 100_000)
    _report("publish_if_due, not due", channel.publish_if_due, 100_000)
    _report("drain_calls, none waiting", channel.drain_calls, 100_000)
    _report("publish", lambda: channel.publish_if_due(0.0, force=True), 10_000)
    with ChannelClient(engine.path, 30) as client:
        _report("snapshot through the socket", client.snapshot, 500)
