"""`make screenshot`: docs/dashboard.png, the page over a real service and scripted instances."""

from __future__ import annotations

import argparse
import asyncio
import io
import sys
from pathlib import Path

from PIL import Image
from playwright.async_api import ViewportSize

from xllm_plugin.testing.browser import BrowserUnavailableError, browser
from xllm_plugin.testing.busy_service import TOKEN, busy_service, drain

NUM_INSTANCES = 6
SIZE = ViewportSize(width=1400, height=1000)
MAX_BYTES = 200_000


async def photograph(seconds: float) -> bytes:
    """A PNG of the page after a load of so many seconds, in which one instance dies."""
    gap_s = 0.08
    targets = {"ttft_ms": 150, "tpot_ms": 25}
    async with busy_service(NUM_INSTANCES, sample_interval_s=seconds / 100, slo=targets) as busy:
        load = asyncio.create_task(busy.load(int(1.5 * seconds / gap_s), gap_s))
        await asyncio.sleep(seconds / 2)
        drain(busy, 4)
        await busy.instances[5].die()
        async with browser() as chromium:
            tab = await chromium.new_page(viewport=SIZE, color_scheme="light", locale="en-GB")
            await tab.goto(f"{busy.url}#token={TOKEN}")
            await tab.get_by_text("known").wait_for()
            await tab.get_by_label("Show").select_option("0")
            await asyncio.sleep(seconds / 2 - 8)
            picture = await tab.screenshot(full_page=True)
        await load
        return picture


def main() -> int:
    """Write the picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of load")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"))
    arguments = parser.parse_args()
    try:
        picture = asyncio.run(photograph(arguments.seconds))
    except BrowserUnavailableError as error:
        sys.stderr.write(f"screenshot: {error}.\n")
        return 1
    # A page has few colours: 128 of them look the same in a third of the bytes.
    few = Image.open(io.BytesIO(picture)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(arguments.out, optimize=True)
    size_bytes = arguments.out.stat().st_size
    sys.stderr.write(f"screenshot: {arguments.out}, {size_bytes} bytes\n")
    return 0 if size_bytes <= MAX_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
