"""The page in a real browser, over a real service: what a person sees and can do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from xllm_plugin.testing.browser import BrowserUnavailableError, browser, find_browser
from xllm_plugin.testing.busy_service import TOKEN, BusyService, busy_service, drain

pytestmark = pytest.mark.e2e

PATIENCE_MS = 60_000


@pytest.fixture(autouse=True)
def _has_browser() -> None:
    try:
        find_browser()
    except BrowserUnavailableError as error:
        pytest.skip(str(error))


@asynccontextmanager
async def opened(busy: BusyService, *, address: str = "", **context: Any) -> AsyncIterator[Any]:
    """A tab with the page; fails if it complains, or asks anybody but the service."""
    async with browser() as chromium:
        tab = await (await chromium.new_context(locale="en-GB", **context)).new_page()
        tab.set_default_timeout(PATIENCE_MS)
        complaints: list[str] = []
        asked: set[str] = set()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        await tab.goto(busy.url + address)
        yield tab
        expected = ("401 (Unauthorized)", "ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE")
        assert [one for one in complaints if not any(part in one for part in expected)] == []
        assert asked == {urlsplit(busy.url).netloc}


async def row_names(tab: Any) -> list[str]:
    found: list[str] = await tab.locator("#instances tbody th").all_text_contents()
    return found


def test_it_asks_for_the_token_and_then_shows_what_happens(run: Any) -> None:
    async def check() -> None:
        async with busy_service(3) as busy:
            await busy.load(12, 0.02)
            stats = busy.service.fleet.get("gpu-00").stats
            for outcome in ("won", "lost", "lost"):
                stats.count_hedge(outcome)
            async with opened(busy) as tab:
                await tab.get_by_label("Admin token").fill("wrong")
                await tab.keyboard.press("Enter")
                await tab.get_by_text("This is not the token of the service.").wait_for()
                assert await tab.locator("#view").is_hidden()
                await tab.get_by_label("Admin token").fill(TOKEN)
                await tab.keyboard.press("Enter")
                await tab.get_by_text("Nothing is degraded.").wait_for()
                assert await row_names(tab) == ["gpu-00", "gpu-01", "gpu-02"]
                assert TOKEN not in tab.url
                await tab.reload()  # the tab remembers
                await tab.get_by_text("Nothing is degraded.").wait_for()
                await _charts(tab)
                await _tables(tab)
                await _what_changes(tab, busy)

    run(check())


async def _charts(tab: Any) -> None:
    """Curves are drawn, and can be read without eyes and without a mouse."""
    chart = tab.get_by_role("img", name="Time to first token")
    assert "p50" in await chart.get_attribute("aria-label")
    curve = tab.locator("figure", has_text="Time to first token").locator("path.curve.first").last
    assert "M" in await curve.get_attribute("d")
    await chart.focus()
    await tab.keyboard.press("Home")
    await tab.keyboard.press("ArrowRight")
    said = await tab.locator("#spoken").text_content()
    assert "p50" in said
    assert "p90" in said


async def _tables(tab: Any) -> None:
    """Rows are sorted and filtered, decisions have their reasons."""
    first = tab.locator("#instances tbody tr").first
    assert "ready" in await first.text_content()
    assert "exact" in await first.text_content()
    assert "1 of 3" in await first.text_content(), "hedges"
    by_kv = tab.get_by_role("button", name="KV use")
    await by_kv.click()
    assert await row_names(tab) == ["gpu-00", "gpu-01", "gpu-02"]
    await by_kv.click()
    assert await row_names(tab) == ["gpu-02", "gpu-01", "gpu-00"]
    heading = tab.get_by_role("columnheader", name="KV use")
    assert await heading.get_attribute("aria-sort") == "descending"
    await tab.get_by_label("Filter").fill("GPU-01")
    assert await row_names(tab) == ["gpu-01"]
    await tab.get_by_label("Filter").fill("")
    assert "decode" in await tab.locator("#decisions tbody").text_content()
    assert "cost" in await tab.locator("#causes tbody").text_content()


async def _what_changes(tab: Any, busy: BusyService) -> None:
    """A drain, a death, and the service's own end show without a reload."""
    drain(busy, 1)
    await tab.locator("#instances tr", has_text="gpu-01").get_by_text("draining").wait_for()
    await busy.instances[0].die()
    await tab.locator("#troubles").get_by_text("Instance gpu-00: suspect").wait_for()
    await busy.service.stop()
    await tab.get_by_text("no answer since").wait_for()
    known = tab.locator("#instances tr", has_text="gpu-01")
    assert await known.is_visible()  # what was known stays


@pytest.mark.full
def test_the_printed_address_brings_the_token_and_does_not_keep_it(run: Any) -> None:
    async def check() -> None:
        async with (
            busy_service(1) as busy,
            opened(busy, address=f"#token={TOKEN}", color_scheme="dark") as tab,
        ):
            await tab.get_by_text("Nothing is degraded.").wait_for()
            assert TOKEN not in tab.url
            ground = await tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert max(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) < 64

    run(check())


@pytest.mark.full
@pytest.mark.parametrize("width", [400, 1400])
def test_a_hundred_instances_fit(run: Any, width: int) -> None:
    async def check() -> None:
        async with (
            busy_service(100, instances={"probe_interval_s": 5.0}) as busy,
            opened(
                busy, address=f"#token={TOKEN}", viewport={"width": width, "height": 900}
            ) as tab,
        ):
            await tab.get_by_text("100 known").wait_for()
            assert len(await row_names(tab)) == 100
            overflow = await tab.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert overflow <= 0
            await tab.get_by_label("Filter").fill("gpu-42")
            assert await row_names(tab) == ["gpu-42"]

    run(check())
