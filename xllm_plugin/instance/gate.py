"""Where a request meets the engine: its promise is complete, and wrong ones stop here.

vLLM's handlers for chat, completions and messages call `EngineClient.generate` with the prompt in
tokens and the sampling parameters made of the body, before the answer has begun: what is raised in
that very call still becomes an HTTP status.  (`generate` is an async generator: its own first line
runs when the answer is already a 200.)  So `install` puts a plain function of the same signature in
front of it.  The handler for responses streams first; there an error comes as an event.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from xllm_plugin.errors import PromiseError
from xllm_plugin.instance.promises import current_request
from xllm_plugin.scheduler.promise import Promise, read_promise

__all__ = ["Gate", "install"]

Generate = Callable[..., AsyncGenerator[Any, None]]


class Gate:
    """Stands before `EngineClient.generate` of one engine client.

    Args:
        generate: vLLM's.
        defaults: what a request is promised that asks for nothing.
    """

    def __init__(self, generate: Generate, defaults: Promise) -> None:
        self._generate = generate
        self._defaults = defaults

    def __call__(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Complete the request's promise, then call vLLM's `generate`.

        Raises:
            vllm.exceptions.VLLMValidationError: the promise is wrong; vLLM answers 400.
        """
        self._promise_of(sampling_params)
        return self._generate(prompt, sampling_params, request_id, **options)

    def _promise_of(self, sampling_params: Any) -> Promise:
        """The promise of the body and of the headers, which is written to the parameters."""
        context = current_request.get()
        given = sampling_params.extra_args
        if context is not None and context.promise_args:
            # The body wins: it is what the client itself wrote last, a gateway adds headers.
            given = {**context.promise_args, **(given or {})}
            sampling_params.extra_args = given
        try:
            return read_promise(given, self._defaults)
        except PromiseError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{error.field}") from error


def install(engine_client: Any, defaults: Promise) -> None:
    """Put a gate before `engine_client.generate` (seam "engine-client-generate")."""
    engine_client.generate = Gate(engine_client.generate, defaults)
