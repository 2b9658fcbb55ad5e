"""What the CPU worker sets up around vLLM's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def worker() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu import worker

    return worker


@pytest.mark.parametrize("asked", [True, False])
def test_the_runner_is_made_synchronous_and_the_scheduler_is_not(worker: Any, asked: bool) -> None:
    config = SimpleNamespace(async_scheduling=asked)
    with worker.synchronous_runner(config):
        assert config.async_scheduling is False
    assert config.async_scheduling is asked


def test_a_runner_that_cannot_be_made_leaves_the_configuration_as_it_was(worker: Any) -> None:
    config = SimpleNamespace(async_scheduling=True)
    with pytest.raises(MemoryError), worker.synchronous_runner(config):
        raise MemoryError
    assert config.async_scheduling is True
