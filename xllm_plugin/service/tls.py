"""HTTPS on the service's own ports."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from xllm_plugin.errors import ConfigError

if TYPE_CHECKING:
    from xllm_plugin.service.config import AdminConfig, ListenConfig

__all__ = ["load_certificate", "server_context"]


def server_context(section: ListenConfig | AdminConfig, name: str) -> ssl.SSLContext | None:
    """The context of a port, or None if it speaks plain HTTP.

    Args:
        section: its settings.
        name: of the section, for messages.

    Raises:
        ConfigError: certificate and key cannot be read, or do not fit.
    """
    if section.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, section, name)
    return context


def load_certificate(
    context: ssl.SSLContext, section: ListenConfig | AdminConfig, name: str
) -> None:
    """Show another certificate from the next connection on.  Raises `ConfigError`."""
    assert section.ssl_certfile is not None
    try:
        context.load_cert_chain(section.ssl_certfile, section.ssl_keyfile, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{name}.ssl_certfile {section.ssl_certfile} and {name}.ssl_keyfile "
            f"{section.ssl_keyfile} cannot be used ({error}); give a PEM certificate and its key, "
            "which must not ask for a password."
        ) from error


def _no_password() -> str:
    """Without this OpenSSL would ask on the terminal, and wait."""
    return ""
