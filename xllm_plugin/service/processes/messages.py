"""What the control process and its workers say to each other, as msgpack.

Both are of one installation.  A worker that is started again after an upgrade is not: it is told
the version of the package that the control process is, and does not start where it is another one.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, SecretStr

from xllm_plugin.registration import KvEventSource
from xllm_plugin.service.config import InstanceEntry, ServiceConfig
from xllm_plugin.service.decision import Decision
from xllm_plugin.service.flow.stats import FlowStats
from xllm_plugin.service.histogram import Histogram
from xllm_plugin.service.key_file import KeyRecord
from xllm_plugin.service.lifecycle import Life
from xllm_plugin.service.measured import Measured
from xllm_plugin.service.speed import Speed
from xllm_plugin.service.stats import Stats

__all__ = [
    "BucketView",
    "CannotStart",
    "CutOff",
    "Drain",
    "Failure",
    "Figures",
    "FleetNews",
    "FromControl",
    "FromWorker",
    "InstanceNews",
    "KeyNews",
    "KeyUse",
    "Keys",
    "Owner",
    "OwnerAnswer",
    "OwnerQuestion",
    "QueuePart",
    "Ready",
    "Report",
    "Settings",
    "Start",
    "WhyNot",
    "decoder",
    "encode",
    "sections_of",
    "settings_from",
]


# -- control to worker -----------------------------------------------------------------------------


class InstanceNews(msgspec.Struct):
    """What changes seldom of an instance, whole."""

    entry: InstanceEntry
    source: str
    slot: int
    life: Life
    models: dict[str, dict[str, Any]]
    kv_events: tuple[KvEventSource, ...]
    resumes: bool
    scales_out: bool | None = None


class Figures(msgspec.Struct, array_like=True):
    """What changes all the time."""

    name: str
    foreign_requests: int
    num_waiting: int
    speed: Speed


class FleetNews(msgspec.Struct, tag=True):
    """Instances that are new or have changed, and those that are gone with how they ended."""

    number: int
    """Counts up; a worker says which it has taken in, and with it all that it was told before."""
    changed: list[InstanceNews] = []
    figures: list[Figures] = []
    gone: dict[str, Life] = {}


class BucketView(msgspec.Struct, array_like=True):
    """A rate's allowance at a moment: what is left, after so much was taken and given back."""

    per_minute: float
    level: float
    at_s: float
    taken: int
    returned: int


class KeyNews(msgspec.Struct):
    """One API key in force."""

    record: KeyRecord
    slot: int
    requests: BucketView | None
    tokens: BucketView | None


class Keys(msgspec.Struct, tag=True):
    """All API keys in force."""

    num_replicas: int
    keys: list[KeyNews]


class Settings(msgspec.Struct, tag=True):
    """Settings were read again."""

    sections: dict[str, dict[str, Any]]
    keys: Keys | None
    """None: no key is asked for."""


class Start(msgspec.Struct, tag=True):
    """The first message: all that a worker has to know."""

    index: int
    num_workers: int
    port: int
    settings: Settings
    fleet: FleetNews


class OwnerAnswer(msgspec.Struct, tag=True):
    """Which instance has made a response; empty: nobody knows."""

    response_id: str
    name: str


class Drain(msgspec.Struct, tag=True):
    """Accept nothing new, finish what runs, and end."""


class CutOff(msgspec.Struct, tag=True):
    """End every connection at once."""


# -- worker to control -----------------------------------------------------------------------------


class Ready(msgspec.Struct, tag=True):
    """The port is open."""


class WhyNot(StrEnum):
    """Who is to change something."""

    MISUSE = "misuse"
    NOT_NOW = "not now"


class CannotStart(msgspec.Struct, tag=True):
    """The last message of a worker that the user's settings or machine keep from starting."""

    why: WhyNot
    message: str


class Failure(msgspec.Struct, tag=True):
    """Traffic has met an instance that fails.  The answer is its `InstanceNews`."""

    name: str
    incarnation: str
    reason: str
    certain: bool


class Owner(msgspec.Struct, tag=True):
    """An instance has made a response."""

    response_id: str
    name: str


class OwnerQuestion(msgspec.Struct, tag=True):
    """Which instance has made this response?"""

    response_id: str


class QueuePart(msgspec.Struct, array_like=True):
    """What waits of one tenant in one band."""

    is_offline: bool
    priority: int
    tenant: str
    num_requests: int
    num_bytes: int


class KeyUse(msgspec.Struct, array_like=True):
    """What one key was used for."""

    num_requests: int
    num_tokens: int
    refused: dict[str, int]


class Report(msgspec.Struct, tag=True):
    """What has happened since the last report, and how things are now."""

    # Since the last one.
    instances: dict[str, Stats] = {}
    measured: Measured = msgspec.field(default_factory=Measured)
    refusals: dict[int, int] = {}
    decisions: list[Decision] = []
    causes: list[tuple[str, str, int]] = []
    flow: FlowStats | None = None
    keys: dict[str, KeyUse] = {}
    num_prompts_unread: int = 0
    num_chats_misread: int = 0
    ttfts: list[tuple[str, float, float]] = []
    """Instance, tokens computed before a first token, seconds."""
    # Now.
    fleet_number: int = 0
    num_clients: int = 0
    queue: list[QueuePart] = []
    kv_index: dict[str, list[dict[str, Any]]] = {}
    """Instance -> its ranks, as `KvDirectory.describe` has them."""
    idle_connections: dict[str, int] = {}
    cpu_s: float = 0.0
    resident_bytes: int = 0


FromControl = Start | Settings | Keys | FleetNews | OwnerAnswer | Drain | CutOff
FromWorker = Ready | CannotStart | Failure | Owner | OwnerQuestion | Report


def sections_of(config: ServiceConfig) -> dict[str, dict[str, Any]]:
    """The settings with their secrets, for a process of ours alone."""
    return {name: dict(getattr(config, name)) for name in ServiceConfig.model_fields}


def settings_from(sections: dict[str, dict[str, Any]]) -> ServiceConfig:
    """What `sections_of` was given; nothing is read from the environment or a file."""
    found: dict[str, Any] = {}
    for name, field in ServiceConfig.model_fields.items():
        model: Any = field.annotation
        found[name] = model.model_validate(sections[name])
    return ServiceConfig.model_construct(**found)


def _plain(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.packed()
    if isinstance(value, BaseModel):
        return dict(value)
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"{type(value).__name__} is no part of a message")


def _made(kind: type, value: Any) -> Any:
    if kind is Histogram:
        return Histogram.unpacked(value)
    if issubclass(kind, BaseModel):
        return kind.model_validate(value)
    raise NotImplementedError(f"{kind.__name__} is no part of a message")


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """Reads one side's messages; raises `msgspec.DecodeError` for anything else."""
    return msgspec.msgpack.Decoder(kind, dec_hook=_made)
