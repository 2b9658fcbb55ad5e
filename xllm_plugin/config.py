"""`XllmConfig`: every setting, parsed once, frozen, handed down.

Where a value comes from, first match wins:

1. ``--additional-config '{"xllm": {...}}'`` (or `LLM(additional_config=...)`);
2. ``XLLM_<FIELD>`` in the environment, nested with two underscores: ``XLLM_CHANNEL__ENABLED=0``;
3. ``--xllm-config FILE`` (or ``XLLM_CONFIG=FILE``), YAML or JSON;
4. the default.

Platform and device are chosen before vLLM parses anything, so they are not settings of this model:
see `xllm_plugin.selection`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from xllm_plugin.accelerator.config import EngineConfig
from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.errors import ConfigError
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.instance.config import AdmissionConfig
from xllm_plugin.plugins import LOAD_ENV
from xllm_plugin.registration import RegistrationConfig
from xllm_plugin.scheduler.config import SchedulerConfig
from xllm_plugin.selection import CONFIG_ENV, DEVICE_ENV, PLATFORM_ENV, REASON_ENV
from xllm_plugin.xtensor.config import XTensorConfig

__all__ = [
    "ADDITIONAL_CONFIG_KEY",
    "Setting",
    "XllmConfig",
    "load_config",
    "settings_with_origin",
]

ADDITIONAL_CONFIG_KEY = "xllm"

ENV_PREFIX = "XLLM_"
SERVICE_ENV_PREFIX = "XLLM_SERVICE_"
# Read before any configuration exists, or by one command alone; see the module named.
BOOTSTRAP_ENV = frozenset(
    {
        PLATFORM_ENV,
        REASON_ENV,
        DEVICE_ENV,
        CONFIG_ENV,
        LOAD_ENV,
        "XLLM_TRACEBACK",  # xllm_plugin.errors
        "XLLM_CACHE_DIR",  # xllm_plugin.models
    }
)


class XllmConfig(BaseSettings):
    """All settings of the engine's side, one field a folder."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
    )

    admission: AdmissionConfig = Field(
        default_factory=AdmissionConfig, description="Which requests are refused."
    )
    channel: ChannelConfig = Field(
        default_factory=ChannelConfig, description="The engine's control socket."
    )
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="The start of the engine's process."
    )
    graph: GraphConfig = Field(default_factory=GraphConfig, description="Graph mode.")
    scheduler: SchedulerConfig = Field(
        default_factory=SchedulerConfig, description="Order of requests, and their promises."
    )
    registration: RegistrationConfig = Field(
        default_factory=RegistrationConfig, description="Where this server registers itself."
    )
    xtensor: XTensorConfig = Field(
        default_factory=XTensorConfig, description="Elastic memory of the KV cache."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take explicit values only: `load_config` merges the sources itself, to know origins."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting as in force."""

    name: str
    value: Any
    origin: str


def load_config(
    additional_config: object = None, environ: Mapping[str, str] | None = None
) -> XllmConfig:
    """Merge the sources by the precedence above and validate the result.

    Every process of a server merges the same sources: children inherit the environment.  Nothing
    is written back into `additional_config`, which vLLM hashes into its compile-cache key: a
    setting that changes from pod to pod must not make each of them compile anew.

    Raises:
        ConfigError: a key is unknown, a value is of the wrong type or out of range, or the file
            cannot be read; the message names the source and the key.
    """
    merged: dict[str, Any] = {}
    for origin, values in reversed(_sources(additional_config, environ)):
        _validated(values, origin)
        merged = _deep_update(merged, values)
    return _validated(merged, "settings together")


def settings_with_origin(
    additional_config: object = None, environ: Mapping[str, str] | None = None
) -> tuple[Setting, ...]:
    """List every setting with its value in force and the source it came from."""
    config = load_config(additional_config, environ)
    sources = [(origin, _flat(values)) for origin, values in _sources(additional_config, environ)]
    return tuple(
        Setting(name, value, next((o for o, values in sources if name in values), "default"))
        for name, value in _flat(config.model_dump(mode="json")).items()
    )


def _sources(
    additional_config: object, environ: Mapping[str, str] | None
) -> list[tuple[str, dict[str, Any]]]:
    environ = os.environ if environ is None else environ
    _refuse_unknown_variables(environ)
    found = [
        ("additional_config['xllm']", _section(additional_config)),
        ("environment", _from_environment(environ)),
    ]
    if environ.get(CONFIG_ENV):
        path = Path(environ[CONFIG_ENV])
        found.append((str(path), _read_file(path)))
    return found


def _section(additional_config: object) -> dict[str, Any]:
    if not isinstance(additional_config, Mapping):
        return {}
    section = additional_config.get(ADDITIONAL_CONFIG_KEY, {})
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"additional_config['xllm'] is {section!r}; it has to be an object such as "
            '{"channel": {"enabled": true}}.'
        )
    return dict(section)


class _FrozenEnvironment(EnvSettingsSource):
    """pydantic-settings' own environment reader, over a mapping that was handed in."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        # An empty variable is one that is not set.
        self._environ = {name.lower(): value for name, value in environ.items() if value}
        super().__init__(XllmConfig)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._environ


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    try:
        return dict(_FrozenEnvironment(environ)())
    except ValueError as error:
        raise ConfigError(f"environment: {error}. Known are {_known_variables()}.") from error


def _known_variables() -> str:
    fields = [ENV_PREFIX + name.upper().replace(".", "__") for name in _flat_fields(XllmConfig)]
    return ", ".join(sorted(BOOTSTRAP_ENV - {REASON_ENV}) + fields)


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Refuse what can only be meant for us: a nested name, or nearly the name of one of ours.

    Other names pass: Kubernetes gives every pod beside a Service called xllm an XLLM_SERVICE_HOST.
    """
    sections = tuple(ENV_PREFIX + name.upper() for name in XllmConfig.model_fields)
    known = (*BOOTSTRAP_ENV, *sections)
    for name in environ:
        if not name.startswith(ENV_PREFIX) or name in BOOTSTRAP_ENV:
            continue
        if name.startswith(SERVICE_ENV_PREFIX):
            continue  # the service's own, see xllm_plugin.service.config
        if name in sections or name.startswith(tuple(section + "__" for section in sections)):
            continue
        if "__" not in name and not difflib.get_close_matches(name, known, cutoff=0.85):
            continue
        raise ConfigError(
            f"environment: {name} is not a variable of this package. Known are "
            f"{_known_variables()}."
        )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--xllm-config {path}: cannot be read ({error}). Give the path of a YAML or JSON file."
        ) from error
    # ValueError: text in the shape of a date that is none.
    except (yaml.YAMLError, ValueError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"--xllm-config {path}: is neither YAML nor JSON: {detail}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--xllm-config {path}: holds {type(values).__name__}, not a mapping of settings."
        )
    return values


def _validated(values: Mapping[str, Any], origin: str) -> XllmConfig:
    try:
        return XllmConfig(**values)
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{origin}: {_explained(error)}") from error


def _explained(error: ValidationError | TypeError) -> str:
    if not isinstance(error, ValidationError):
        return f"{error}; settings are named by text."
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(_flat_fields(XllmConfig))
            lines.append(f"unknown setting {name!r}; known are {known}.")
        elif isinstance(item["input"], Mapping) or name.endswith(("token", "password")):
            lines.append(f"{name}: {item['msg']}.")  # there may be a secret in the value
        else:
            lines.append(f"{name}={item['input']!r}: {item['msg']}.")
    return " ".join(lines)


def _flat_fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names += _flat_fields(inner, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + str(name)] = value
    return flat


def _deep_update(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            merged[name] = _deep_update(inner, value)
        else:
            merged[name] = value
    return merged
