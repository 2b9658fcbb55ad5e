"""TLS as a client: whom we believe, and how we show who we are."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple, Protocol, Self

from xllm_plugin.errors import ConfigError

__all__ = ["ClientFiles", "load_authorities", "load_pair", "require_certificate"]


class _Pair(Protocol):
    """Settings that name a certificate and its key."""

    @property
    def ssl_certfile(self) -> Path | None: ...
    @property
    def ssl_keyfile(self) -> Path | None: ...


class _Section(_Pair, Protocol):
    """Settings that name all files."""

    @property
    def ssl_ca_certs(self) -> Path | None: ...


class ClientFiles(NamedTuple):
    """PEM files for connections that are ours to open."""

    ca_certs: Path | None = None
    """Authorities that the other side's certificate is checked with; None: the system's."""
    certfile: Path | None = None
    """Our certificate, its chain included; None: we show none."""
    keyfile: Path | None = None
    """Its key; None: in the certificate's file."""
    prefix: str = ""
    """Before the names of the settings in messages, such as "instances."."""

    @classmethod
    def of(cls, section: _Section, prefix: str) -> Self:
        """Those that a section of settings names."""
        return cls(section.ssl_ca_certs, section.ssl_certfile, section.ssl_keyfile, prefix)

    def context(self) -> ssl.SSLContext:
        """What connections are opened with.  Raises `ConfigError` if a file cannot be used."""
        if self.ca_certs is None:
            context = ssl.create_default_context()
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks, and believes nobody yet
        self._load(context)
        return context

    def renew(self, context: ssl.SSLContext) -> None:
        """Read the files again, for all connections from now on; wrong ones change nothing.

        An authority that is no longer in its file is believed for as long as the context lives.

        Raises:
            ConfigError: one cannot be used.
        """
        self.check()
        self._load(context)

    def check(self) -> None:
        """Read the files, for nobody.  Raises `ConfigError` if one cannot be used.

        Before a context that is in use: OpenSSL keeps the half that it has read, and a certificate
        whose key does not fit takes the place of the pair that was there.
        """
        self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _load(self, context: ssl.SSLContext) -> None:
        if self.ca_certs is not None:
            load_authorities(context, self.ca_certs, f"{self.prefix}ssl_ca_certs")
        if self.certfile is not None:
            load_pair(context, self.certfile, self.keyfile, self.prefix)


def require_certificate(section: _Pair) -> None:
    """Check settings.  Raises `ValueError` if they name a key and no certificate."""
    if section.ssl_keyfile is not None and section.ssl_certfile is None:
        raise ValueError("ssl_keyfile is given without ssl_certfile; give both")


def load_authorities(context: ssl.SSLContext, path: Path, name: str) -> None:
    """Believe those in a file.

    Args:
        context: that is to.
        path: of a PEM file.
        name: of the setting, for messages.

    Raises:
        ConfigError: the file cannot be used.
    """
    try:
        context.load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{name} {path} cannot be used ({error}); give a PEM file with the certificates of "
            "the authorities to believe."
        ) from error


def load_pair(
    context: ssl.SSLContext, certfile: Path, keyfile: Path | None, prefix: str = ""
) -> None:
    """Show a certificate.

    Args:
        context: that is to.
        certfile: in PEM, its chain included.
        keyfile: in PEM; None: in the certificate's file.
        prefix: before the names of the settings, for messages.

    Raises:
        ConfigError: the files cannot be used.
    """
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{prefix}ssl_certfile {certfile} and {prefix}ssl_keyfile {keyfile} cannot be used "
            f"({error}); give a PEM certificate and its key, which must not ask for a password."
        ) from error


def _no_password() -> str:
    """Without this OpenSSL would ask on the terminal, and wait."""
    return ""
