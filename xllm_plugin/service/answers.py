"""What the service shows instances when it asks by itself, and how much of an answer it reads."""

from __future__ import annotations

import aiohttp

from xllm_plugin.service.config import InstancesConfig

__all__ = ["authorization", "read_at_most"]


def authorization(config: InstancesConfig) -> dict[str, str]:
    """The header with the key for instances; empty without one."""
    key = config.api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


async def read_at_most(reply: aiohttp.ClientResponse, num_bytes: int, what: str) -> bytes:
    """The body of an answer.

    Args:
        reply: whose body nobody has begun to read.
        num_bytes: that it may have; nobody's memory is filled by another's answer.
        what: was asked, for the message.

    Raises:
        ValueError: it has more; also aiohttp's errors.
    """
    body = bytearray()
    async for part in reply.content.iter_any():
        body += part
        if len(body) > num_bytes:
            raise ValueError(f"{what} answers over {num_bytes} bytes")
    return bytes(body)
