"""A finished runner of vLLM's becomes one of ours, or the start stops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xllm_plugin.errors import SeamError
from xllm_plugin.worker.model_runner import XllmModelRunnerMixin, adopt_runner


class Runner:
    """Stands for vLLM's runner; counts what it was built with."""

    def __init__(self) -> None:
        self.built_with = "state"


class OurRunner(XllmModelRunnerMixin, Runner):
    num_setups = 0

    def setup_xllm(self) -> None:
        super().setup_xllm()
        self.num_setups += 1


class OtherRunner(Runner):
    """A runner that upstream has come to build instead."""


def test_the_runner_keeps_its_state_and_is_set_up_once() -> None:
    runner = Runner()
    worker = SimpleNamespace(model_runner=runner)
    adopt_runner(worker, OurRunner)
    adopt_runner(worker, OurRunner)
    assert worker.model_runner is runner
    assert isinstance(runner, OurRunner)
    assert (runner.built_with, runner.num_setups) == ("state", 1)


@pytest.mark.parametrize("other", [OtherRunner, SimpleNamespace])
def test_a_runner_of_another_class_is_refused_and_left_as_it_was(other: type) -> None:
    worker = SimpleNamespace(model_runner=other())
    with pytest.raises(SeamError, match=f"{other.__name__}, which .*OurRunner does not extend"):
        adopt_runner(worker, OurRunner)
    assert type(worker.model_runner) is other
