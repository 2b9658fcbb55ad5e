"""Where engines' sockets live, who may use them, and which of them still have an engine behind."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.channel.config import INSTANCE_ID_PATTERN, ChannelConfig
from xllm_plugin.errors import ChannelError, ConfigError

__all__ = [
    "MAX_PATH_BYTES",
    "EngineSocket",
    "channel_directory",
    "find_engines",
    "listen",
    "remove_socket",
    "require_private_directory",
    "socket_path",
    "sockets_in",
    "usable",
]

# sockaddr_un.sun_path has 108 bytes on Linux, the terminating zero included (unix(7)).
MAX_PATH_BYTES = 107
# Connecting takes microseconds; longer means a full backlog, hence a live engine.
_PROBE_TIMEOUT_S = 0.2
# Below vLLM's loggers, so that its handlers and level apply in its processes.
logger = logging.getLogger("vllm.xllm_plugin")

# What vLLM makes up as an instance id counts nanoseconds: nineteen digits.
LONGEST_OWN_ID = "0" * 19
_NAME = re.compile(rf"({INSTANCE_ID_PATTERN})\.dp(\d+)\.sock")


@dataclass(frozen=True, slots=True, order=True)
class EngineSocket:
    """One socket file and what its name says."""

    instance_id: str
    dp_rank: int
    path: Path


def channel_directory() -> Path:
    """This user's directory of sockets: `$XDG_RUNTIME_DIR/xllm`, else `<tempdir>/xllm-<uid>`.

    XDG_RUNTIME_DIR is used only if it is ours and writable: `sudo` and containers often leave it
    pointing at another user's.  The directory may not exist yet.
    """
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    if runtime.is_absolute() and _is_ours(runtime) and os.access(runtime, os.W_OK | os.X_OK):
        return runtime / "xllm"
    return Path(tempfile.gettempdir()) / f"xllm-{os.getuid()}"


def socket_path(instance_id: str, dp_rank: int, directory: Path | None = None) -> Path:
    """Path of the socket of one data-parallel rank.

    Raises:
        ConfigError: `instance_id` is no file name, or the whole path is too long for a socket.
    """
    if not re.fullmatch(INSTANCE_ID_PATTERN, instance_id):
        raise ConfigError(
            f"instance id {instance_id!r} cannot be part of a file name; accepted are up to 40 "
            "letters, digits, '_', '.' and '-', the first a letter or digit. "
            "Change channel.instance_id (XLLM_CHANNEL__INSTANCE_ID)."
        )
    path = (directory or channel_directory()) / f"{instance_id}.dp{dp_rank}.sock"
    _check_length(path)
    return path


def sockets_in(directory: Path) -> list[EngineSocket]:
    """Every file in `directory` named like an engine's socket, dead ones included, in order."""
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ChannelError(
            f"cannot look into {directory}: {error.strerror}. If it belongs to another user, run "
            "as that user."
        ) from error
    matches = (_NAME.fullmatch(name) for name in names)
    return sorted(
        EngineSocket(match[1], int(match[2]), directory / match[0]) for match in matches if match
    )


def usable(config: ChannelConfig) -> ChannelConfig:
    """Return the settings, with the channel off where the default directory cannot be used.

    A watcher's window is no reason not to serve, unless the user asked for this very window.

    Raises:
        ConfigError: the directory that the user named cannot be used.
    """
    if not config.enabled:
        return config
    directory = config.directory or channel_directory()
    try:
        require_private_directory(directory)
        socket_path(config.instance_id or LONGEST_OWN_ID, 0, directory)
    except ConfigError as error:
        if config.directory is not None or config.instance_id:
            raise
        logger.warning("The engine's control socket is off: %s", error)
        return config.model_copy(update={"enabled": False})
    return config


def find_engines(directory: Path | None = None) -> list[EngineSocket]:
    """This user's live engines; sockets whose engine is gone are removed on the way.

    Raises:
        ChannelError: the directory cannot be read.
        ConfigError: the default directory is not private; its sockets may be another user's.
    """
    if directory is None:
        directory = channel_directory()
        if directory.exists():
            _check_private(directory)
    with _locked(directory):
        return _drop_dead(directory)


def require_private_directory(directory: Path) -> None:
    """Make `directory` with mode 0700, or see that it has it and is ours.

    Raises:
        ConfigError: it is a link, not a directory, another user's, or open to others.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        pass  # something that is no directory, which the check below puts into words
    except OSError as error:
        raise ConfigError(
            f"cannot create {directory}: {error.strerror}. Name another directory in "
            "channel.directory (XLLM_CHANNEL__DIRECTORY)."
        ) from error
    _check_private(directory)


def _check_private(directory: Path) -> None:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        problem = "is no directory"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}, not to {os.getuid()}"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        problem = f"has mode {stat.S_IMODE(status.st_mode):04o}, needs 0700 (chmod 700)"
    else:
        return
    raise ConfigError(
        f"{directory} {problem}: other users could reach the engine's socket. Correct it, or name "
        "another directory in channel.directory (XLLM_CHANNEL__DIRECTORY)."
    )


def listen(path: Path) -> socket.socket:
    """A listening socket at `path` with mode 0600; dead engines' sockets beside it are removed.

    An engine that was killed leaves its file behind, and the next one has another name.

    Raises:
        ChannelError: a live process listens there.
        ConfigError: the path is too long, or its directory is not private.
    """
    _check_length(path)
    require_private_directory(path.parent)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _locked(path.parent):
            _drop_dead(path.parent)
            _clear(path)
            listener.bind(str(path))
            path.chmod(0o600)
            listener.listen(64)
            listener.setblocking(False)
    except BaseException:  # nobody else holds the listener yet, an interrupt or not; raised again
        listener.close()
        raise
    return listener


def remove_socket(path: Path, inode: int) -> None:
    """Remove the socket file, unless another engine has put its own there since."""
    with _locked(path.parent), contextlib.suppress(FileNotFoundError):
        if path.lstat().st_ino == inode:
            path.unlink()


def _drop_dead(directory: Path) -> list[EngineSocket]:
    """Remove the sockets nobody listens at; returns the others.  Needs the directory's lock."""
    live = []
    for entry in sockets_in(directory):
        if _is_live(entry.path):
            live.append(entry)
            continue
        # Cleaners of temporary folders may have been faster.
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(entry.path.lstat().st_mode):
                entry.path.unlink()
    return live


def _clear(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} exists and is no socket. Move it away, or choose another "
            "channel.instance_id (XLLM_CHANNEL__INSTANCE_ID)."
        )
    if _is_live(path):
        raise ChannelError(
            f"an engine already listens at {path}. Stop it, or give this one another "
            "channel.instance_id (XLLM_CHANNEL__INSTANCE_ID)."
        )
    path.unlink()


def _is_live(path: Path) -> bool:
    """Whether a process listens at `path`; True when in doubt, as the dead are removed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, so that only one finds a socket dead and replaces it."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:  # removed with everything in it: nothing is left to guard
        yield
        return
    except OSError as error:
        raise ChannelError(
            f"cannot look into {directory}: {error.strerror}. Name a directory of your own."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _check_length(path: Path) -> None:
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_PATH_BYTES:
        raise ConfigError(
            f"socket path {path} has {num_bytes} bytes; the system allows {MAX_PATH_BYTES}. Name a "
            "shorter directory in channel.directory (XLLM_CHANNEL__DIRECTORY), or a shorter "
            "instance_id."
        )


def _is_ours(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
