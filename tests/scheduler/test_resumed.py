"""Requests that come with output tokens, over stand-ins for vLLM's scheduler and request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.worker.resumed import RESUMED_ARG

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


class Grammars:
    """Notes what is read, and rejects what it is told to."""

    def __init__(self) -> None:
        self.read: list[tuple[str, list[int]]] = []
        self.accepts = True

    def accept_tokens(self, request: Any, tokens: list[int]) -> bool:
        self.read.append((request.request_id, tokens))
        return self.accepts


class Rig:
    """Resumed requests over a scheduler that only has what they touch."""

    def __init__(self, module: Any) -> None:
        self.grammars = Grammars()
        self.scheduler = SimpleNamespace(
            structured_output_manager=self.grammars, grammar_compile_error_reqs=set()
        )
        self.resumed = module.ResumedRequests(self.scheduler)

    def add(self, name: str, tokens: list[int] | None) -> Any:
        output: list[int] = []
        extra = {RESUMED_ARG: tokens} if tokens else {"xllm_ttft_ms": 5}
        made = SimpleNamespace(
            request_id=name,
            sampling_params=SimpleNamespace(extra_args=extra),
            num_prompt_tokens=6,
            prefill_stats="vLLM's",
            output=output,
            append_output_token_ids=output.extend,
        )
        self.resumed.add(made)
        return made

    def schedule(self, **num_computed_tokens: int) -> None:
        new = [
            SimpleNamespace(req_id=name, num_computed_tokens=num)
            for name, num in num_computed_tokens.items()
        ]
        self.resumed.record_scheduled(SimpleNamespace(scheduled_new_reqs=new))


@pytest.fixture
def rig() -> Rig:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.scheduler import resumed

    return Rig(resumed)


def test_it_has_its_output_when_it_is_queued(rig: Rig) -> None:
    assert rig.add("a", [7, 8]).output == [7, 8]
    other = rig.add("b", None)
    assert (other.output, other.prefill_stats) == ([], "vLLM's")


def test_a_grammar_reads_the_tokens_once_in_the_step_that_begins_it(rig: Rig) -> None:
    """By then it is compiled: vLLM schedules none before."""
    rig.add("a", [7, 8])
    rig.schedule(other=0)
    assert not rig.grammars.read
    rig.schedule(other=0, a=0)
    rig.schedule(a=0)
    assert rig.grammars.read == [("a", [7, 8])]
    assert not rig.scheduler.grammar_compile_error_reqs


@pytest.mark.parametrize(("num_computed", "num_cached"), [(0, 0), (4, 4), (7, 6)])
def test_what_is_cached_of_the_prompt_is_counted(
    rig: Rig, num_computed: int, num_cached: int
) -> None:
    """vLLM would assert that it is all that is cached."""
    made = rig.add("a", [7, 8])
    assert made.prefill_stats is None
    rig.schedule(a=num_computed)
    stats = made.prefill_stats
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (6, num_cached)
    assert stats.num_computed_tokens == 6 - num_cached


def test_tokens_that_a_grammar_rejects_end_the_request_and_not_the_engine(rig: Rig) -> None:
    rig.grammars.accepts = False
    rig.add("a", [7, 8])
    rig.schedule(a=0)
    assert rig.scheduler.grammar_compile_error_reqs == {"a"}


def test_an_aborted_request_is_forgotten(rig: Rig) -> None:
    rig.resumed.forget([rig.add("a", [7, 8])])
    rig.schedule(a=0)
    assert not rig.grammars.read
