"""The file of API keys: one record a key, with the SHA-256 of the key and never the key itself.

A fast hash is enough: keys are 256 random bits, not passwords.  `xllm service keys` writes the
file, and a running service follows it (`keys.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler.promise import MAX_PRIORITY, TENANT_PATTERN

__all__ = ["KeyRecord", "hash_of", "make_key", "read", "write"]

_PREFIX = "sk-xllm-"


class KeyRecord(BaseModel):
    """One key, as the file has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=f"^{TENANT_PATTERN}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    tenant: str = Field(default="", pattern=f"^({TENANT_PATTERN})?$")
    """Whose requests they are; keys of one tenant share its part of the queue.  Empty: `name`."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Of prompts and outputs together."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Requests that wait or run."""
    first_priority: int = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """The lowest number, which is served earliest, that its requests may ask for."""

    @model_validator(mode="after")
    def _has_tenant(self) -> Self:
        if not self.tenant:
            object.__setattr__(self, "tenant", self.name)
        return self


_RECORDS = TypeAdapter(list[KeyRecord])


def make_key() -> str:
    """A new key: 256 random bits after a prefix that scanners for leaked secrets can know."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> list[KeyRecord]:
    """Read a file of keys.  Raises `ConfigError` when it is not one."""
    try:
        records = _RECORDS.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")) or [])
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"keys.file {path} cannot be read: {error}.") from error
    except (yaml.YAMLError, RecursionError) as error:  # of thousands of brackets
        raise ConfigError(
            f"keys.file {path} is not YAML; make it by `xllm service keys`."
        ) from error
    except ValidationError as error:
        # Only places and reasons: somebody may have put a key where its hash belongs.
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()
        )
        raise ConfigError(
            f"keys.file {path} is not a list of keys ({wrong}); make it by `xllm service keys`."
        ) from None
    for what, values in (
        ("name", [one.name for one in records]),
        ("sha256", [one.sha256 for one in records]),
    ):
        if len(set(values)) < len(values):
            twice = next(
                one.name for one, v in zip(records, values, strict=True) if values.count(v) > 1
            )
            raise ConfigError(f"keys.file {path}: two keys have the {what} of {twice!r}.")
    return records


def write(path: Path, records: Iterable[KeyRecord]) -> None:
    """Replace the file at once; a new one is for its owner only.  Raises `ConfigError`."""
    payload = [one.model_dump(mode="json", exclude_defaults=True) for one in records]
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if path.exists():  # whoever runs the service may be let in by the old one's mode
                before = path.stat()
                os.fchmod(file.fileno(), before.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            yaml.safe_dump(payload, file, sort_keys=False)
        Path(name).replace(path)
    except OSError as error:
        raise ConfigError(f"keys.file {path} cannot be written: {error}.") from error
