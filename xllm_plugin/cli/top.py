"""`xllm top`: running engines at a glance, from their sockets or through a server's HTTP port."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import click
import httpx
import msgspec
from rich.console import Console
from rich.live import Live

from xllm_plugin.channel.client import ChannelClient
from xllm_plugin.channel.messages import Reading, Readings
from xllm_plugin.channel.paths import EngineSocket, channel_directory, find_engines
from xllm_plugin.cli.top_view import Rates, frame
from xllm_plugin.errors import ChannelError

__all__ = ["sockets_at", "top"]

_TIMEOUT_S = 1.0

Source = Callable[[], Readings]


@click.command()
@click.option(
    "--socket",
    "socket",
    type=click.Path(path_type=Path),
    help="One engine's socket, or a directory of sockets.",
)
@click.option("--url", help="A server's address, as http://host:8000, instead of sockets.")
@click.option("--once", is_flag=True, help="Show what is now, and end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a look, for scripts.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    help="Seconds between looks.",
)
def top(
    socket: Path | None, url: str | None, *, once: bool, as_json: bool, interval_s: float
) -> None:
    """Watch this user's engines (default), one socket's, or one server's.  q ends it."""
    if socket is not None and url is not None:
        raise click.UsageError("--socket and --url exclude each other; give one.")
    source = _source(socket, url)
    readings = source()
    if not readings.engines:
        raise ChannelError(_nothing_found(socket))
    if not any(reading.snapshot for reading in readings.engines):
        raise ChannelError("; ".join(reading.error or "" for reading in readings.engines))
    if once:
        _show_once(readings, as_json=as_json)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _watch(source, readings, interval_s, as_json=as_json)


def _source(socket: Path | None, url: str | None) -> Source:
    if url is not None:
        address = url
        return lambda: _read_url(address)
    return lambda: _read_sockets(sockets_at(socket))


def sockets_at(socket: Path | None) -> list[EngineSocket]:
    """The sockets of a directory (this user's by default), or the one socket."""
    if socket is None or socket.is_dir():
        return find_engines(socket)
    return [EngineSocket("", 0, socket)]


def _read_sockets(sockets: list[EngineSocket]) -> Readings:
    readings = []
    for entry in sockets:
        try:
            with ChannelClient(entry.path, _TIMEOUT_S) as client:
                snapshot = client.snapshot()
        except ChannelError as error:
            readings.append(Reading(dp_rank=entry.dp_rank, error=str(error)))
            continue
        age_s = snapshot.age_s(time.monotonic())
        readings.append(Reading(dp_rank=snapshot.engine.dp_rank, snapshot=snapshot, age_s=age_s))
    return Readings(engines=tuple(readings))


def _read_url(url: str) -> Readings:
    address = f"{url.rstrip('/')}/xllm/snapshot"
    try:
        is_here = httpx.URL(url).host in {"localhost", "127.0.0.1", "::1"}
        response = httpx.get(address, timeout=2 * _TIMEOUT_S, trust_env=not is_here)
    # ImportError: the environment names a proxy that httpx needs a further package for.
    except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:
        raise ChannelError(
            f"no answer from {address}: {error}. Is a server running there, and is the address "
            "of the form http://host:port?"
        ) from error
    if response.status_code != httpx.codes.OK:
        raise ChannelError(
            f"{address} answered {response.status_code}: {response.text[:300]}. A server started "
            "with `xllm serve MODEL` has this route while its engine lives."
        )
    try:
        return msgspec.json.decode(response.content, type=Readings)
    except msgspec.DecodeError as error:
        raise ChannelError(
            f"{address} answered, but not with snapshots: {error}. Is that an xllm server?"
        ) from error


def _nothing_found(socket: Path | None) -> str:
    directory = socket or channel_directory()
    return (
        f"no engine is running: no live socket named *.dp<rank>.sock in {directory}. "
        "Start one with `xllm serve MODEL`; for an engine on another machine or of another user "
        "give --url http://host:port."
    )


def _show_once(readings: Readings, *, as_json: bool) -> None:
    if as_json:
        _print_json(readings)
    else:
        Console().print(frame(readings, Rates()))


def _print_json(readings: Readings) -> None:
    click.echo(msgspec.json.encode(readings, enc_hook=str).decode())


def _watch(source: Source, first: Readings, interval_s: float, *, as_json: bool) -> None:
    """Look every `interval_s` until q or ctrl-C."""
    rates = Rates()
    with _Keys(sys.stdin) as keys, _display(as_json=as_json) as show:
        readings = first
        while True:
            rates.update(readings)
            show(readings, rates)
            if keys.wait_for_quit(interval_s):
                return
            readings = _look_again(source)


def _look_again(source: Source) -> Readings:
    """A look whose failure is shown instead of ending the watch: engines restart."""
    try:
        return source()
    except ChannelError as error:
        return Readings(engines=(Reading(dp_rank=0, error=str(error)),))


@contextlib.contextmanager
def _display(*, as_json: bool) -> Iterator[Callable[[Readings, Rates], None]]:
    if as_json:
        yield lambda readings, _: _print_json(readings)
        return
    with Live(auto_refresh=False, screen=sys.stdout.isatty()) as live:
        yield lambda readings, rates: live.update(frame(readings, rates, _hint()), refresh=True)


def _hint() -> str:
    return "q: quit" if sys.stdin.isatty() else ""


class _Keys:
    """Waits for a key without echo or Enter; only waits where there is no terminal."""

    def __init__(self, stream: object) -> None:
        self._fd = _terminal_fd(stream)
        self._saved: list[object] | None = None

    def __enter__(self) -> Self:
        if self._fd is not None:
            self._saved = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None and self._saved is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]

    def wait_for_quit(self, timeout_s: float) -> bool:
        """Wait for up to `timeout_s`; True at once when q is pressed."""
        if self._fd is None:
            time.sleep(timeout_s)
            return False
        deadline_s = time.monotonic() + timeout_s
        while (remaining_s := deadline_s - time.monotonic()) > 0:
            if select.select([self._fd], [], [], remaining_s)[0]:
                key = os.read(self._fd, 1)
                if key in (b"q", b"Q", b""):
                    return True
        return False


def _terminal_fd(stream: object) -> int | None:
    try:
        fd = stream.fileno()  # type: ignore[attr-defined]  # no stream has one when stdin is closed
    except (AttributeError, OSError, ValueError):
        return None
    return fd if os.isatty(fd) else None
