"""Settings of `xllm service`: flags, then ``XLLM_SERVICE_*``, then a YAML file, then defaults.

Every setting lies in a section, so that every variable has two underscores in it
(``XLLM_SERVICE_LISTEN__PORT``): Kubernetes gives pods beside a Service called xllm an
``XLLM_SERVICE_PORT`` of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from xllm_plugin.errors import ConfigError
from xllm_plugin.etcd.config import EtcdConfig
from xllm_plugin.registration import KvEventSource, Role, name_of_url
from xllm_plugin.service.lifecycle import Timings
from xllm_plugin.tls import require_certificate

__all__ = [
    "ENV_PREFIX",
    "AdminConfig",
    "ContinuationConfig",
    "FlowConfig",
    "InstanceEntry",
    "InstancesConfig",
    "KeysConfig",
    "KvIndexConfig",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "ProcessesConfig",
    "RoutingConfig",
    "ServiceConfig",
    "SloConfig",
    "TimeoutsConfig",
    "TracingConfig",
    "load",
]

ENV_PREFIX = "XLLM_SERVICE_"
_MIB = 2**20
_SECRETS = ("token", "api_key", "password")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _needs_certificate(section: Any) -> Any:
    require_certificate(section)
    return section


class _Port(_Section):
    """A port that may speak HTTPS; the settings are named as vLLM's flags."""

    ssl_certfile: Path | None = Field(default=None, description="PEM, its chain included: HTTPS")
    ssl_keyfile: Path | None = Field(default=None, description="PEM; None: in the certificate's")
    ssl_ca_certs: Path | None = Field(
        default=None, description="PEM: authorities of clients' certificates"
    )
    ssl_cert_reqs: int = Field(
        default=0, ge=0, le=2, description="a client's certificate: 0 not asked for, 1 may, 2 must"
    )

    _key_has_certificate = model_validator(mode="after")(_needs_certificate)

    @model_validator(mode="after")
    def _knows_whom_to_ask(self) -> Self:
        given = f"ssl_cert_reqs={self.ssl_cert_reqs}"
        if self.ssl_ca_certs is None and self.ssl_cert_reqs:
            raise ValueError(f"{given} asks for certificates of unknown origin; give ssl_ca_certs")
        if self.ssl_ca_certs is not None and not self.ssl_cert_reqs:
            # vLLM takes this, and then asks nobody.
            raise ValueError(
                f"ssl_ca_certs is given, and {given} asks no client for a certificate; "
                "set ssl_cert_reqs to 2 (required) or 1 (optional)"
            )
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs is given without ssl_certfile; HTTPS takes that too")
        return self


class ListenConfig(_Port):
    """The public port."""

    host: str = Field(default="0.0.0.0", description="as `vllm serve` listens")  # noqa: S104
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one")
    backlog: int = Field(default=2048, ge=1, description="connections waiting to be accepted")


class AdminConfig(_Port):
    """The admin port: metrics, instances, decisions, registration, control routes."""

    host: str = Field(default="127.0.0.1", description="other machines reach it only if changed")
    port: int = Field(default=8001, ge=0, le=65535, description="0 takes a free one")
    token: SecretStr | None = Field(
        default=None, description="None: made at start and left in a file that only its user reads"
    )
    num_decisions: int = Field(default=256, ge=1, description="routing decisions remembered")
    sample_interval_s: float = Field(
        default=5.0, gt=0, description="between two points of the dashboard's charts"
    )
    num_samples: int = Field(default=720, ge=1, description="points kept: 720 are an hour")


class LimitsConfig(_Section):
    """What one client may ask for."""

    max_header_bytes: int = Field(default=32 * 1024, ge=1024, description="request line included")
    max_body_bytes: int = Field(default=64 * _MIB, ge=1024, description="of one request")
    max_total_body_bytes: int = Field(
        default=2048 * _MIB, ge=1024, description="of all requests over 64 KiB that are here"
    )
    max_pipelined: int = Field(default=16, ge=1, description="requests read ahead a connection")

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_total_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_total_body_bytes={self.max_total_body_bytes} is less than max_body_bytes="
                f"{self.max_body_bytes}, so that one body could be too much; raise the first"
            )
        return self


class TimeoutsConfig(_Section):
    """How long each leg may take, in seconds.  None: as long as it likes."""

    header_s: float = Field(default=10.0, gt=0, description="from first byte to end of headers")
    body_s: float = Field(default=300.0, gt=0, description="from headers to end of body")
    client_idle_s: float = Field(default=75.0, gt=0, description="between two requests")
    client_stalled_s: float | None = Field(
        default=300.0, gt=0, description="a client may take nothing of its answer"
    )
    connect_s: float = Field(default=5.0, gt=0, description="to open a connection to an instance")
    first_byte_s: float | None = Field(
        default=None, gt=0, description="from a request sent to its answer's first byte"
    )
    stalled_s: float | None = Field(
        default=None, gt=0, description="between two reads of an answer that has begun"
    )
    # vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
    pool_idle_s: float = Field(default=4.0, gt=0, description="an unused connection is kept")
    drain_s: float = Field(default=30.0, ge=0, description="after SIGTERM, for what is running")


class KvIndexConfig(_Section):
    """What is known of the instances' prefix caches."""

    enabled: bool = Field(default=True, description="follow KV events of instances that have them")
    replay_timeout_s: float = Field(default=5.0, gt=0, description="of silence in a replay")
    host_weight: float = Field(
        default=0.8, ge=0, le=1, description="of a cached token in host memory; 1 on the device"
    )
    disk_weight: float = Field(default=0.5, ge=0, le=1, description="of one on a disk, or remote")
    tokenize_timeout_s: float = Field(
        default=1.0, gt=0, description="then a request is routed without its tokens"
    )
    token_cache_bytes: int = Field(
        default=64 * _MIB, ge=0, description="prompts and their token ids that are remembered"
    )


class RoutingConfig(_Section):
    """Which instance gets a request."""

    policy: str = Field(default="cost", description="a name that a plugin registers")
    session_header: str = Field(
        default="x-session-id",
        pattern=r"^[0-9A-Za-z!#$%&'*+.^_`|~-]+$",
        description="names a request's session",
    )
    num_retries: int = Field(default=2, ge=0, description="other instances tried before an answer")
    retry_share: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="retries of what is refused or silent, of all requests; and hedges",
    )
    hedge_after_s: float | None = Field(
        default=None,
        gt=0,
        description="no first event of a stream by then, and another is asked too",
    )
    retry_after_s: float = Field(default=1.0, gt=0, description="told to clients with a 503")


class FlowConfig(_Section):
    """Requests wait in the service while no instance has room."""

    enabled: bool = Field(default=False, description="False: instances get requests as they come")
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="requests at once for an instance of capacity 1 that says no number; None: any",
    )
    max_waiting: int | None = Field(
        default=None, ge=0, description="none are sent where more wait, by its last report"
    )
    num_replicas: int = Field(
        default=1, ge=1, description="services like this one; each grants its part of all limits"
    )
    max_queued_requests: int = Field(default=1024, ge=1, description="that wait at once")
    max_queued_bytes: int = Field(default=256 * _MIB, ge=1024, description="that they hold")
    max_wait_s: float = Field(default=60.0, gt=0, description="then they are answered with 503")
    max_offline_wait_s: float = Field(
        default=3600.0, gt=0, description="the same for offline requests, which wait for gaps"
    )
    tenant_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="parts of the queue; 1 for those not named"
    )


class KeysConfig(_Section):
    """Who may use the public port."""

    file: Path | None = Field(
        default=None, description="made by `xllm service keys`; None: no key is asked for"
    )
    forward: bool = Field(
        default=False, description="instances get the client's key, not `instances.api_key`"
    )


class ContinuationConfig(_Section):
    """Streams whose instance dies."""

    enabled: bool = Field(default=True, description="another instance continues them")
    max_resumes: int = Field(default=3, ge=1, description="of one stream, then it ends in an error")


class InstanceEntry(_Section):
    """One server behind the service."""

    url: str = Field(description="http://host:port or https://host:port")
    name: str = Field(default="", pattern=r"^[\w.:-]{0,128}$", description="host:port unless given")
    capacity: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="relative speed")
    max_in_flight: int | None = Field(
        default=None, ge=1, description="requests it runs at once, for flow control"
    )
    role: Role = Field(default=Role.MIXED, description="phases of a request it is for")
    kv_events: tuple[KvEventSource, ...] = Field(
        default=(), description="where it publishes its prefix cache; else it is asked"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_address(self) -> Self:
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"url {self.url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url {self.url!r}: write http://host:port")
        if parts.path not in ("", "/") or parts.query or parts.username is not None:
            raise ValueError(f"url {self.url!r}: only scheme, host and port are used")
        if not self.name:
            object.__setattr__(self, "name", name_of_url(self.url))
        return self

    @property
    def host(self) -> str:
        """Name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """With the scheme's default."""
        return urlsplit(self.url).port or (443 if self.is_tls else 80)

    @property
    def is_tls(self) -> bool:
        """Whether it speaks HTTPS."""
        return urlsplit(self.url).scheme == "https"


class InstancesConfig(_Section):
    """Where instances come from, and when they count as dead."""

    static: tuple[InstanceEntry, ...] = Field(default=(), description="always there")
    file: Path | None = Field(
        default=None, description="YAML or JSON list of the same entries, followed as it changes"
    )
    registration_token: SecretStr | None = Field(
        default=None, description="instances register with it; None: nobody can"
    )
    api_key: SecretStr | None = Field(
        default=None, description="`--api-key` of instances: sent with probes, and with `keys.file`"
    )
    ssl_ca_certs: Path | None = Field(
        default=None, description="PEM: authorities of instances with HTTPS; None: the system's"
    )
    ssl_certfile: Path | None = Field(
        default=None, description="PEM: shown to instances that ask for a client's certificate"
    )
    ssl_keyfile: Path | None = Field(default=None, description="PEM; None: in the certificate's")
    probe_interval_s: float = Field(default=1.0, gt=0, description="between two probes of one")
    probe_timeout_s: float = Field(default=2.0, gt=0, description="for all parts of a probe")
    failures_to_suspect: int = Field(
        default=2, ge=1, description="failed probes in a row, or refused requests"
    )
    lease_s: float = Field(default=6.0, gt=0, description="a heartbeat is due within it")
    suspect_s: float = Field(default=30.0, gt=0, description="a lapsed lease is forgotten after it")
    joining_s: float = Field(default=600.0, gt=0, description="a registered instance may load")
    drain_s: float = Field(default=300.0, gt=0, description="requests may run on after a drain")

    _key_has_certificate = model_validator(mode="after")(_needs_certificate)

    @field_validator("api_key")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        # A secret that is mounted as a file often ends in a line break.
        if value is not None and not value.get_secret_value().isprintable():
            raise ValueError("it has a line break or another control character; take that out")
        return value

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [entry.name for entry in self.static]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"static: two instances are named {', '.join(twice)}; name them apart")
        return self

    def timings(self) -> Timings:
        """As the state machine takes them."""
        return Timings(
            lease_s=self.lease_s,
            suspect_s=self.suspect_s,
            joining_s=self.joining_s,
            drain_s=self.drain_s,
            num_failures=self.failures_to_suspect,
        )


class SloConfig(_Section):
    """What counts as in time, for streams whose request promises nothing else."""

    ttft_ms: float = Field(default=1000.0, gt=0, description="to the first token, as engines have")
    tpot_ms: float = Field(default=50.0, gt=0, description="mean of a token after the first")


class LogConfig(_Section):
    """What is written."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least that is written to standard error"
    )
    access: bool = Field(default=False, description="one JSON line a request, on standard output")
    access_file: Path | None = Field(
        default=None, description="to this file, opened anew when moved"
    )


class ProcessesConfig(_Section):
    """How the service itself runs."""

    processes: int = Field(
        default=1, ge=1, le=64, description="carry traffic; beside several, one controls them"
    )


class TracingConfig(_Section):
    """OpenTelemetry."""

    enabled: bool = Field(
        default=False, description="a span a request; needs `[otel]`, set by `OTEL_*`"
    )


class ServiceConfig(BaseSettings):
    """All settings of the service."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    listen: ListenConfig = Field(default_factory=ListenConfig)
    admin: AdminConfig = Field(default_factory=AdminConfig)
    instances: InstancesConfig = Field(default_factory=InstancesConfig)
    etcd: EtcdConfig = Field(default_factory=EtcdConfig)
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    kv_index: KvIndexConfig = Field(default_factory=KvIndexConfig)
    continuation: ContinuationConfig = Field(default_factory=ContinuationConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    keys: KeysConfig = Field(default_factory=KeysConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    slo: SloConfig = Field(default_factory=SloConfig)
    service: ProcessesConfig = Field(default_factory=ProcessesConfig)
    tracing: TracingConfig = Field(default_factory=TracingConfig)


def load(flags: dict[str, Any], file: Path | None) -> ServiceConfig:
    """Merge flags, environment and file, and check the whole.

    Args:
        flags: nested like the file; only what was given.
        file: YAML or JSON, or None.

    Raises:
        ConfigError: a setting is unknown or wrong, or the file cannot be read.
    """

    class Merged(ServiceConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings
            found = [init_settings, env_settings]
            if file is not None:
                found.append(YamlConfigSettingsSource(settings_cls, yaml_file=file))
            return tuple(found)

    if file is not None and not file.is_file():
        raise ConfigError(f"--config {file}: no such file; give the path of a YAML file.")
    try:
        return Merged(**flags)
    except ValidationError as error:
        raise ConfigError(f"settings of the service: {_explained(error)}") from error
    except Exception as error:
        # pydantic-settings lets the reader's own errors through: YAML, JSON in a variable, OSError.
        detail = " ".join(str(error).split())
        raise ConfigError(
            f"settings of the service cannot be read: {detail}. See `xllm service --help`."
        ) from error


def _explained(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {name!r}.")
        elif isinstance(item["input"], dict) or any(one in name for one in _SECRETS):
            # There may be a secret in the value.
            lines.append(f"{name}: {item['msg']}.")
        else:
            lines.append(f"{name}={item['input']!r}: {item['msg']}.")
    return " ".join(lines)
