"""Chunks of an answer (RFC 9112, 7.1), told by their bytes alone.

Servers write an event as one chunk, and it mostly comes as one read.  Such a chunk needs no parser:
its length says what its first line has to be.  What looks any different is the parser's to read.
"""

from __future__ import annotations

from typing import Final

__all__ = ["chunk_of", "content_start"]

_END: Final = b"\r\n"
_MAX_BYTES: Final = 4096
_NO_LINE: Final = b""  # then the content would begin at 0


def _size_line(num_bytes: int) -> bytes:
    """As uvicorn has it: lower case, no zeros before, no extensions."""
    return b"%x\r\n" % num_bytes


_SIZE_LINES: Final = tuple(_size_line(size) for size in range(_MAX_BYTES))
_LINE_OF_LENGTH: Final = [_NO_LINE] * _MAX_BYTES
"""Length of a chunk with its framing -> its first line.  Of the last chunk there is none."""
for _size, _line in enumerate(_SIZE_LINES[1:], start=1):
    if len(_line) + _size + len(_END) < _MAX_BYTES:
        _LINE_OF_LENGTH[len(_line) + _size + len(_END)] = _line


def content_start(data: bytes) -> int:
    """Where the content of the chunk `data` begins; 0 if it is not one whole chunk, or unusual."""
    if len(data) >= _MAX_BYTES:
        return 0
    line = _LINE_OF_LENGTH[len(data)]
    start = len(line)
    return start if data[:start] == line and data[-2:] == _END else 0


def chunk_of(num_bytes: int, *parts: bytes) -> bytes:
    """A chunk.

    Args:
        num_bytes: of its content.
        parts: of the content, and after it the end of its line.
    """
    line = _SIZE_LINES[num_bytes] if num_bytes < _MAX_BYTES else _size_line(num_bytes)
    return b"".join((line, *parts))
