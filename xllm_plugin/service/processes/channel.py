"""One end of the socket between the control process and a worker: length, then the message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

__all__ = ["Channel"]

_LENGTH_BYTES = 4
_MAX_UNSENT_BYTES = 2**20


class _Decoder(Protocol):
    def decode(self, data: bytes, /) -> Any: ...


class Channel(asyncio.Protocol):
    """Reads as bytes come, without a task, so that messages are handled in the order of events.

    A message that is not understood, or whose handler fails, closes the channel: the control
    process then takes the worker for dead, and a worker the control process.

    Args:
        decoder: of what the other side says.
        received: is called with each message.
        closed: is called once, when the other side has gone.
    """

    def __init__(
        self, decoder: _Decoder, received: Callable[[Any], None], closed: Callable[[], None]
    ) -> None:
        self._decode = decoder.decode
        self._received = received
        self._closed = closed
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @property
    def is_heard(self) -> bool:
        """Whether the other side takes in what is said; one that is stopped must cost no memory.

        Whoever says much asks first, and says what was missed when it is heard again.
        """
        transport = self._transport
        return transport is None or transport.get_write_buffer_size() < _MAX_UNSENT_BYTES

    def send(self, payload: bytes) -> None:
        """Send a message; nothing happens if the other side has gone, which `closed` says."""
        if self._transport is not None:
            self._transport.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)

    def close(self) -> None:
        """Send what is to be sent, then close."""
        if self._transport is not None:
            self._transport.close()

    # -- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends were open from the start."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """A part of a message, or several."""
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= _LENGTH_BYTES:
            body = start + _LENGTH_BYTES
            end = body + int.from_bytes(buffer[start:body], "little")
            if len(buffer) < end:
                break
            start = end
            self._received(self._decode(bytes(buffer[body:end])))
        del buffer[:start]

    def connection_lost(self, exception: Exception | None) -> None:
        """The other side has gone."""
        del exception
        self._transport = None
        self._closed()
