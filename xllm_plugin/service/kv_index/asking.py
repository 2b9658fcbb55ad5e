"""What instances are asked about prompts: the ids of one, and what it takes to find them here."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Final

import aiohttp
import msgspec

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
        headers = {"Content-Type": "application/json", **self._authorization()}
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
        headers = self._authorization()
        async with self._session.get(_url(instance, path), headers=headers) as reply:
            if reply.status != HTTPStatus.OK:
                return None
            body = bytearray()
            async for chunk in reply.content.iter_any():
                body += chunk
                if len(body) > _MOST_BYTES:
                    raise ValueError(f"{path} of {instance.name} has over {_MOST_BYTES:,} bytes")
            return bytes(body)

    def _authorization(self) -> dict[str, str]:
        key = self._config().instances.api_key
        return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


def _url(instance: Instance, path: str) -> str:
    return instance.entry.url.rstrip("/") + path
