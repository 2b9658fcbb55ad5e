"""Requests that come with output tokens, on the scheduler's side (`worker/resumed.py`).

vLLM's scheduler knows output of requests that it has not computed: of preempted ones.  Three things
it does as the tokens are made, and they are done here: it appends them to the request, lets its
grammar read them, and counts what of the prompt was cached (seam "resumed-output").
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.metrics.stats import PrefillStats

from xllm_plugin.worker.resumed import resumed_tokens

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

__all__ = ["ResumedRequests"]

logger = logging.getLogger(__name__)


class ResumedRequests:
    """Those of one scheduler that have not been scheduled yet.

    Args:
        scheduler: vLLM's.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._waiting: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        """Give a new request the output that it came with, if any; before vLLM queues it."""
        tokens = resumed_tokens(request.sampling_params)
        if not tokens:
            return
        request.append_output_token_ids(list(tokens))
        # vLLM asserts that only a prompt is cached when it first schedules a request that has
        # these; `record_scheduled` makes them.
        request.prefill_stats = None
        self._waiting[request.request_id] = request

    def record_scheduled(self, output: SchedulerOutput) -> None:
        """A step was scheduled: its grammars, which are compiled now, read what was appended."""
        if not self._waiting:
            return
        for new in output.scheduled_new_reqs:
            request = self._waiting.pop(new.req_id, None)
            if request is not None:
                self._begin(request, new.num_computed_tokens)

    def forget(self, requests: Iterable[Request]) -> None:
        """Requests that were aborted, or have ended."""
        if self._waiting:
            for request in requests:
                self._waiting.pop(request.request_id, None)

    def _begin(self, request: Request, num_cached_tokens: int) -> None:
        stats = request.prefill_stats = PrefillStats()
        num_prompt_tokens = request.num_prompt_tokens
        stats.set(num_prompt_tokens, min(num_cached_tokens, num_prompt_tokens), 0)
        tokens = list(resumed_tokens(request.sampling_params))
        if not self._scheduler.structured_output_manager.accept_tokens(request, tokens):
            logger.error(
                "request %s ends in an error: its grammar, as compiled here, rejects tokens that "
                "it came with; the instance that began its stream is no copy of this one.",
                request.request_id,
            )
            self._scheduler.grammar_compile_error_reqs.add(request.request_id)
