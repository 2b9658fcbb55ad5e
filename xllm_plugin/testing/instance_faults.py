"""What a broken instance answers: one script a fault, the same over fakes and over processes."""

from __future__ import annotations

from typing import Final

from xllm_plugin.testing.fake_instance import Script, answer, answer_raw

__all__ = ["BEFORE_AN_ANSWER", "BUSY", "HALF_ANSWERS", "STREAM_HEAD"]

STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)
BUSY: Final = answer(b'{"busy":1}', "503 Service Unavailable")

BEFORE_AN_ANSWER: Final[dict[str, Script]] = {
    "closes the connection": answer_raw(close=True),
    "garbage": answer_raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "half a head": answer_raw(b"HTTP/1.1 200 OK\r\nContent-Le", close=True),
    "a length that is no number": answer_raw(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"),
    "two lengths": answer_raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"
    ),
    "a head without end": answer_raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000),
    "another protocol": answer_raw(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n"
    ),
}
"""Nothing of an answer has come: another instance can be asked."""

HALF_ANSWERS: Final[dict[str, bytes]] = {
    "half a chunk": STREAM_HEAD + b"20\r\ndata: half a chu",
    "half a chunk size": STREAM_HEAD + b"9\r\ndata: a\n\n\r\n5",
    "a length that is too long": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    "chunks without an end": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"
    ),
}
"""Then the connection is closed."""
