"""Against a real server on loopback that breaks connections when told to."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from xllm_plugin.errors import DownloadError
from xllm_plugin.models.download import Downloader, part_path


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as made:
        yield made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "wheels" / "some-1.0-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def downloader(client: httpx.Client, reporter: Any, attempts: int = 3) -> Downloader:
    return Downloader(client, reporter, attempts=attempts, pause=lambda _: None)


def test_whole_file(client: Any, reporter: Any, server: Any, target: Path) -> None:
    digest = sha256(server.content)
    assert downloader(client, reporter).fetch(server.url, target, digest) == target
    assert target.read_bytes() == server.content
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert reporter.counted == len(server.content)


def test_dropped_connection_is_resumed(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    server.cuts = [150_000, 100_000]
    downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content
    assert server.ranges == [None, "bytes=150000-", "bytes=250000-"]
    assert "trying again" in reporter.text
    assert "resuming" in reporter.text


def test_given_up_download_keeps_its_part_and_the_next_run_resumes(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    server.cuts = [150_000]
    with pytest.raises(DownloadError, match=r"150,000 bytes are kept.*again to resume"):
        downloader(client, reporter, attempts=1).fetch(server.url, target, sha256(server.content))
    assert [path.name for path in target.parent.iterdir()] == [part_path(target).name]
    downloader(client, reporter, attempts=1).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content
    assert server.ranges[1] == "bytes=150000-"


def test_server_without_ranges_starts_again(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    server.cuts = [150_000]
    server.honours_range = False
    downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content


def test_wrong_sha256_leaves_nothing(client: Any, reporter: Any, server: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match=f"expected {'0' * 64}"):
        downloader(client, reporter).fetch(server.url, target, "0" * 64)
    assert list(target.parent.iterdir()) == []
    assert len(server.ranges) == 1


@pytest.mark.parametrize("size", [1000, 300_000, 400_000], ids=["shorter", "as long", "longer"])
def test_part_of_another_file_is_dropped(
    client: Any, reporter: Any, server: Any, target: Path, size: int
) -> None:
    target.parent.mkdir()
    part_path(target).write_bytes(b"x" * size)
    downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content


def test_complete_part_needs_no_transfer(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    target.parent.mkdir()
    part_path(target).write_bytes(server.content)
    downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content


def test_server_in_trouble_is_asked_again(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    server.statuses = [503, 429]
    downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    assert target.read_bytes() == server.content


def test_refusal_is_final_and_hides_credentials(
    client: Any, reporter: Any, server: Any, target: Path
) -> None:
    server.statuses = [403]
    url = server.url.replace("http://", "http://user:secret@")
    with pytest.raises(DownloadError, match=r"answered 403.*pip download") as raised:
        downloader(client, reporter).fetch(url, target, sha256(server.content))
    assert "secret" not in str(raised.value)
    assert len(server.ranges) == 1


def test_nobody_listens(client: Any, reporter: Any, target: Path) -> None:
    with pytest.raises(DownloadError, match="after 3 attempts: ConnectError"):
        downloader(client, reporter).fetch("http://127.0.0.1:9/a.whl", target, "0" * 64)
    assert list(target.parent.iterdir()) == []


def test_local_file(client: Any, reporter: Any, tmp_path: Path, target: Path) -> None:
    source = tmp_path / "a file.whl"
    source.write_bytes(b"content")
    downloader(client, reporter).fetch(source.as_uri(), target, sha256(b"content"))
    assert target.read_bytes() == b"content"


def test_absent_local_file(client: Any, reporter: Any, tmp_path: Path, target: Path) -> None:
    with pytest.raises(DownloadError, match="find-links"):
        downloader(client, reporter).fetch((tmp_path / "a.whl").as_uri(), target, "0" * 64)


def test_full_disk_is_named(client: Any, reporter: Any, server: Any, target: Path) -> None:
    """A file-size limit makes the kernel refuse the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(DownloadError, match=r"cannot be written.*--cache-dir"):
            downloader(client, reporter).fetch(server.url, target, sha256(server.content))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not target.exists()
