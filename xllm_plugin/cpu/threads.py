"""Which cores compute: OpenMP's threads and places for the one rank of an engine.

vLLM binds OpenMP where it starts one process a rank (vllm/utils/ompmultiprocessing.py) and keeps
one core of each rank for its scheduler.  An engine that computes in its own process schedules
between two steps on the same thread, so nothing is kept back, and the container's quota counts too.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ConfigError

__all__ = [
    "BIND_ENV",
    "RESERVED_ENV",
    "Cpu",
    "OpenMPEnvironment",
    "ThreadPlan",
    "allowed_cpus",
    "plan_here",
    "plan_threads",
    "quota_cpus",
]

logger = logging.getLogger("vllm.xllm_plugin")

BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"
RESERVED_ENV = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@dataclass(frozen=True, slots=True)
class Cpu:
    """One logical processor: its number, its physical core, and its memory node."""

    id: int
    physical_core: int
    numa_node: int


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """How many threads compute, and on which logical processors; none: the user binds (`nobind`).

    There are fewer threads than processors where a quota allows less time than there are
    processors: pods of one machine must not all choose its first ones.
    """

    num_threads: int
    cores: tuple[int, ...]

    def environment(self, ld_preload: str = "") -> dict[str, str]:
        """What OpenMP has to find in its environment when its library is loaded.

        One place of all the cores: the threads stay on them and the kernel may still move a thread
        away from a core that another process needs, which matters where the API server has no core
        of its own.
        """
        if not self.cores:
            return {}
        found = {
            "OMP_NUM_THREADS": str(self.num_threads),
            "OMP_PLACES": "{" + ",".join(map(str, self.cores)) + "}",
            "OMP_PROC_BIND": "true",
        }
        if "libiomp" in ld_preload or "libomp" in ld_preload:
            # As vLLM sets them: Intel's library would spin for 200 ms after each region.
            found |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
        return found


class OpenMPEnvironment:
    """What a process put into its environment for an engine it starts, and what was there before.

    A program may build one engine after the other; the next one must not inherit the binding of
    this one.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._environ = environ
        self._before: dict[str, str | None] = {}

    def bind(self, plan: ThreadPlan) -> None:
        """Bind the processes that start from now on."""
        self.release()
        wanted = plan.environment(self._environ.get("LD_PRELOAD", ""))
        self._before = {name: self._environ.get(name) for name in wanted}
        self._environ.update(wanted)

    def release(self) -> None:
        """Put back what was there."""
        for name, value in self._before.items():
            if value is None:
                self._environ.pop(name, None)
            else:
                self._environ[name] = value
        self._before = {}


def plan_threads(
    cpus: Sequence[Cpu], quota_cpus: float | None, environ: Mapping[str, str]
) -> ThreadPlan:
    """Choose the threads of an engine's only rank.

    Args:
        cpus: the processors this process may run on.
        quota_cpus: the container's quota in processors, None without one.
        environ: vLLM's variables `VLLM_CPU_OMP_THREADS_BIND` ("auto", "nobind", or a list such as
            "0-3,8") and `VLLM_CPU_NUM_OF_RESERVED_CPU` (processors to leave alone).

    Raises:
        ConfigError: the list cannot be read or names processors that are not allowed here, or the
            number is none.
    """
    bind = environ.get(BIND_ENV) or "auto"
    if bind == "nobind":
        return ThreadPlan(0, ())
    if bind != "auto":
        named = _named(bind, cpus)
        return ThreadPlan(len(named), named)
    # One thread a physical core: two on one core share its vector units.
    highest = {(cpu.numa_node, cpu.physical_core): cpu.id for cpu in sorted(cpus, key=_by_id)}
    cores = sorted(highest.values())
    reserved = _reserved(environ)
    if reserved >= len(cores):
        logger.warning(
            "xllm-plugin: %s=%d leaves none of %d processors to compute on; all compute.",
            RESERVED_ENV,
            reserved,
            len(cores),
        )
        reserved = 0
    cores = cores[: len(cores) - reserved]
    limit = len(cores) if quota_cpus is None else max(1, math.floor(quota_cpus))
    return ThreadPlan(min(limit, len(cores)), tuple(cores))


def _by_id(cpu: Cpu) -> int:
    return cpu.id


def _reserved(environ: Mapping[str, str]) -> int:
    value = environ.get(RESERVED_ENV) or "0"
    if not value.isdecimal():
        raise ConfigError(f"{RESERVED_ENV}={value!r} is not a number of processors.")
    return int(value)


def _named(bind: str, cpus: Sequence[Cpu]) -> tuple[int, ...]:
    try:
        named = sorted({core for part in bind.split(",") for core in _span(part)})
    except ValueError as error:
        raise ConfigError(
            f"{BIND_ENV}={bind!r} is not 'auto', 'nobind' or a list of processors such as 0-3,8."
        ) from error
    allowed = {cpu.id for cpu in cpus}
    absent = [core for core in named if core not in allowed]
    if absent:
        raise ConfigError(
            f"{BIND_ENV}={bind!r} names processors {absent}; this process may run on "
            f"{sorted(allowed)}."
        )
    return tuple(named)


def _span(part: str) -> range:
    first, dash, last = part.partition("-")
    found = range(int(first), int(last if dash else first) + 1)
    if not found:
        raise ValueError(part)
    return found


def allowed_cpus() -> list[Cpu]:
    """The processors this process may run on, as vLLM sees them (affinity and memory nodes)."""
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    return [Cpu(cpu.id, cpu.physical_core, cpu.numa_node) for cpu in get_allowed_cpu_list()]


def quota_cpus(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The quota of the control group that is mounted here, as a container sees its own.

    Returns:
        Processors (cgroup v2, else v1), or None without a quota.
    """
    try:
        quota, period = (root / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        quota, period = _quota_v1(root)
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _quota_v1(root: Path) -> tuple[str, str]:
    try:
        quota = (root / "cpu" / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
        period = (root / "cpu" / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
    except OSError:
        return "max", ""
    return quota, period


def plan_here() -> ThreadPlan:
    """The plan for this process, from its affinity, its container and its environment."""
    return plan_threads(allowed_cpus(), quota_cpus(), os.environ)
