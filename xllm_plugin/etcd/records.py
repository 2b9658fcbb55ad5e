"""What lies in etcd, under the prefix of a fleet.

::

    PREFIX/instances/NAME   InstanceRecord, with the lease of the instance
    PREFIX/drains/NAME      DrainRecord, by an operator; with the same lease, and goes with it

Values are JSON.  Who can write there can send requests where he likes, as one can who has the
registration token: etcd's users and roles decide who that is.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from xllm_plugin.registration import Registration

__all__ = ["DRAINS", "INSTANCES", "DrainRecord", "InstanceRecord", "key_of", "split_key"]

INSTANCES, DRAINS = "instances", "drains"
_NAME = re.compile(r"[\w.:-]{1,128}")


class InstanceRecord(Registration):
    """An instance that holds a lease."""

    is_draining: bool = False
    """It takes nothing new and leaves once its requests have finished."""


class DrainRecord(BaseModel):
    """Somebody wants this incarnation to get nothing new."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    incarnation: str


def key_of(prefix: str, kind: str, name: str) -> str:
    """The key of a record."""
    return f"{prefix}/{kind}/{name}"


def split_key(prefix: str, key: str) -> tuple[str, str] | None:
    """Kind and name of a key; None if it is not one of ours."""
    kind, _, name = key.removeprefix(f"{prefix}/").partition("/")
    is_ours = kind in (INSTANCES, DRAINS) and _NAME.fullmatch(name) is not None
    return (kind, name) if is_ours and key.startswith(f"{prefix}/") else None
