"""The access log: one JSON object a request, with neither what was asked nor any secret.

Nothing of a body is in it but its length, and of the headers only `x-request-id`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from logging.handlers import WatchedFileHandler
from pathlib import Path
from select import PIPE_BUF
from typing import TYPE_CHECKING, Final

import msgspec

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.access_line import AccessLine

if TYPE_CHECKING:
    from xllm_plugin.service.exchange import Exchange
    from xllm_plugin.service.telemetry import Ending

__all__ = ["log", "open_log"]

logger = logging.getLogger("xllm_plugin.service.access")
_other: Final = logging.getLogger(__name__)

_MAX_ID_CHARS: Final = 128
_MAX_MODEL_CHARS: Final = 256
_LOOK_S: Final = 1.0
"""Between two looks whether the file was moved."""


def open_log(path: Path | None) -> None:
    """Send the lines, and nothing else, to a file, or to standard output.

    A file that was moved or removed is opened anew, so that it can be rotated.

    Raises:
        ConfigError: the file cannot be opened.
    """
    try:
        handler = (
            WatchedFileHandler(path, encoding="utf-8")
            if path
            else logging.StreamHandler(sys.stdout)
        )
    except OSError as error:
        raise ConfigError(
            f"log.access_file {path} cannot be opened ({error.strerror or error}); name a file "
            "that this user can write."
        ) from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    for earlier in tuple(logger.handlers):
        logger.removeHandler(earlier)
        earlier.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Writer:
    """Writes at once what one turn of the event loop has logged.

    A log record, its caller and its format would cost more than all that a line says.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looked_s = 0.0

    def add(self, line: str, loop: asyncio.AbstractEventLoop) -> None:
        """Write `line` before anything else is read."""
        self._lines.append(line)
        if len(self._lines) == 1 or self._loop is not loop:
            self._loop = loop
            loop.call_soon(self._write)

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        now_s = time.monotonic()
        is_late = now_s - self._looked_s > _LOOK_S
        if is_late:
            self._looked_s = now_s
        for handler in logger.handlers:
            if not isinstance(handler, logging.StreamHandler):
                continue
            try:
                if is_late and isinstance(handler, WatchedFileHandler):
                    handler.reopenIfNeeded()
                for text in _joined(lines):
                    stream = handler.stream
                    if stream is None:  # it could not be opened anew; this tries again
                        handler.handle(logging.makeLogRecord({"msg": text[:-1]}))
                        continue
                    stream.write(text)
                    stream.flush()
            except OSError as error:
                _other.error("the access log cannot be written: %s", error)


def _joined(lines: list[str]) -> list[str]:
    """As few texts as can be written one by one: of two processes' they do not mix in a pipe.

    A longer line (of a path of kilobytes) stands alone.
    """
    texts: list[str] = []
    start = num_bytes = 0
    for index, line in enumerate(lines):
        if num_bytes and num_bytes + len(line) > PIPE_BUF:
            texts.append("".join(lines[start:index]))
            start, num_bytes = index, 0
        num_bytes += len(line)
    if lines:
        texts.append("".join(lines[start:]))
    return texts


_writer: Final = _Writer()
_encoder: Final = msgspec.json.Encoder()


def log(exchange: Exchange, ending: Ending) -> None:
    """Write the line of a finished request."""
    line = _encoded(_described(exchange, ending))
    if logger.propagate:  # it was not opened: where it goes is for who embeds the service to say
        logger.info("%s", line)
    else:
        _writer.add(line + "\n", exchange.proxy.loop)


def _encoded(line: AccessLine) -> str:
    """As ASCII: what clients name their models is none of the locale's that the output has."""
    text = _encoder.encode(line).decode()
    if text.isascii():
        return text
    return json.dumps(msgspec.to_builtins(line), separators=(",", ":"))


def _described(exchange: Exchange, ending: Ending) -> AccessLine:
    duration_s = exchange.proxy.loop.time() - exchange.started_s
    peer, decision, stream = exchange.client.peer, exchange.decision, exchange.stream
    given_id = exchange.noted.get(b"x-request-id", b"").decode("latin-1")[:_MAX_ID_CHARS]
    names = [instance.name for instance in exchange.visited]
    return AccessLine(
        time=int(time.time() * 1e3) / 1e3,
        id=given_id or f"{exchange.draw:016x}",
        response_id=(stream.id if stream else "") or None,
        client=peer[0] if peer else "",
        method=exchange.method.decode("latin-1"),
        path=exchange.route.path,
        status=exchange.status,
        ending=ending,
        model=(exchange.model or "")[:_MAX_MODEL_CHARS] or None,
        instance=names[-1] if names else None,
        instances=names,
        tenant=exchange.grant.tenant if exchange.grant else None,
        cause=decision.cause if decision else None,
        continued=stream.num_resumes if stream else 0,
        request_bytes=len(exchange.body),
        response_bytes=exchange.num_bytes,
        prompt_tokens=exchange.num_prompt_tokens or None,
        output_tokens=exchange.num_output_tokens or None,
        queue_ms=_queue_ms(exchange),
        ttft_ms=_in_ms(exchange.ttft_s) if exchange.ttft_s > 0 else None,
        duration_ms=_in_ms(duration_s),
    )


def _in_ms(seconds: float) -> float:
    """With two decimals; `round` costs five times as much."""
    return int(seconds * 1e5 + 0.5) / 100


def _queue_ms(exchange: Exchange) -> float | None:
    """Time in the service's queue; None if it did not wait, or was never sent."""
    waiting = exchange.waiting
    return _in_ms(waiting.waited_s) if waiting and waiting.waited_s >= 0 else None
