"""Headless Chromium for tests of pages: the one that is installed, driven by playwright."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["BrowserUnavailableError", "browser", "find_browser"]

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium looks for its maker's servers otherwise; a test machine may have no way there.
_ARGUMENTS: Final = ("--disable-gpu", "--disable-quic", "--disable-sync")


class BrowserUnavailableError(Exception):
    """There is no browser here; the message says what to install."""


def find_browser() -> str:
    """Path of Chromium: the one that XLLM_CHROMIUM names, else the one on the PATH.

    Raises:
        BrowserUnavailableError: it is not installed, or playwright is not.
    """
    if importlib.util.find_spec("playwright") is None:
        raise BrowserUnavailableError("needs playwright: pip install playwright")
    named = os.environ.get("XLLM_CHROMIUM")
    for name in (named,) if named else _NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BrowserUnavailableError(
        f"needs Chromium, and there is no {named or _NAMES[0]} here: install it "
        "(Debian: apt-get install chromium), or set XLLM_CHROMIUM to its path"
    )


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A Chromium of its own, without a profile.  Raises as `find_browser` does."""
    path = find_browser()
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=path, args=[*_ARGUMENTS])
        try:
            yield launched
        finally:
            await launched.close()
