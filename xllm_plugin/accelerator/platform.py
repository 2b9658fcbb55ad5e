"""The platform mixin: what every family's vLLM platform does alike.

Hooks may run more than once in a process and again in each child (vLLM re-runs
`check_and_update_config` in the engine's process), so each can be repeated.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from xllm_plugin.channel.paths import usable
from xllm_plugin.config import load_config
from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler.config import slo_refusal
from xllm_plugin.selection import PLATFORM_ENV, PLATFORMS, REGISTER_ENV
from xllm_plugin.xtensor.config import form_refusal, pool_refusal

if TYPE_CHECKING:
    from vllm.config import VllmConfig

__all__ = ["EXECUTORS", "OWN_SCHEDULERS", "XllmPlatformMixin", "has_connector"]

logger = logging.getLogger("vllm.xllm_plugin")

EXECUTORS = {
    "mp": "xllm_plugin.worker.executor.XllmMultiprocExecutor",
    "uni": "xllm_plugin.worker.executor.XllmUniProcExecutor",
}
SCHEDULER = "xllm_plugin.scheduler.scheduler.XllmScheduler"
ASYNC_SCHEDULER = "xllm_plugin.scheduler.scheduler.XllmAsyncScheduler"
OWN_SCHEDULERS = frozenset({SCHEDULER, ASYNC_SCHEDULER})

# Every group whose members VLLM_PLUGINS selects, but for the endpoint plugins, which are opt-in.
ORDINARY_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.logits_processors",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
OWN_PLUGIN = "xllm"


class XllmPlatformMixin:
    """Stands before vLLM's platform class in the bases."""

    xllm_worker_cls: ClassVar[str]
    xllm_skips_draws: ClassVar[bool] = False
    """Whether its runner has a `skip_draws`: else no stream with a seed is continued."""

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        """Show our options in `--help`, and let our own endpoints load."""
        super().pre_register_and_update(parser)  # type: ignore[misc]
        if parser is not None and "--platform" not in parser._option_string_actions:  # noqa: SLF001
            allow_own_endpoints(os.environ)
            add_options(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check our settings and put our classes where vLLM takes one."""
        check_settings(vllm_config)
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == "auto":
            parallel.worker_cls = cls.xllm_worker_cls
        asked = vllm_config.scheduler_config.async_scheduling
        super().check_and_update_config(vllm_config)  # type: ignore[misc]
        cls.choose_async_scheduling(vllm_config, asked)
        choose_executor(vllm_config)
        choose_scheduler(vllm_config)
        choose_kv_events(vllm_config)

    @classmethod
    def choose_async_scheduling(cls, vllm_config: VllmConfig, asked: bool | None) -> None:
        """Decide on asynchronous scheduling; `asked` is what stood there before vLLM decided."""


def check_settings(vllm_config: Any) -> None:
    """Refuse wrong settings now, before any process is started or model loaded.

    Raises:
        ConfigError: see `load_config`; or the directory named for the channel cannot be used; or
            the scheduler's policy does not go with vLLM's settings, or admission's with the policy.
    """
    config = load_config(vllm_config.additional_config)
    usable(config.channel)
    if reason := form_refusal(config.xtensor) or pool_refusal(config.xtensor):
        raise ConfigError(f"{reason}.")
    if config.scheduler.policy == "slo" and (reason := slo_refusal(vllm_config)):
        raise ConfigError(
            f"scheduler.policy=slo cannot be used: {reason}. Change that, or use policy=fcfs."
        )
    if config.admission.at_risk == "refuse" and config.scheduler.policy != "slo":
        raise ConfigError(
            f"admission.at_risk=refuse cannot be used: scheduler.policy is "
            f"{config.scheduler.policy}, which predicts nothing to refuse by. Set "
            "scheduler.policy=slo, or leave admission.at_risk=admit."
        )


def choose_executor(vllm_config: Any) -> None:
    """Take our executors, by class path, where nothing in vLLM asks for the backend by name.

    Its connectors compare `distributed_executor_backend` with "mp" to learn what an executor
    reports; with one of them configured, or over several nodes, vLLM's own executor stays.
    """
    parallel = vllm_config.parallel_config
    backend = parallel.distributed_executor_backend
    if not isinstance(backend, str) or parallel.nnodes > 1 or has_connector(vllm_config):
        return
    parallel.distributed_executor_backend = EXECUTORS.get(backend, backend)


def has_connector(vllm_config: Any) -> bool:
    """Whether something beside the engine reads or writes its caches.

    vLLM makes a connector of --kv-offloading-size after the platform was asked.
    """
    return (
        vllm_config.kv_transfer_config is not None
        or vllm_config.ec_transfer_config is not None
        or vllm_config.cache_config.kv_offloading_size is not None
    )


def choose_scheduler(vllm_config: Any) -> None:
    """Take our scheduler unless the user named another, or the model needs vLLM's special one."""
    scheduler = vllm_config.scheduler_config
    if vllm_config.diffusion_config is not None:
        logger.warning("xllm-plugin: diffusion models keep vLLM's own scheduler.")
        return
    ours = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
    if scheduler.scheduler_cls in {None, *OWN_SCHEDULERS}:
        scheduler.scheduler_cls = ours
        return
    if load_config(vllm_config.additional_config).scheduler.policy != "fcfs":
        raise ConfigError(
            f"scheduler.policy=slo needs our scheduler, and --scheduler-cls is "
            f"{scheduler.scheduler_cls}. Leave one of them out."
        )
    logger.warning(
        "xllm-plugin: --scheduler-cls %s is used as asked; what our scheduler adds (snapshots, "
        "xllm metrics, `xllm top`) is off.",
        scheduler.scheduler_cls,
    )


def choose_kv_events(vllm_config: Any) -> None:
    """Publish what the prefix cache holds, if the settings say so and the user's flags do not."""
    registration = load_config(vllm_config.additional_config).registration
    if not (registration.url and registration.kv_events) or vllm_config.kv_events_config:
        return
    if not vllm_config.cache_config.enable_prefix_caching:
        logger.warning("xllm-plugin: registration.kv_events is of no use without a prefix cache.")
        return
    from vllm.config.kv_events import KVEventsConfig

    # Port 0: several servers share a machine; the one that was taken is registered.
    vllm_config.kv_events_config = KVEventsConfig(
        enable_kv_cache_events=True, endpoint="tcp://*:0", replay_endpoint="tcp://*:0"
    )


def allow_own_endpoints(environ: MutableMapping[str, str]) -> None:
    """Name every ordinary plugin and our own endpoint plugin in VLLM_PLUGINS, if it is unset.

    Endpoint plugins add routes to the server, so vLLM loads only those named there.  Running on
    this platform is the consent to ours, and to no other: their names are not added.  A variable
    that the user set is left as it is.
    """
    if "VLLM_PLUGINS" in environ:
        return
    names = {OWN_PLUGIN}
    for group in ORDINARY_GROUPS:
        names.update(entry.name for entry in importlib.metadata.entry_points(group=group))
    foreign = {
        entry.name
        for entry in importlib.metadata.entry_points(group="vllm.endpoint_plugins")
        if entry.name in names and not entry.value.startswith("xllm_plugin.")
    }
    if foreign:
        # A name shared with an endpoint plugin would let that one in as well.
        logger.warning(
            "xllm-plugin: endpoint plugins %s share a name with ordinary plugins, so our routes "
            "under /xllm stay off; set VLLM_PLUGINS yourself to choose.",
            sorted(foreign),
        )
        return
    environ["VLLM_PLUGINS"] = ",".join(sorted(names))


class _AlreadyDecided(argparse.Action):
    """`--platform` reaches a parser only from vLLM's own --config file, which is too late."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        active = os.environ.get(PLATFORM_ENV, PLATFORMS[0])
        if self.dest == "platform" and values == active:
            setattr(namespace, self.dest, values)
            return
        parser.error(
            f"{option_string} {values} comes too late here: vLLM chose platform {active!r} before "
            "it read this. Give the option in full on the command line, or in the environment "
            "(XLLM_PLATFORM, XLLM_CONFIG, XLLM_REGISTRATION__URL)."
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Document our options; `xllm_plugin.selection` has taken them off the command line."""
    group = parser.add_argument_group("xLLM", "Options of xllm-plugin.")
    group.add_argument(
        "--platform",
        choices=PLATFORMS,
        default=os.environ.get(PLATFORM_ENV, PLATFORMS[0]),
        action=_AlreadyDecided,
        help="xllm, or native for vLLM without this plugin. Also XLLM_PLATFORM.",
    )
    group.add_argument(
        "--xllm-config",
        metavar="FILE",
        default=None,
        action=_AlreadyDecided,
        help="Settings of this plugin, YAML or JSON. Also XLLM_CONFIG; see `xllm doctor`.",
    )
    group.add_argument(
        "--register",
        metavar="URL",
        default=os.environ.get(REGISTER_ENV),
        action=_AlreadyDecided,
        help="Admin port of an `xllm service`, or etcd://host:port/prefix, to register at. "
        "Also XLLM_REGISTRATION__URL.",
    )
