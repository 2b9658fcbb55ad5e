"""The page's files: open, locked down, and in need of nobody else."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from xllm_plugin.service.dashboard import pages

STATIC = files("xllm_plugin.service.dashboard") / "static"


def test_every_file_is_served_with_a_strict_policy(run: Any) -> None:
    async def check() -> None:
        application = web.Application()
        application.add_routes(pages.routes())
        async with TestClient(TestServer(application)) as client:
            served = set()
            for path in pages.PATHS:
                reply: aiohttp.ClientResponse = await client.get(path, allow_redirects=False)
                if reply.status == 308:
                    assert reply.headers["Location"] == "../dashboard"
                    continue
                assert reply.status == 200
                policy = reply.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; ")
                assert "unsafe" not in policy
                assert "*" not in policy
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
                served.add(await reply.read())
            assert served == {one.read_bytes() for one in STATIC.iterdir()}

    run(check())


def test_nothing_is_loaded_from_elsewhere_or_written_in_line() -> None:
    for one in STATIC.iterdir():
        text = one.read_text()
        urls = set(re.findall(r"https?://[^\"' )]+", text))
        assert urls <= {"http://www.w3.org/2000/svg"}, one.name  # a name, never fetched
        assert "innerHTML" not in text
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
