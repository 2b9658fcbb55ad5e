"""Where sockets live, and who may use them."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.channel.paths import (
    channel_directory,
    find_engines,
    listen,
    remove_socket,
    require_private_directory,
    socket_path,
    sockets_in,
)
from xllm_plugin.errors import ChannelError, ConfigError


def leave_dead_socket(path: Path) -> None:
    """A process binds the path and dies without removing it."""
    code = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
    subprocess.run([sys.executable, "-S", "-c", code, str(path)], check=True)


def test_directory_is_the_users_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert channel_directory() == tmp_path / "xllm"


@pytest.mark.parametrize("value", ["", "relative", "/nowhere/at/all"])
def test_directory_without_a_usable_runtime_directory(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    assert channel_directory() == Path(tempfile.gettempdir()) / f"xllm-{os.getuid()}"


def test_path_names_instance_and_rank(tmp_path: Path) -> None:
    path = socket_path("a.b-1", 3, tmp_path)
    assert path == tmp_path / "a.b-1.dp3.sock"
    path.touch()
    (found,) = sockets_in(tmp_path)
    assert (found.instance_id, found.dp_rank, found.path) == ("a.b-1", 3, path)


@pytest.mark.parametrize("instance_id", ["", "a/b", "..", "ä", "x" * 41])
def test_ids_that_are_no_file_names_are_refused(instance_id: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be part of a file name"):
        socket_path(instance_id, 0, tmp_path)


def test_a_path_too_long_for_a_socket_is_refused_with_its_length(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has \d+ bytes; the system allows 107"):
        socket_path("e", 0, tmp_path / ("d" * 100))


def test_the_longest_path_allowed_works(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * (107 - len(os.fsencode(tmp_path)) - len("//e.dp0.sock")))
    path = socket_path("e", 0, directory)
    assert len(os.fsencode(path)) == 107
    listen(path).close()


def test_directory_is_made_private_and_socket_too(tmp_path: Path) -> None:
    path = tmp_path / "new" / "e.dp0.sock"
    with listen(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    with pytest.raises(ConfigError, match="has mode 0755, needs 0700"):
        require_private_directory(shared)


def test_a_link_and_a_file_in_place_of_the_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is no directory"):
        require_private_directory(link)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="is no directory"):
        require_private_directory(file)


def test_a_directory_that_cannot_be_made_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot create /proc/xllm"):
        require_private_directory(Path("/proc/xllm"))


def test_a_dead_engines_socket_is_replaced(directory: Path) -> None:
    path = directory / "e.dp0.sock"
    leave_dead_socket(path)
    with listen(path):
        assert [entry.path for entry in find_engines(directory)] == [path]


def test_dead_sockets_beside_a_new_one_are_removed_and_nothing_else(directory: Path) -> None:
    leave_dead_socket(directory / "killed.dp0.sock")
    (directory / "file.dp0.sock").touch()
    with listen(directory / "alive.dp0.sock"), listen(directory / "e.dp0.sock"):
        names = [path.name for path in sorted(directory.iterdir())]
    assert names == ["alive.dp0.sock", "e.dp0.sock", "file.dp0.sock"]


def test_a_live_engines_socket_is_an_error(directory: Path) -> None:
    path = directory / "e.dp0.sock"
    with listen(path), pytest.raises(ChannelError, match="an engine already listens at"):
        listen(path)


def test_a_file_in_the_sockets_place_is_left_alone(directory: Path) -> None:
    path = directory / "e.dp0.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists and is no socket"):
        listen(path)
    assert path.read_text() == "precious"


def test_finding_engines_drops_the_dead_and_ignores_the_rest(
    directory: Path, make_engine: Callable[..., Any]
) -> None:
    for instance_id, rank in (("b", 1), ("a", 0), ("b", 0)):
        make_engine(instance_id, rank).channel.start()
    leave_dead_socket(directory / "dead.dp0.sock")
    (directory / "notes.txt").touch()
    found = [(entry.instance_id, entry.dp_rank) for entry in find_engines(directory)]
    assert found == [("a", 0), ("b", 0), ("b", 1)]
    assert not (directory / "dead.dp0.sock").exists()
    assert (directory / "notes.txt").exists()


def test_without_a_directory_there_are_no_engines(tmp_path: Path) -> None:
    assert find_engines(tmp_path / "absent") == []


def test_the_default_directory_is_trusted_only_if_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert find_engines() == []
    (tmp_path / "xllm").mkdir()
    (tmp_path / "xllm").chmod(0o777)
    with pytest.raises(ConfigError, match="has mode 0777"):
        find_engines()


def test_removing_spares_a_successors_socket(directory: Path) -> None:
    path = directory / "e.dp0.sock"
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(path))
        remove_socket(path, path.stat().st_ino + 1)
        assert path.exists()
        remove_socket(path, path.stat().st_ino)
        assert not path.exists()
        remove_socket(path, 1)
