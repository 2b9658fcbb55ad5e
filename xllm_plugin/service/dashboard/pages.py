"""Serves the files of the page.  They are the same for everybody and hold no data."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from aiohttp import web

__all__ = ["CONTENT_SECURITY_POLICY", "PATHS", "routes"]

_RULES: Final = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)
CONTENT_SECURITY_POLICY: Final = "; ".join(_RULES)
_HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
_FILES: Final = {
    "/dashboard": ("index.html", "text/html"),
    "/dashboard/dashboard.css": ("dashboard.css", "text/css"),
    "/dashboard/dashboard.js": ("dashboard.js", "text/javascript"),
    "/dashboard/charts.js": ("charts.js", "text/javascript"),
    "/dashboard/icon.svg": ("icon.svg", "image/svg+xml"),
}
_WITH_SLASH: Final = "/dashboard/"
PATHS: Final = frozenset({*_FILES, _WITH_SLASH})
"""They need no token."""


def routes() -> list[web.RouteDef]:
    """A route for each file, read once."""
    served = [_route(path, name, kind) for path, (name, kind) in _FILES.items()]
    return [*served, web.get(_WITH_SLASH, _without_slash)]


async def _without_slash(_: web.Request) -> web.Response:
    return web.Response(status=308, headers={"Location": "../dashboard"})


def _route(path: str, name: str, content_type: str) -> web.RouteDef:
    body = files(__package__).joinpath("static", name).read_bytes()

    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)

    return web.get(path, serve)
