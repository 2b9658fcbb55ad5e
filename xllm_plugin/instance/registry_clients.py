"""Where a server registers: at an `xllm service`, or in the etcd that several services share."""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import Callable
from typing import Protocol
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.etcd import wire
from xllm_plugin.etcd.client import EtcdClient
from xllm_plugin.etcd.config import parse_url
from xllm_plugin.etcd.records import INSTANCES, InstanceRecord, key_of
from xllm_plugin.registration import (
    Heartbeat,
    Lease,
    Registration,
    RegistrationConfig,
    name_of_url,
)
from xllm_plugin.tls import ClientFiles

__all__ = ["EtcdRegistry", "RegistryClient", "ServiceRegistry", "registry_client"]

_TIMEOUT_S = 2.0


class RegistryClient(Protocol):
    """Holds a lease for a server.  Its methods wait, and raise `NotNowError` if they fail."""

    where: str
    """For messages."""

    def register(self, registration: Registration) -> Lease:
        """Ask for a lease.  The same incarnation may ask again."""

    def beat(self, lease: Lease, beat: Heartbeat) -> Lease | None:
        """Renew a lease; None if it is not there any more: register again."""

    def deregister(self, lease: Lease, incarnation: str) -> None:
        """Give a lease back."""


def registry_client(config: RegistrationConfig) -> RegistryClient:
    """The client for `config.url`.  Raises `ConfigError` if a TLS file cannot be read."""
    if not config.is_at_etcd:
        files = ClientFiles.of(config, "registration.")
        context = files.context()
        return ServiceRegistry(config, make_client(config, context), lambda: files.renew(context))
    address = parse_url(config.url)
    # A member that hangs must not cost the lease: the next one is asked in time.
    timeout_s = min(config.etcd.command_timeout_s, config.lease_s / 3)
    access = config.etcd.model_copy(update={"command_timeout_s": timeout_s})
    return EtcdRegistry(EtcdClient(address, access), address.prefix, config.lease_s)


def make_client(config: RegistrationConfig, context: ssl.SSLContext) -> httpx.Client:
    """A client of the service's admin port, with its token."""
    headers = {}
    if config.token is not None:
        headers["Authorization"] = f"Bearer {config.token.get_secret_value()}"
    return httpx.Client(
        headers=headers,
        timeout=_TIMEOUT_S,
        verify=context,
        trust_env=False,  # proxies of the environment lead out of the cluster
    )


class ServiceRegistry:
    """Registers over HTTP.

    Of several services over one etcd any may be asked: the next one is when one does not answer.

    Args:
        config: says where.
        client: brings the token.
        renew: reads its certificates again, which may have run out.
    """

    def __init__(
        self,
        config: RegistrationConfig,
        client: httpx.Client,
        renew: Callable[[], None] = lambda: None,
    ) -> None:
        self.where = config.url
        self._urls = deque(config.urls)
        self._client = client
        self._renew = renew

    def register(self, registration: Registration) -> Lease:
        """Ask for a lease."""
        lease = self._ask("POST", "/v1/registrations", registration)
        assert lease is not None
        return lease

    def beat(self, lease: Lease, beat: Heartbeat) -> Lease | None:
        """Renew a lease and report the load."""
        return self._ask("POST", f"{self._path(lease)}/heartbeat", beat)

    def deregister(self, lease: Lease, incarnation: str) -> None:
        """Give a lease back."""
        self._ask("DELETE", f"{self._path(lease)}?incarnation={quote(incarnation)}", None)

    @staticmethod
    def _path(lease: Lease) -> str:
        return f"/v1/registrations/{quote(lease.name, safe='')}"

    def _ask(self, method: str, path: str, body: Registration | Heartbeat | None) -> Lease | None:
        content = None if body is None else body.model_dump_json()
        try:
            reply = self._client.request(method, self._urls[0] + path, content=content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            self._urls.rotate(-1)
            try:
                self._renew()
            except ConfigError as unusable:
                raise NotNowError(f"{type(error).__name__}: {error}. {unusable}") from error
            raise NotNowError(f"{type(error).__name__}: {error}.") from error
        if reply.status_code == httpx.codes.CONFLICT and not isinstance(body, Registration):
            return None
        if reply.status_code != httpx.codes.OK:
            self._urls.rotate(-1)
            raise NotNowError(_explained(reply))
        if method == "DELETE":
            return None
        try:
            return Lease.model_validate_json(reply.content)
        except ValidationError as error:
            raise NotNowError("its answer is no lease; is this the admin port?") from error


class EtcdRegistry:
    """Keeps one key with a lease in etcd; services watch it.

    Nothing is written while nothing changes: renewing a lease makes no revision, and the load of
    now is read from the server itself (`GET /xllm/load`).

    Args:
        client: of that etcd.
        prefix: of the fleet.
        lease_s: how long etcd waits for a sign of life.
    """

    def __init__(self, client: EtcdClient, prefix: str, lease_s: float) -> None:
        self.where = f"etcd, {prefix}"
        self._client = client
        self._prefix = prefix
        self._lease_s = lease_s
        self._lease = 0
        self._record: InstanceRecord | None = None

    def register(self, registration: Registration) -> Lease:
        """Put the record there, unless the name belongs to a server at another address."""
        name = registration.name or name_of_url(registration.url)
        key = key_of(self._prefix, INSTANCES, name)
        held = self._client.send(wire.get(key))
        holder = _url_in(held)
        if holder not in (None, registration.url):
            raise NotNowError(
                f"{key} is held by {holder}; set registration.name to a name of its own."
            )
        grant = self._client.send(wire.grant(math.ceil(self._lease_s)))
        self._record = InstanceRecord(**{**registration.model_dump(), "name": name})
        self._lease = grant.lease
        self._put(key, held, f"{key} was taken by another server at this moment.")
        return Lease(name=name, lease_s=grant.ttl_s, in_flight=None)

    def beat(self, lease: Lease, beat: Heartbeat) -> Lease | None:
        """Renew the lease; the record changes only when draining begins."""
        assert self._record is not None
        ttl_s = self._client.send(wire.keep_alive(self._lease))
        key = key_of(self._prefix, INSTANCES, lease.name)
        held = self._client.send(wire.get(key)) if ttl_s else None
        if held is None or held.lease != self._lease:
            return None
        if beat.is_draining and not self._record.is_draining:
            before = self._record
            self._record = before.model_copy(update={"is_draining": True})
            try:
                self._put(key, held, f"{key} was changed by somebody else at this moment.")
            except NotNowError:
                self._record = before  # to be said with the next beat
                raise
        return lease

    def deregister(self, lease: Lease, incarnation: str) -> None:
        """End the lease.  Marked as leaving first, so that nobody takes it for an accident."""
        beat = Heartbeat(incarnation=incarnation, is_draining=True)
        if self.beat(lease, beat) is not None:
            self._client.send(wire.revoke(self._lease))

    def _put(self, key: str, held: wire.KeyValue | None, conflict: str) -> None:
        assert self._record is not None
        value = self._record.model_dump_json().encode()
        mod_revision = held.mod_revision if held else 0
        if not self._client.send(wire.put_if(key, mod_revision, value, self._lease)):
            raise NotNowError(conflict)


def _url_in(held: wire.KeyValue | None) -> str | None:
    """Whose key it is; None if nobody's."""
    if held is None:
        return None
    try:
        return InstanceRecord.model_validate_json(held.value).url
    except ValidationError:
        return None  # no record: nobody can be sent there


def _explained(reply: httpx.Response) -> str:
    if reply.status_code == httpx.codes.UNAUTHORIZED:
        return (
            "it refuses the token (401): registration.token here has to be "
            "instances.registration_token there."
        )
    try:
        detail = str(reply.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        detail = "is this the admin port of a service?"
    return f"it answers {reply.status_code}: {detail}"
