"""Where a request meets the engine: its promise is complete, and what is refused stops here.

vLLM's handlers for chat, completions and messages call `EngineClient.generate` with the prompt in
tokens and the sampling parameters made of the body, before the answer has begun: what is raised in
that very call still becomes an HTTP status.  (`generate` is an async generator: its own first line
runs when the answer is already a 200.)  So `install` puts a plain function of the same signature in
front of it.  The handler for responses streams first; there an error comes as an event.

vLLM's own admission check comes earlier, before a prompt is made into tokens, and stays: 503.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sized
from functools import partial
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import Counter

from xllm_plugin.errors import PromiseError
from xllm_plugin.instance.admission import Outcome, Verdict, decide
from xllm_plugin.instance.config import AdmissionConfig
from xllm_plugin.instance.forecast import Forecast
from xllm_plugin.instance.promises import RequestContext, current_request, with_headers
from xllm_plugin.instance.waiting import IsPrefilling, WaitingList
from xllm_plugin.scheduler.promise import Promise, read_promise
from xllm_plugin.worker.resumed import RESUMED_ARG

__all__ = ["Admission", "Gate", "install", "phases_of", "prompt_tokens"]

Generate = Callable[..., AsyncGenerator[Any, None]]

SLO_HEADER: Final = "x-xllm-slo"
# Asking vLLM about every waiting request costs about 0.3 us each.
_SWEEP_INTERVAL_S = 0.01


class Admission:
    """Decides on requests and keeps account of those that wait.

    Args:
        config: the settings.
        waiting: those admitted before.
        forecast: what to expect of the engines now; None if unknown.
        is_prefilling: see `WaitingList.sweep`.
        decisions: counted by class and outcome.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        waiting: WaitingList,
        forecast: Callable[[], Forecast | None],
        is_prefilling: IsPrefilling,
        decisions: Counter,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._waiting = waiting
        self._forecast = forecast
        self._is_prefilling = is_prefilling
        self._decisions = decisions
        self._clock = clock
        self._next_sweep_s = 0.0

    def admit(
        self, context: RequestContext, promise: Promise, request_id: str, num_tokens: int
    ) -> None:
        """Let one prompt of a request wait for the engine.

        A request is decided on once, by its first prompt: later ones may come when its answer has
        begun (beam search, tools), and to refuse them would waste what was done.

        Raises:
            vllm.exceptions.GracefulHTTPError: it is refused; vLLM answers 429.
        """
        now_s = self._clock()
        if not context.was_decided:
            self._decide(context, promise, num_tokens, now_s)
            context.was_decided = True
        request = self._waiting.add(request_id, promise, num_tokens, now_s)
        context.at_end.append(partial(self._waiting.discard, request))

    def _decide(
        self, context: RequestContext, promise: Promise, num_tokens: int, now_s: float
    ) -> None:
        if now_s >= self._next_sweep_s:
            self._next_sweep_s = now_s + _SWEEP_INTERVAL_S
            self._waiting.sweep(self._is_prefilling, now_s)
        queue = self._waiting.look(promise, now_s)
        verdict = decide(promise, num_tokens, queue, self._forecast(), self._config)
        self._decisions.labels(promise.service_class, verdict.outcome).inc()
        context.response_headers.update(_headers(verdict))
        if not verdict.outcome.is_admitted:
            from vllm.exceptions import GracefulHTTPError

            raise GracefulHTTPError(verdict.message, HTTPStatus.TOO_MANY_REQUESTS)


def _headers(verdict: Verdict) -> dict[str, str]:
    if verdict.outcome is Outcome.ADMITTED:
        return {}
    headers = {}
    if verdict.ttft_ms is not None:
        state = "at-risk" if verdict.outcome.is_admitted else "refused"
        headers[SLO_HEADER] = f"{state}; predicted-ttft-ms={verdict.ttft_ms:.0f}"
    if verdict.retry_after_s:
        headers["retry-after"] = str(verdict.retry_after_s)
    if verdict.outcome is Outcome.TTFT_ALONE:
        headers["x-should-retry"] = "false"  # the openai client's own: another try is as late
    return headers


class Gate:
    """Stands before `EngineClient.generate` of one engine client.

    Args:
        generate: vLLM's.
        defaults: what a request is promised that asks for nothing.
        admission: decides on requests.
    """

    def __init__(self, generate: Generate, defaults: Promise, admission: Admission) -> None:
        self._generate = generate
        self._defaults = defaults
        self._admission = admission

    def __call__(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Complete the request's promise, ask admission, then call vLLM's `generate`.

        Calls outside of an HTTP request (websockets, vLLM's own) are let through.

        Raises:
            vllm.exceptions.VLLMValidationError: the promise is wrong, or an argument is ours; vLLM
                answers 400.
            vllm.exceptions.GracefulHTTPError: see `Admission.admit`.
        """
        context = current_request.get()
        promise = self._promise_of(sampling_params, context)
        if context is not None:
            self._admission.admit(context, promise, request_id, prompt_tokens(prompt))
        return self._generate(prompt, sampling_params, request_id, **options)

    def _promise_of(self, sampling_params: Any, context: RequestContext | None) -> Promise:
        """The promise of the body and of the headers, which is written to the parameters."""
        given = sampling_params.extra_args = with_headers(sampling_params.extra_args, context)
        if given and RESUMED_ARG in given:  # a continued stream's, which does not come this way
            from vllm.exceptions import VLLMValidationError

            parameter = f"vllm_xargs.{RESUMED_ARG}"
            raise VLLMValidationError(f"{parameter} is not for clients.", parameter=parameter)
        try:
            return read_promise(given, self._defaults)
        except PromiseError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{error.field}") from error


def install(engine_client: Any, defaults: Promise, admission: Admission) -> None:
    """Put a gate before `engine_client.generate` (seam "engine-client-generate")."""
    engine_client.generate = Gate(engine_client.generate, defaults, admission)


def phases_of(engine_client: Any) -> IsPrefilling:
    """What vLLM's `AsyncLLM` knows of its requests (seam "request-phases")."""

    def is_prefilling(request_id: str) -> bool | None:
        processor = engine_client.output_processor
        states = processor.request_states
        # A request with n > 1 has several of vLLM's; `get` leaves its defaultdict as it is.
        found = [states[i] for i in processor.external_req_ids.get(request_id, ()) if i in states]
        return any(state.is_prefilling for state in found) if found else None

    return is_prefilling


def prompt_tokens(prompt: Any) -> int:
    """Tokens in what vLLM's renderer made of a prompt; 0 where it is not known yet."""
    if not isinstance(prompt, dict):
        return 0
    for key in ("prompt_token_ids", "prompt_embeds"):
        found = prompt.get(key)
        if isinstance(found, Sized):
            return len(found)
    return 0
