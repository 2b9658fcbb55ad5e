"""What instances are asked about prompts: the ids of one, and what it takes to find them here."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import aiohttp
import msgspec

from xllm_plugin.service.answers import authorization, read_at_most
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.fleet import Instance

__all__ = ["Asker", "RefusedPromptError"]

_MOST_BYTES: Final = 2**26
"""Of what an instance hands out; the largest tokenizers have half of it."""


class _Answer(msgspec.Struct):
    tokens: list[int]


_decode_answer = msgspec.json.Decoder(_Answer).decode


class RefusedPromptError(ValueError):
    """The instance says that it is no prompt."""


class Asker:
    """Asks instances.

    Args:
        session: its connections.
        config: gives the settings in force.
    """

    def __init__(self, session: aiohttp.ClientSession, config: Callable[[], ServiceConfig]) -> None:
        self._session = session
        self._config = config

    async def tokens(self, instance: Instance, question: bytes) -> list[int]:
        """The token ids of a prompt.

        Args:
            instance: that is asked.
            question: the body of a request to `/tokenize`.

        Raises:
            RefusedPromptError: it is wrong.
            ValueError: the instance cannot say; also aiohttp's errors and `TimeoutError`.
        """
        headers = {"Content-Type": "application/json", **authorization(self._config().instances)}
        url = _url(instance, "/tokenize")
        async with self._session.post(url, data=question, headers=headers) as reply:
            if reply.status == HTTPStatus.BAD_REQUEST:
                raise RefusedPromptError(f"/tokenize of {instance.name} refuses a prompt")
            if reply.status != HTTPStatus.OK:
                raise ValueError(f"/tokenize of {instance.name} answers {reply.status}")
            return _decode_answer(await reply.read()).tokens

    async def handed_out(self, instance: Instance, path: str) -> bytes | None:
        """What it gives at a path of this plugin's; None: a plain server, or it has no such thing.

        Raises:
            ValueError: it is larger than any is; also aiohttp's errors.
        """
        headers = authorization(self._config().instances)
        async with self._session.get(_url(instance, path), headers=headers) as reply:
            if reply.status != HTTPStatus.OK:
                return None
            return await read_at_most(reply, _MOST_BYTES, f"{path} of {instance.name}")


def _url(instance: Instance, path: str) -> str:
    return instance.entry.url.rstrip("/") + path
