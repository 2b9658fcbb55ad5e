"""What is said to etcd: requests of its v3 API as JSON, and how their answers are read.

Source: etcd's `api/etcdserverpb/rpc.proto`, mapped to JSON by its gateway: bytes are base64,
64-bit numbers are text, fields with their default are left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xllm_plugin.errors import EtcdError

__all__ = [
    "Call",
    "Event",
    "Grant",
    "KeyValue",
    "Snapshot",
    "authenticate",
    "delete",
    "get",
    "grant",
    "keep_alive",
    "put",
    "put_if",
    "read_all",
    "read_events",
    "refusal",
    "revoke",
    "watch_body",
]

Answer = TypeVar("Answer")
WATCH_PATH = "/v3/watch"


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request and the reader of its answer."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Answer]


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as it is, or was."""

    key: str
    value: bytes
    mod_revision: int
    lease: int = 0
    """0: none."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix at one revision."""

    revision: int
    records: dict[str, KeyValue]


@dataclass(frozen=True, slots=True)
class Event:
    """One change; `record` is None for a key that is gone (deleted, or its lease has lapsed)."""

    key: str
    mod_revision: int
    record: KeyValue | None


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease, and for how long etcd gave it, which may be longer than asked."""

    lease: int
    ttl_s: int


def authenticate(user: str, password: str) -> Call[str]:
    """A token for the requests that follow."""
    body = {"name": user, "password": password}
    return Call("/v3/auth/authenticate", body, lambda answer: str(answer["token"]))


def read_all(prefix: str) -> Call[Snapshot]:
    """Every key that begins with `prefix`.

    The read is linearizable, etcd's default: a member that is cut off from the others fails it
    instead of telling what was.
    """
    return Call("/v3/kv/range", _range(prefix), _snapshot)


def get(key: str) -> Call[KeyValue | None]:
    """One key; None if it is not there."""
    return Call("/v3/kv/range", {"key": _coded(key)}, lambda answer: _first(_snapshot(answer)))


def put(key: str, value: bytes, lease: int = 0) -> Call[None]:
    """Set a key; it goes with its lease."""
    return Call("/v3/kv/put", _put(key, value, lease), _nothing)


def put_if(key: str, mod_revision: int, value: bytes, lease: int) -> Call[bool]:
    """Set a key if nobody has changed it since `mod_revision` (0: if it is not there)."""
    compare = {
        "key": _coded(key),
        "target": "MOD",
        "result": "EQUAL",
        "mod_revision": str(mod_revision),
    }
    body = {"compare": [compare], "success": [{"request_put": _put(key, value, lease)}]}
    return Call("/v3/kv/txn", body, lambda answer: bool(answer.get("succeeded", False)))


def delete(key: str) -> Call[None]:
    """Remove a key; no matter if it is not there."""
    return Call("/v3/kv/deleterange", {"key": _coded(key)}, _nothing)


def grant(ttl_s: int) -> Call[Grant]:
    """A new lease."""
    return Call(
        "/v3/lease/grant",
        {"TTL": str(ttl_s)},
        lambda answer: Grant(int(answer["ID"]), int(answer["TTL"])),
    )


def keep_alive(lease: int) -> Call[int]:
    """Renew a lease; seconds it now has, 0 if there is no such lease any more."""
    return Call(
        "/v3/lease/keepalive",
        {"ID": str(lease)},
        lambda answer: int(answer["result"].get("TTL", 0)),
    )


def revoke(lease: int) -> Call[None]:
    """End a lease, and with it its keys."""
    return Call("/v3/lease/revoke", {"ID": str(lease)}, _nothing)


def watch_body(prefix: str, from_revision: int) -> dict[str, Any]:
    """The request that opens a watch on every key that begins with `prefix`."""
    return {"create_request": {**_range(prefix), "start_revision": str(from_revision)}}


def read_events(line: str) -> tuple[Event, ...]:
    """One line of a watch: changes in order; none in the one that says that it has begun.

    Raises:
        EtcdError: the watch is over (the revisions it asked for are compacted, for example), or
            this is no line of one.
    """
    try:
        message = json.loads(line)
        if "error" in message:
            raise EtcdError(f"the watch has ended: {_said(message['error'])}.")
        result = message["result"]
        if result.get("canceled"):
            reason = result.get("cancel_reason") or (
                f"compacted up to revision {result.get('compact_revision', '?')}"
            )
            raise EtcdError(f"the watch was ended: {reason}.")
        return tuple(_event(one) for one in result.get("events", ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EtcdError(f"the watch tells what is no event: {line[:200]!r}.") from error


def refusal(status: int, body: bytes) -> EtcdError:
    """What an answer that is not 200 says."""
    try:
        message = json.loads(body)
        said, code = _said(message), message.get("code")
    except (ValueError, TypeError, AttributeError):
        said, code = "which is no answer of etcd; is this a client URL of it?", None
    return EtcdError(f"it answers {status}: {said}", code=code)


def _said(message: Any) -> str:
    if isinstance(message, dict):
        return str(message.get("message") or message.get("error") or message)
    return str(message)


def _coded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


def _range(prefix: str) -> dict[str, Any]:
    """Keys from `prefix` to the first one behind all that begin with it."""
    end = prefix.encode()
    end = end[:-1] + bytes([end[-1] + 1])  # UTF-8 has no byte 255
    return {"key": _coded(prefix), "range_end": _coded(end)}


def _put(key: str, value: bytes, lease: int) -> dict[str, Any]:
    return {"key": _coded(key), "value": _coded(value), "lease": str(lease)}


def _key_value(found: Mapping[str, Any]) -> KeyValue:
    return KeyValue(
        key=base64.b64decode(found["key"]).decode("utf-8", "replace"),
        value=base64.b64decode(found.get("value", "")),
        mod_revision=int(found["mod_revision"]),
        lease=int(found.get("lease", 0)),
    )


def _snapshot(answer: Mapping[str, Any]) -> Snapshot:
    records = [_key_value(one) for one in answer.get("kvs", ())]
    return Snapshot(int(answer["header"]["revision"]), {one.key: one for one in records})


def _first(snapshot: Snapshot) -> KeyValue | None:
    return next(iter(snapshot.records.values()), None)


def _event(found: Mapping[str, Any]) -> Event:
    record = _key_value(found["kv"])
    is_gone = found.get("type") == "DELETE"
    return Event(record.key, record.mod_revision, None if is_gone else record)


def _nothing(_: Any) -> None:
    return None
