"""HTTPS on the service's own ports."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xllm_plugin.tls import load_authorities, load_pair

if TYPE_CHECKING:
    from xllm_plugin.service.config import AdminConfig, ListenConfig

__all__ = ["PortTls", "server_context"]


def server_context(section: ListenConfig | AdminConfig, name: str) -> ssl.SSLContext | None:
    """The context of a port, or None if it speaks plain HTTP.

    Args:
        section: its settings.
        name: of the section, for messages.

    Raises:
        ConfigError: a file cannot be read, or certificate and key do not fit.
    """
    if section.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_pair(context, section.ssl_certfile, section.ssl_keyfile, f"{name}.")
    if section.ssl_ca_certs is not None:
        load_authorities(context, section.ssl_ca_certs, f"{name}.ssl_ca_certs")
        context.verify_mode = ssl.VerifyMode(section.ssl_cert_reqs)
        # Who goes on with an earlier session shows no certificate, and its authority may be gone.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


class PortTls:
    """The context of a port whose files can be read again.

    A context forgets no authority that it has read.  So every reading makes a new one, and the one
    that the port was opened with hands each connection to the newest.

    Args:
        section: settings of the port.
        name: of the section, for messages.
        clock: seconds since the epoch, as OpenSSL dates sessions.

    Raises:
        ConfigError: as `server_context`.
    """

    def __init__(
        self,
        section: ListenConfig | AdminConfig,
        name: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._section = section
        self._name = name
        self._clock = clock
        self._renewed_s = 0.0
        self.context = self._newest = server_context(section, name)
        """To open the port with; None: it speaks plain HTTP."""
        if self.context is not None:
            self.context.sni_callback = self._hand_over

    def read(self) -> ssl.SSLContext | None:
        """Read the files again, for `use`; nothing changes yet.  Raises `ConfigError`."""
        return server_context(self._section, self._name)

    def use(self, context: ssl.SSLContext | None) -> None:
        """Put what `read` gave in force, for connections from now on."""
        self._newest = context
        self._renewed_s = self._clock()

    def _hand_over(
        self, connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext
    ) -> int | None:
        """A client has begun its handshake, whether it names a server or not.

        Returns:
            The alert that refuses it; None: it may go on.
        """
        del server_name, context
        newest = self._newest
        assert newest is not None
        # TLS 1.2 has sessions without tickets, too, for five minutes: the first context keeps them,
        # of later ones as well.
        session = connection.session if connection.session_reused else None
        is_old = session is not None and session.time <= self._renewed_s
        if is_old and newest.verify_mode is not ssl.CERT_NONE:
            return ssl.ALERT_DESCRIPTION_ACCESS_DENIED
        connection.context = newest
        return None
