"""Events of a continued stream, in the form that vLLM's own handler of the path writes them in."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from xllm_plugin.instance.resumption import Resumption
from xllm_plugin.service.scale_out.messages import GenerateChoice, Rendered

__all__ = ["DONE", "EventWriter", "error_event"]

DONE: Final = b"data: [DONE]\n\n"
_CHAT: Final = "/v1/chat/completions"


class EventWriter:
    """Writes what the client does not have.

    Args:
        resumption: the stream.
        rendered: its request.
        model: as the server calls it.
    """

    def __init__(self, resumption: Resumption, rendered: Rendered, model: str) -> None:
        self._is_chat = resumption.path == _CHAT
        self._prompt_ids = rendered.token_ids
        self._num_tokens = resumption.num_tokens
        self._is_first = not resumption.chunks
        wishes = rendered.stream_options
        self.has_usage = wishes is not None and wishes.include_usage is True
        self._has_running_usage = (
            self.has_usage and wishes is not None and wishes.continuous_usage_stats is True
        )
        self._head: dict[str, Any] = {
            "id": resumption.id,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": resumption.created,
            "model": model,
        }

    def tokens(self, new: GenerateChoice, text: str, logprobs: dict[str, Any] | None) -> bytes:
        """New tokens and their text."""
        ids = new.token_ids or []
        self._num_tokens += len(ids)
        choice: dict[str, Any] = {"index": 0}
        choice |= {"delta": {"content": text}} if self._is_chat else {"text": text}
        choice |= {"logprobs": logprobs, "finish_reason": new.finish_reason}
        if new.finish_reason is not None or not self._is_chat:
            choice["stop_reason"] = new.stop_reason
        if not self._is_chat:
            choice["prompt_token_ids"] = self._prompt_ids if self._is_first else None
        choice["token_ids"] = ids
        self._is_first = False
        event = {**self._head, "choices": [choice]}
        if self._has_running_usage:
            event["usage"] = self._usage()
            if self._is_chat:
                event["usage"]["completion_tokens_details"] = None
        return _encoded(event)

    def usage(self, said: dict[str, Any] | None) -> bytes:
        """How many tokens there were; `said` is what the server counts, sent ones as its prompt."""
        usage: dict[str, Any] = self._usage()
        details = (said or {}).get("prompt_tokens_details")
        if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
            cached = min(details["cached_tokens"], len(self._prompt_ids))
            usage["prompt_tokens_details"] = {**details, "cached_tokens": cached}
        return _encoded({**self._head, "choices": [], "usage": usage})

    def _usage(self) -> dict[str, Any]:
        num_prompt = len(self._prompt_ids)
        return {
            "prompt_tokens": num_prompt,
            "total_tokens": num_prompt + self._num_tokens,
            "completion_tokens": self._num_tokens,
        }


def error_event(message: str, code: Any, kind: str = "InternalServerError") -> bytes:
    """That there is no more, and why."""
    return _encoded({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _encoded(event: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(event)
