"""Headless Chromium for tests of pages: the one that is installed, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["BrowserUnavailableError", "browser"]

_NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium looks for its maker's servers otherwise; a test machine may have no way there.
_ARGUMENTS: Final = ("--disable-gpu", "--disable-quic", "--disable-sync")


class BrowserUnavailableError(Exception):
    """There is no browser here; the message says what to install."""


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Chromium from the PATH, or the one that XLLM_CHROMIUM names.

    Raises:
        BrowserUnavailableError: it is not installed, or playwright is not.
    """
    try:
        from playwright.async_api import async_playwright
    except ImportError as error:
        raise BrowserUnavailableError(f"needs playwright ({error}): pip install it") from error
    named = os.environ.get("XLLM_CHROMIUM")
    found = [path for name in ((named,) if named else _NAMES) if (path := shutil.which(name))]
    if not found:
        raise BrowserUnavailableError(
            f"needs Chromium, and there is no {named or _NAMES[0]} here: install it "
            "(Debian: apt-get install chromium), or set XLLM_CHROMIUM to its path"
        )
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=found[0], args=[*_ARGUMENTS])
        try:
            yield launched
        finally:
            await launched.close()
