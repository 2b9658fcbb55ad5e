"""The records that travel with a step survive the way that vLLM sends its outputs."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass

import pytest

from xllm_plugin.worker.messages import StepMessage, StepStamp, attach, attached


@dataclass
class Output:
    """A plain dataclass, as vLLM's outputs are."""

    tokens: int = 0


@pytest.mark.parametrize("record", [StepMessage(step=3), StepStamp(step=3, duration_ms=1.5)])
def test_a_record_travels_in_a_pickle(record: StepMessage | StepStamp) -> None:
    output = Output(7)
    attach(output, record)
    received = pickle.loads(pickle.dumps(output))
    assert received == Output(7)
    assert attached(received) == record


def test_nothing_attached_is_none() -> None:
    assert attached(Output()) is None
    assert attached(None) is None


def test_the_last_one_attached_counts_and_is_on_this_object_alone() -> None:
    output, other = Output(), Output()
    attach(output, StepMessage(1))
    attach(output, StepMessage(2))
    assert attached(output) == StepMessage(2)
    assert attached(other) is None


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StepMessage(1).step = 2  # type: ignore[misc]
