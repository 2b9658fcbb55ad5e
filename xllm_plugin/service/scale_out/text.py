"""The text of new tokens, and their log probabilities as a client gets them."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from xllm_plugin.service.scale_out.messages import Derendered, GenerateChoice, Rendered
from xllm_plugin.service.scale_out.server import ScaleOutServer

__all__ = ["Text"]

_CHAT: Final = "/v1/chat/completions"
_NUM_SEEDS: Final = 32
"""Of the prompt, for the text of the first token; vLLM reads seven."""


class Text:
    """Asks for the text of tokens, in order; what the server remembers of it is kept here.

    Args:
        server: is asked.
        rendered: the request.
        path: of the request.
        adapter: its name, if the model is one.
    """

    def __init__(
        self, server: ScaleOutServer, rendered: Rendered, path: str, adapter: str | None
    ) -> None:
        self._server = server
        self._is_chat = path == _CHAT
        self._adapter = adapter
        self._state: dict[str, Any] | None = None
        self._offset = 0
        self._seeds = rendered.token_ids[-_NUM_SEEDS:]
        params = rendered.sampling_params
        self._shows_stop = bool(params.get("include_stop_str_in_output"))
        self._num_logprobs: int | None = params.get("logprobs")
        self._decoding = {
            name: params[name]
            for name in ("skip_special_tokens", "spaces_between_special_tokens")
            if name in params
        }

    @property
    def num_asked_logprobs(self) -> int | None:
        """How many to ask for: completions have one more where the token is not among them."""
        number = self._num_logprobs
        return number + 1 if number and number > 0 and not self._is_chat else number

    async def begin(self, sent: list[int]) -> Derendered:
        """The text of the tokens that the client has; whatever comes is after these."""
        is_counted = self._num_logprobs is not None and not self._is_chat
        content = [{"token_id": token, "logprob": 0.0} for token in sent] if is_counted else []
        found = await self.of(
            GenerateChoice(token_ids=sent, logprobs={"content": content} if content else None)
        )
        self.shown(found.logprobs)
        return found

    async def of(self, new: GenerateChoice) -> Derendered:
        """The text of the next tokens.  Raises as `ScaleOutServer.derender`."""
        ids = new.token_ids or []
        is_stopped = new.finish_reason == "stop" and not isinstance(new.stop_reason, str)
        if is_stopped and not self._shows_stop:
            ids = ids[:-1]  # the token that has ended it is not shown, whatever its text
        choice = {"index": 0, "token_ids": ids, "logprobs": self._asked(new.logprobs)}
        body: dict[str, Any] = {
            "stream": True,
            "model": self._adapter,
            "generate_chunk": {"choices": [choice]},
            "stream_state": self._state,
        }
        if self._state is None:
            body["prompt_token_ids"] = self._seeds
        if self._decoding and self._is_chat:
            message = {"role": "user", "content": "x"}
            body["chat_request"] = {"messages": [message], **self._decoding}
        elif self._decoding:
            body["completion_request"] = {"prompt": "x", **self._decoding}
        found = await self._server.derender(msgspec.json.encode(body))
        self._state = found.stream_state
        return found

    def _asked(self, logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Without what was asked for on top and is not shown."""
        number = self._num_logprobs
        if logprobs is None or self._is_chat or number is None or number < 1:
            return logprobs
        content = []
        for entry in logprobs.get("content") or ():
            sampled, *top = entry.get("top_logprobs") or [None]
            kept = [one for one in top if (one.get("rank") or number + 1) <= number]
            content.append({**entry, "top_logprobs": [sampled, *kept] if sampled else []})
        return {"content": content}

    def shown(self, logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
        """As a client gets it."""
        number = self._num_logprobs
        if logprobs is None:
            return None
        if not self._is_chat:
            return {**logprobs, "text_offset": self._offsets(logprobs.get("tokens") or [])}
        if number is None or number < 0:
            return logprobs
        content = [
            {**entry, "top_logprobs": entry.get("top_logprobs", [])[:number]}
            for entry in logprobs.get("content") or ()
        ]
        return {"content": content}

    def _offsets(self, tokens: list[str]) -> list[int]:
        """Where each begins in the output; vLLM adds up the texts of tokens for that."""
        found = []
        for token in tokens:
            found.append(self._offset)
            self._offset += len(token)
        return found
