"""Where etcd is and how it is reached; the options have the names that etcdctl gives them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from xllm_plugin.errors import ConfigError

__all__ = ["SCHEMES", "EtcdAccess", "EtcdAddress", "EtcdConfig", "parse_url", "tls_context"]

SCHEMES = ("etcd", "etcds")
_PORT = 2379
_PREFIX = "/xllm"


@dataclass(frozen=True, slots=True)
class EtcdAddress:
    """An etcd cluster, and the keys in it that are ours."""

    endpoints: tuple[str, ...]
    """``http://host:port`` or ``https://host:port`` of its members."""
    prefix: str
    """Without a slash at the end; all our keys begin with it and a slash."""


def parse_url(url: str) -> EtcdAddress:
    """Read ``etcd://host:port,host:port/prefix`` (``etcds``: over TLS).

    Raises:
        ValueError: it is none; the message says how to write one.
    """
    scheme, _, rest = url.partition("://")
    hosts, _, path = rest.partition("/")
    if "@" in hosts:  # first: other messages quote the URL
        raise ValueError("an etcd URL has no user in it: set `etcd.user` and `etcd.password`")
    if scheme not in SCHEMES or not hosts:
        raise ValueError(f"{url!r}: write etcd://host:{_PORT}, or etcds://... over TLS")
    web = "http" if scheme == "etcd" else "https"
    endpoints = []
    for host in hosts.split(","):
        try:
            parts = urlsplit(f"{web}://{host.strip()}")
            name, port = parts.hostname, parts.port or _PORT
        except ValueError as error:
            raise ValueError(f"{url!r}: {host!r}: {error}") from error
        if not name or parts.query or parts.fragment:
            raise ValueError(
                f"{url!r}: {host!r} is no host; write etcd://host:{_PORT},host:{_PORT}"
            )
        endpoints.append(f"{web}://{f'[{name}]' if ':' in name else name}:{port}")
    prefix = "/" + path.strip("/")
    return EtcdAddress(tuple(endpoints), _PREFIX if prefix == "/" else prefix)


class EtcdAccess(BaseModel):
    """How to talk to etcd."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cacert: Path | None = Field(
        default=None, description="authorities that its certificate is checked with"
    )
    cert: Path | None = Field(default=None, description="our certificate")
    key: Path | None = Field(default=None, description="its key")
    insecure_skip_tls_verify: bool = Field(
        default=False, description="take any certificate; for tests"
    )
    user: str = Field(default="", description="of etcd's own users; empty: no authentication")
    password: SecretStr | None = Field(default=None, description="of that user")
    dial_timeout_s: float = Field(default=2.0, gt=0, description="to open a connection to a member")
    command_timeout_s: float = Field(default=5.0, gt=0, description="for one member's answer")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert and key are given together, or neither")
        if ":" in self.user:
            raise ValueError("user: only the name; give the password as `password`")
        if bool(self.user) != (self.password is not None):
            raise ValueError("user and password are given together, or neither")
        return self


class EtcdConfig(EtcdAccess):
    """The etcd that several services share."""

    url: str = Field(
        default="", description="etcd://host:2379,host:2379/prefix (etcds: TLS); empty: none"
    )
    poll_s: float = Field(
        default=5.0, gt=0, description="between two reads that check what the watch has told"
    )

    @model_validator(mode="after")
    def _has_address(self) -> Self:
        if self.url:
            parse_url(self.url)
        return self


def tls_context(access: EtcdAccess) -> ssl.SSLContext:
    """What the options say about certificates.

    Raises:
        ConfigError: a file cannot be read, or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=access.cacert)
        if access.insecure_skip_tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if access.cert is not None:
            context.load_cert_chain(access.cert, access.key)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(str(one) for one in (access.cacert, access.cert, access.key) if one)
        raise ConfigError(
            f"etcd's TLS files {files}: {error}. Give PEM files as etcdctl's --cacert, --cert and "
            "--key take them."
        ) from error
    return context
