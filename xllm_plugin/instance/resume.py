"""`POST /v1/xllm/resume`: continue a stream whose instance has died, exactly after what was sent.

The answer is what vLLM's own handler of the original path streams, less the events that the client
has: same form, same id, usage over the whole.  `service/continuation` asks for it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from xllm_plugin.instance.promises import error_response
from xllm_plugin.instance.resumption import REASON_HEADER, Resumption

__all__ = ["resume"]

_decode = msgspec.json.Decoder(Resumption).decode
_CREATED = re.compile(r'"created":\d+')
_PREFIXES = {"/v1/completions": "cmpl-", "/v1/chat/completions": "chatcmpl-"}
_BAD_REQUEST = "BadRequestError"
_MAX_REASON = 500


async def resume(raw_request: Request) -> Response:
    """Continue one stream.

    400 if it cannot be continued exactly, and whatever the original path answers if it refuses.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        resumption = _decode(await raw_request.body())
        generator, engine = await _begin(resumption, raw_request)
    except msgspec.DecodeError as error:
        return _refused(400, _BAD_REQUEST, f"This is no request to resume a stream: {error}.")
    except VLLMValidationError as error:
        return _refused(400, _BAD_REQUEST, str(error), param=error.parameter)
    if not hasattr(generator, "__aiter__"):  # vLLM's ErrorResponse
        fault = generator.error
        return _refused(fault.code, fault.type, fault.message, param=fault.param)
    stream = _new_events(generator, engine, resumption)
    return StreamingResponse(stream, media_type="text/event-stream")


def _refused(status_code: int, kind: str, message: str, *, param: str | None = None) -> Response:
    """An error, said in a header as well: the service reads no more of what is no stream."""
    answer = error_response(status_code, kind, message, param=param)
    words = "".join(c if c.isascii() and c.isprintable() else " " for c in message).split()
    answer.headers[REASON_HEADER] = " ".join(words)[:_MAX_REASON]
    return answer


async def _begin(resumption: Resumption, raw_request: Request) -> tuple[Any, Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.exceptions import VLLMValidationError

    from xllm_plugin.instance.replay import ReplayingEngine

    is_chat = resumption.path == "/v1/chat/completions"
    state = raw_request.app.state
    handler = state.openai_serving_chat if is_chat else state.openai_serving_completion
    if handler is None:
        raise NotImplementedError(f"The model does not support {resumption.path}")
    request_class = ChatCompletionRequest if is_chat else CompletionRequest
    request = request_class.model_validate_json(bytes(resumption.body))
    if not request.stream or not request.return_token_ids or request.use_beam_search:
        raise VLLMValidationError("Only a stream with `return_token_ids` can be resumed.")
    request.request_id = resumption.id.removeprefix(_PREFIXES[resumption.path])
    engine = ReplayingEngine(handler.engine_client, resumption)
    serving = copy.copy(handler)
    serving.engine_client = engine
    create = serving.create_chat_completion if is_chat else serving.create_completion
    return await create(request, raw_request), engine


async def _new_events(generator: Any, engine: Any, resumption: Resumption) -> AsyncIterator[str]:
    """What the client does not have, with the original's time."""
    num_skipped = resumption.num_skipped
    created = f'"created":{resumption.created}'
    try:
        async for event in generator:
            if not engine.is_live:
                continue
            if num_skipped:
                num_skipped -= 1
                continue
            # The first of its kind in an event is the field; text comes later, and escaped.
            yield _CREATED.sub(created, event, count=1)
    finally:
        await generator.aclose()
