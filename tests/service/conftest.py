"""The loop that the service uses, for tests that are coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from xllm_plugin.testing.service_harness import PATIENCE_S


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine to its end."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def bounded(coroutine: Coroutine[Any, Any, Any]) -> Any:
            async with asyncio.timeout(3 * PATIENCE_S):
                return await coroutine

        yield lambda coroutine: runner.run(bounded(coroutine))
