"""Chunks that are known by their bytes alone: exactly those that a parser takes for one chunk."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xllm_plugin.service.chunks import chunk_of, content_start

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Body:
    """What the parser hears."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.num_chunks = 0

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_chunk_complete(self) -> None:
        self.num_chunks += 1


@pytest.mark.parametrize("size", [*range(1, 300), 4080, 4081, 4088, 4089, 5000])
def test_a_whole_chunk_is_known(size: int) -> None:
    """Up to a size; where its content begins is where the parser finds it."""
    content = b"x" * size
    chunk = b"%x\r\n%b\r\n" % (size, content)
    start = content_start(chunk)
    if start:
        assert chunk[start:-2] == content
    assert bool(start) == (len(chunk) < 4096)
    assert chunk_of(size, content, b"\r\n") == chunk


@given(
    line=st.sampled_from([b"%x", b"%X", b"0%x", b" %x", b"+%x", b"%x;a=b", b"%x ", b"%x\r"]),
    size=st.integers(0, 600),
    change=st.integers(-3, 3),
    end=st.sampled_from([b"\r\n", b"\n", b"", b"\r\n\r\n", b"ab"]),
    fill=st.sampled_from([b"x", b"\r\n", b"0\r\n\r\n"]),
)
@example(line=b"%x", size=0, change=0, end=b"\r\n", fill=b"x")
def test_nothing_else_is_taken_for_one(
    line: bytes, size: int, change: int, end: bytes, fill: bytes
) -> None:
    content = (fill * size)[:size]
    data = line % max(0, size + change) + b"\r\n" + content + end
    start = content_start(data)
    if not start:
        return
    body = Body()
    parser = httptools.HttpResponseParser(body)
    parser.feed_data(HEAD)
    parser.feed_data(data)
    assert b"".join(body.parts) == data[start:-2]
    assert body.num_chunks == 1
    parser.feed_data(b"1\r\ny\r\n")  # and it ends there
    assert body.num_chunks == 2


def test_what_begins_with_no_number_is_no_chunk() -> None:
    for length in range(3, 4100):
        assert not content_start(b"-" + b"x" * (length - 3) + b"\r\n")
        assert not content_start(b"x" * length)
