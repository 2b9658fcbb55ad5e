"""Fetch one file of known sha256, in as many pieces as the network makes of it.

What has arrived is kept in `FILE.part`; the next attempt asks for the rest with a Range request.
The target appears by a rename, after its sha256 was seen to be right, so a file that is there is
whole.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from xllm_plugin.errors import DownloadError
from xllm_plugin.models.manifest import sha256_of_file
from xllm_plugin.models.progress import Reporter

if TYPE_CHECKING:
    import httpx

__all__ = ["Downloader", "part_path"]

BLOCK_BYTES = 1 << 20

# Statuses worth another attempt: time-out, too many requests, and servers in trouble.
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


def part_path(target: Path) -> Path:
    """Return where the beginning of `target` is kept while it is not whole."""
    return target.with_name(f"{target.name}.part")


class _AttemptError(Exception):
    """An attempt ended early; another may get further."""


@dataclass(frozen=True, slots=True)
class Downloader:
    """Downloads files into a folder.

    Attributes:
        client: carries TLS and time-outs; closed by whoever made it.
        reporter: told of progress and of retries.
        attempts: how often one file is tried before giving up.
        pause: called with seconds between attempts.
    """

    client: httpx.Client
    reporter: Reporter
    attempts: int = 5
    pause: Callable[[float], None] = field(default=time.sleep)

    def fetch(self, url: str, target: Path, sha256: str) -> Path:
        """Bring `url` (http, https, file) to `target` and return it.

        Raises:
            DownloadError: the server does not deliver the file, not all of it, or another one.
                Of the file, only `.part` is left, and only when resuming can succeed.
        """
        part = part_path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        reason = "no attempt was made"
        for attempt in range(self.attempts):
            if attempt:
                self.reporter.say(f"{target.name}: {reason}; trying again")
                self.pause(min(2.0**attempt, 15.0))
            try:
                resumed_bytes = self._append(url, part)
            except _AttemptError as error:
                reason = str(error)
                continue
            found = sha256_of_file(part)
            if found == sha256:
                part.replace(target)
                return target
            part.unlink()
            reason = f"sha256 is {found}, expected {sha256}"
            if not resumed_bytes:
                raise DownloadError(
                    f"{_shown(url)} is not the file this version was made for: {reason}. "
                    "Nothing was kept; check which index `python -m pip config list` names"
                )
        raise DownloadError(self._gave_up(url, part, reason))

    def _gave_up(self, url: str, part: Path, reason: str) -> str:
        kept_bytes = part.stat().st_size if part.exists() else 0
        kept = f"The first {kept_bytes:,} bytes are kept in {part}. " if kept_bytes else ""
        return (
            f"download of {_shown(url)} failed after {self.attempts} attempts: {reason}. "
            f"{kept}Run the same command again to {'resume' if kept_bytes else 'retry'}"
        )

    def _append(self, url: str, part: Path) -> int:
        """Bring what `part` lacks; return how many bytes were there before."""
        try:
            if urlsplit(url).scheme == "file":
                return self._copy(Path(url2pathname(urlsplit(url).path)), part)
            return self._request(url, part)
        except OSError as error:
            kind = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise DownloadError(
                f"{part} cannot be written: {kind}. Make room or choose another folder with "
                "--cache-dir, then run the same command again to resume"
            ) from error

    def _copy(self, source: Path, part: Path) -> int:
        if not source.is_file():
            raise DownloadError(f"pip names {source}, which is not there; check `find-links`")
        with (
            source.open("rb") as reading,
            self.reporter.bar(f"copying {source.name}", source.stat().st_size, is_bytes=True) as go,
        ):
            _write(part, 0, iter(lambda: reading.read(BLOCK_BYTES), b""), go)
        return 0

    def _request(self, url: str, part: Path) -> int:
        import httpx

        have_bytes = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}
        if have_bytes:
            headers["Range"] = f"bytes={have_bytes}-"
        try:
            with self.client.stream("GET", url, headers=headers) as response:
                return self._receive(response, part, have_bytes)
        except httpx.TransportError as error:
            raise _AttemptError(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise DownloadError(f"pip names {_shown(url)}, which is no URL: {error}") from error

    def _receive(self, response: httpx.Response, part: Path, have_bytes: int) -> int:
        status = response.status_code
        if status in RETRIED_STATUSES:
            raise _AttemptError(f"the server answered {status} {response.reason_phrase}")
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # whole, or of another file
            return have_bytes
        if not response.is_success:
            raise DownloadError(_refusal(response))
        start = have_bytes if _continues_at(response, have_bytes) else 0
        total = start + int(response.headers.get("Content-Length", 0))
        title = f"{'resuming' if start else 'downloading'} {part.stem}"
        with self.reporter.bar(title, total, done=start, is_bytes=True) as advance:
            # Without a block size: httpx would hold back, and lose, a block that is not full.
            _write(part, start, response.iter_raw(), advance)
        return start


def _continues_at(response: httpx.Response, offset: int) -> bool:
    """Say whether the body is the rest of the file from `offset` on, rather than all of it."""
    content_range = str(response.headers.get("Content-Range", ""))
    is_part = response.status_code == HTTPStatus.PARTIAL_CONTENT
    return is_part and content_range.startswith(f"bytes {offset}-")


def _write(part: Path, start: int, blocks: Iterator[bytes], advance: Callable[[int], Any]) -> None:
    """Write `blocks` to `part` from byte `start` on, dropping what was there after it."""
    with part.open("r+b" if start else "wb") as writing:
        writing.seek(start)
        writing.truncate()
        for block in blocks:
            writing.write(block)
            advance(len(block))


def _refusal(response: httpx.Response) -> str:
    hint = ""
    if response.status_code in {401, 403}:
        hint = (
            ". The index wants credentials, which pip keeps to itself: put the wheel into the "
            "cache folder's wheels/ with `pip download --no-deps`, then run this again"
        )
    url = _shown(str(response.url))
    return f"{url} answered {response.status_code} {response.reason_phrase}{hint}"


def _shown(url: str) -> str:
    """Return `url` without user name, password and query."""
    split = urlsplit(url)
    return split._replace(netloc=split.netloc.rpartition("@")[2], query="", fragment="").geturl()
