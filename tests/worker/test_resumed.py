"""Requests that come with output tokens: what the runner is told, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.errors import InternalError
from xllm_plugin.worker.model_runner import XllmModelRunnerMixin
from xllm_plugin.worker.resumed import RESUMED_ARG, resumed_tokens


class Batch:
    """Vacates and fills places as vLLM's does: the lowest first."""

    def __init__(self, *req_ids: str) -> None:
        self.req_id_to_index = {name: index for index, name in enumerate(req_ids)}
        self.removed: list[int] = []
        self.calls: list[tuple[str, Any]] = []

    def remove_request(self, req_id: str) -> None:
        self.removed.append(self.req_id_to_index.pop(req_id))

    def add_request(self, state: Any) -> None:
        index = min(self.removed)
        self.removed.remove(index)
        self.req_id_to_index[state.req_id] = index
        self.calls.append(("add", list(state.output_token_ids)))

    def update_req_spec_token_ids(self, state: Any, drafts: Any) -> None:
        self.calls.append(("drafts", drafts.get(state.req_id)))

    def refresh_metadata(self) -> None:
        self.calls.append(("refresh", len(self.removed)))


class Runner:
    """Stands for vLLM's runner, which adds new requests without output."""

    def __init__(self) -> None:
        self.input_batch = Batch("other", "mine", "third", "yours")
        self.requests = {
            name: SimpleNamespace(req_id=name, output_token_ids=[])
            for name in self.input_batch.req_id_to_index
        }

    def _update_states(self, _: Any) -> str:
        return "deferred"


class OurRunner(XllmModelRunnerMixin, Runner):
    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[tuple[str, int]] = []

    def skip_draws(self, req_id: str, num_tokens: int) -> None:
        self.skipped.append((req_id, num_tokens))


def new(req_id: str, tokens: list[int] | None = None) -> Any:
    extra = {RESUMED_ARG: tokens} if tokens else None
    return SimpleNamespace(req_id=req_id, sampling_params=SimpleNamespace(extra_args=extra))


def step(*requests: Any, **drafts: list[int]) -> Any:
    return SimpleNamespace(scheduled_new_reqs=requests, scheduled_spec_decode_tokens=drafts)


def test_a_resumed_request_has_its_output_before_its_first_step() -> None:
    """In the place of the batch that it had, whatever the order of the schedule."""
    runner = OurRunner()
    output = runner.requests["mine"].output_token_ids  # penalties hold on to this very list
    asked = step(new("yours", [9]), new("other"), new("mine", [7, 8]), yours=[-1])
    assert runner._update_states(asked) == "deferred"
    assert output == [7, 8]
    batch = runner.input_batch
    assert batch.req_id_to_index == {"other": 0, "mine": 1, "third": 2, "yours": 3}
    assert batch.calls == [
        ("add", [7, 8]),
        ("drafts", None),
        ("add", [9]),
        ("drafts", [-1]),
        ("refresh", 0),
    ]
    assert runner.skipped == [("yours", 1), ("mine", 2)]


def test_draws_that_are_not_known_are_never_left_out() -> None:
    """Of a family that has no `skip_draws`: its streams with a seed are refused before."""

    class Plain(XllmModelRunnerMixin, Runner):
        pass

    runner = Plain()
    runner.requests["mine"].generator = None
    runner._update_states(step(new("mine", [7])))
    runner.requests["yours"].generator = object()
    with pytest.raises(InternalError, match="yours has a seed and comes with 2 tokens"):
        runner._update_states(step(new("yours", [7, 8])))


def test_other_steps_are_left_alone() -> None:
    runner = OurRunner()
    runner._update_states(step())
    runner._update_states(step(new("mine")))
    assert not runner.input_batch.calls


def test_tokens_come_with_the_sampling_parameters() -> None:
    assert resumed_tokens(SimpleNamespace(extra_args={RESUMED_ARG: [1, 2]})) == [1, 2]
    for other in (None, SimpleNamespace(extra_args=None), SimpleNamespace(extra_args={"x": 1})):
        assert not resumed_tokens(other)
