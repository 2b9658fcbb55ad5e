"""A result to write, read and render."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from xllm_plugin.bench.schema import Check, Figure, Machine, Peer, Result, Row

MACHINE = Machine(
    cpu="Some CPU", cores=2, memory_gib=24, kernel="Linux 6", python="3.11", torch="2", vllm="0.32"
)


def build_result(*, passed: bool = True) -> Result:
    """A small complete result; its check passed or not."""
    return Result(
        name="serving",
        question="How much?",
        command="xllm bench serving",
        started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        duration_s=90.0,
        commit="0123456789abcdef",
        dirty=False,
        machine=MACHINE,
        peers=(Peer(name="stock", what="vLLM", command=("python", "-m", "x y"), environment={}),),
        rows=(
            Row(
                table="Speed",
                labels={"peer": "stock"},
                figures=(Figure.of("rate", "tok/s", [10.0, 12.5, 11.25]),),
            ),
        ),
        checks=(Check(name="equal", passed=passed, detail="8 of 8"),),
        notes=("a note",),
        not_shown=("a limit",),
        details={"raw": [1, 2]},
    )


@pytest.fixture
def make_result() -> Callable[..., Result]:
    return build_result
