"""Requests that come with output tokens: another instance has generated them.

To vLLM such a request is one that was preempted: prompt and output are there, nothing is computed.
The tokens come with the request (`RESUMED_ARG`).  The scheduler appends them to it
(`scheduler/resumed.py`), and each worker does so in the step that first schedules it (here).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["RESUMED_ARG", "resumed_tokens", "take_up"]

RESUMED_ARG: Final = "xllm_resumed_token_ids"
"""In `SamplingParams.extra_args`, which vLLM hands to its engine and its workers as it is.  The
gate of an API server takes it from no client."""


def resumed_tokens(sampling_params: Any) -> Sequence[int]:
    """The output tokens that a request begins with; empty for nearly all."""
    extra = getattr(sampling_params, "extra_args", None)
    return (extra.get(RESUMED_ARG) or ()) if extra else ()


def take_up(
    runner: Any, resumed: Mapping[str, Sequence[int]], drafts: Mapping[str, Sequence[int]]
) -> None:
    """Give requests that vLLM's V1 runner has just added the output that they came with.

    They leave the batch and come back into it, as preempted ones do: so all that is made of a
    request's output when it enters is made by vLLM.

    Args:
        runner: after its `_update_states`.
        resumed: output tokens by request id.
        drafts: `SchedulerOutput.scheduled_spec_decode_tokens`.
    """
    batch = runner.input_batch
    # Freed places are filled from the lowest on: in this order each gets its own again.
    req_ids = sorted(resumed, key=batch.req_id_to_index.__getitem__)
    for req_id in req_ids:
        batch.remove_request(req_id)
    for req_id in req_ids:
        state = runner.requests[req_id]
        state.output_token_ids.extend(resumed[req_id])
        batch.add_request(state)
        batch.update_req_spec_token_ids(state, drafts)
    batch.refresh_metadata()
