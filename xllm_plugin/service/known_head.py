"""The head of a client's last request: one with the same bytes means the same.

Most clients that keep a connection send the same head each time, but for the length of the body.
The parser has understood it once.  Comparing with the bytes that it has understood opens no way
around its rules: where they differ anywhere, the parser reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from xllm_plugin.service.exchange import Exchange
from xllm_plugin.service.keys import Account, Grant
from xllm_plugin.service.routes import Route

if TYPE_CHECKING:
    from xllm_plugin.service.client import ClientConnection
    from xllm_plugin.service.proxy import Proxy

__all__ = ["KnownHead"]

_LINE_END: Final = b"\r\n"
_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = b"content-length"
_MAX_DIGITS: Final = 12
_SPECIAL: Final = frozenset({b"upgrade", b"expect", b"transfer-encoding"})
"""Headers of requests that are left to the parser."""


class KnownHead(NamedTuple):
    """Bytes of a head, and what they have come to."""

    before: bytes
    """As the client has sent it, up to the digits of its body's length."""
    after: bytes
    """The rest of it."""
    settings: Any
    """Stand for what was in force when it was understood."""
    keys: Any
    method: bytes
    route: Route
    head: bytes
    keep_alive: bool
    noted: dict[bytes, bytes]
    content_type: bytes
    wants_reason: bool
    session_key: str
    promised: dict[str, str] | None
    account: Account | None

    @classmethod
    def of(
        cls, data: bytes, headers: Sequence[tuple[bytes, bytes]], exchange: Exchange
    ) -> Self | None:
        """What to know of a head; None if the next one like it could mean something else.

        Args:
            data: as read, from the first byte of the request on.
            headers: that the parser has found in it.
            exchange: as made of them; nothing of its body is read yet.
        """
        head, found, _ = data.partition(_HEAD_END)
        if not found or exchange.unframes or not exchange.noted.keys().isdisjoint(_SPECIAL):
            return None
        # Its lines are those that the parser has seen, so this is where it has seen the end.
        if any(head.count(end) != len(headers) for end in (_LINE_END, b"\r", b"\n")):
            return None
        lengths = [header for header in headers if header[0].lower() == _LENGTH]
        if len(lengths) != 1:
            return None
        name, digits = lengths[0]
        line = b"%b%b: " % (_LINE_END, name)
        before, found, after = (head + _HEAD_END).partition(line + digits + _LINE_END)
        if not found:  # written in another way
            return None
        grant, proxy = exchange.grant, exchange.proxy
        return cls(
            before + line,
            _LINE_END + after,
            proxy.config,
            _keys_in_force(proxy),
            exchange.method,
            exchange.route,
            exchange.head,
            exchange.keep_alive,
            exchange.noted,
            exchange.content_type,
            exchange.wants_reason,
            exchange.session_key,
            exchange.promised,
            grant.account if grant is not None else None,
        )

    def is_in_force(self, proxy: Proxy) -> bool:
        """Whether it would come to the same now."""
        return self.settings is proxy.config and self.keys is _keys_in_force(proxy)

    def read(self, data: bytes) -> tuple[int, int]:
        """Length of the body, and where it begins in `data`; (-1, 0) if the head is another one."""
        start = len(self.before)
        if data[:start] != self.before:
            return -1, 0
        digits, _, _ = data[start : start + _MAX_DIGITS].partition(b"\r")
        end = start + len(digits)
        begin = end + len(self.after)
        if data[end:begin] != self.after or not digits.isdigit():
            return -1, 0
        return int(digits), begin

    def again(self, client: ClientConnection, body_bytes: int) -> Exchange:
        """Another request with this head."""
        exchange = Exchange(client, self.method, self.route)
        exchange.head = self.head
        exchange.body_bytes = body_bytes
        exchange.keep_alive = self.keep_alive
        exchange.noted = self.noted
        exchange.content_type = self.content_type
        exchange.wants_reason = self.wants_reason
        exchange.session_key = self.session_key
        exchange.promised = self.promised
        if self.account is not None:
            exchange.grant = Grant(self.account)
        return exchange


def _keys_in_force(proxy: Proxy) -> object:
    """Another object once the keys have changed."""
    return proxy.keys.edition if proxy.keys is not None else None
