"""What an instance tells the service about itself: the messages, and the instance's settings.

::

    POST   /v1/registrations                   Registration -> Lease
    POST   /v1/registrations/NAME/heartbeat    Heartbeat -> Lease       within lease_s; 409: again
    DELETE /v1/registrations/NAME?incarnation=...

The same record, with a lease, is what a server puts into etcd (`etcd/records.py`).
Both sides skip fields that they do not know, so that each can be the older one.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from xllm_plugin.etcd.config import SCHEMES, EtcdAccess, parse_url
from xllm_plugin.tls import require_certificate

__all__ = [
    "Heartbeat",
    "KvEventSource",
    "Lease",
    "Load",
    "Registration",
    "RegistrationConfig",
    "Role",
    "name_of_url",
]


_MAX_COUNT = 10**6
_MAX_SECONDS = 86400.0
_MIN_CAPACITY, _MAX_CAPACITY = 1e-6, 1e6


class Role(StrEnum):
    """Which phases of a request an instance is for."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class KvEventSource(_Message):
    """Where one data-parallel rank publishes what its prefix cache holds (ZeroMQ PUB)."""

    endpoint: str = Field(pattern=r"^(tcp|ipc)://.")
    replay_endpoint: str | None = Field(default=None, pattern=r"^(tcp|ipc)://.")
    topic: str = ""
    dp_rank: int = Field(default=0, ge=0)


class Registration(_Message):
    """An instance that wants requests.  The same incarnation may register again."""

    url: str
    incarnation: str = Field(min_length=1, max_length=128)
    name: str = ""
    """Empty: host:port."""
    capacity: float = Field(default=1.0, ge=_MIN_CAPACITY, le=_MAX_CAPACITY)
    max_in_flight: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    """Requests that it runs at once; None: not said."""
    role: Role = Role.MIXED
    models: tuple[str, ...] = ()
    kv_events: tuple[KvEventSource, ...] = ()


class Load(_Message):
    """What an instance has on its hands, and how fast it was since its last heartbeat.

    What cannot be is refused: costs are made of these figures, for all instances of a fleet.
    """

    num_running: int = Field(default=0, ge=0, le=_MAX_COUNT)
    num_waiting: int = Field(default=0, ge=0, le=_MAX_COUNT)
    kv_usage: float = Field(default=0.0, ge=0, le=1)
    ttft_s: float | None = Field(default=None, ge=0, le=_MAX_SECONDS)
    """Mean time to first token; None if no request got one."""
    tpot_s: float | None = Field(default=None, ge=0, le=_MAX_SECONDS)
    """Mean time between two tokens of a request; None if there were none."""


class Heartbeat(_Message):
    """A sign of life; `load` is None if the engine could not be asked."""

    incarnation: str
    load: Load | None = None
    is_draining: bool = False
    """It takes nothing new and leaves once its requests have finished."""


class Lease(_Message):
    """The service's answer."""

    name: str
    lease_s: float = Field(gt=0)
    in_flight: int | None = 0
    """Requests of this service that run there; None if some may not be counted yet."""


class RegistrationConfig(BaseModel):
    """Where an instance registers itself: ``XLLM_REGISTRATION__URL``, or ``--register URL``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str = ""
    """Admin port of an `xllm service`, such as http://service:8001; of several services over one
    etcd all of them, separated by commas; or their etcd itself, etcd://host:2379,host:2379/prefix.
    Empty: do not register."""

    token: SecretStr | None = None
    """What the service has as `instances.registration_token`.  Best given in the environment:
    command lines are seen by everybody on the machine."""

    ssl_ca_certs: Path | None = None
    """PEM: authorities that the admin port's certificate is checked with, if it speaks HTTPS.
    None: the system's."""

    ssl_certfile: Path | None = None
    """PEM: our certificate, for an admin port that asks for a client's."""

    ssl_keyfile: Path | None = None
    """PEM.  None: in the certificate's file."""

    advertise_url: str = ""
    """Where the service reaches this server.  Empty means the address that leads to the service, or
    `--host` if that names one, and `--port`."""

    name: str = Field(default="", pattern=r"^[\w.:-]{0,128}$")
    """Names this instance at the service; empty means host:port of its address."""

    role: Role = Role.MIXED
    """Which phases of a request it is for."""

    capacity: float = Field(default=1.0, ge=_MIN_CAPACITY, le=_MAX_CAPACITY)
    """Relative speed."""

    kv_events: bool = False
    """Publish what the prefix cache holds, on free ports of this machine's address, where
    `--kv-events-config` is not given.  Off, because anybody who reaches the ports reads the token
    ids of all prompts: vLLM's event sockets have no key."""

    lease_s: float = Field(default=6.0, ge=2)
    """At etcd: a sign of life is due within it.  A service has a setting of its own."""

    etcd: EtcdAccess = EtcdAccess()
    """How to talk to etcd; the names are those of etcdctl."""

    drain_s: float = Field(default=25.0, ge=0)
    """After SIGTERM, for requests that run.  Kubernetes kills after 30 s."""

    @model_validator(mode="after")
    def _has_addresses(self) -> Self:
        if self.is_at_etcd:
            parse_url(self.url)
        else:
            for url in self.urls:
                _require_web("url", url)
        if self.advertise_url:
            _require_web("advertise_url", self.advertise_url)
        return self

    @model_validator(mode="after")
    def _certificates_are_of_use(self) -> Self:
        require_certificate(self)
        if self.is_at_etcd and (self.ssl_ca_certs or self.ssl_certfile):
            raise ValueError(
                f"ssl_ca_certs and ssl_certfile are for an admin port, and url {self.url!r} is an "
                "etcd; give etcd.cacert, etcd.cert and etcd.key"
            )
        return self

    @property
    def is_at_etcd(self) -> bool:
        """Whether `url` names an etcd."""
        return self.url.partition("://")[0] in SCHEMES

    @property
    def urls(self) -> tuple[str, ...]:
        """Of the services, or of the members of etcd; the first one leads there."""
        if self.is_at_etcd:
            return parse_url(self.url).endpoints
        return tuple(one.strip().rstrip("/") for one in self.url.split(",") if one.strip())


def name_of_url(url: str) -> str:
    """What an instance is called that gives no name: host:port.  ValueError if it is no URL."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def _require_web(name: str, value: str) -> None:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name} {value!r}: write http://host:port")
