"""The processes that all chaos tests share, each a fault (`xllm_plugin/testing/chaos.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xllm_plugin.testing.chaos import Chaos, Fault


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """A service over two instances."""
    with Chaos(tmp_path_factory.mktemp("chaos")) as it:
        yield it


@pytest.fixture
def trial(run: Any, chaos: Chaos) -> Callable[[Fault], None]:
    """Run a fault; afterwards the service has to be alive, with all its counters at zero."""
    return lambda fault: run(chaos.trial(fault))
