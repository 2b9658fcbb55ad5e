"""Which cores compute: OpenMP's threads and places for the one rank of an engine.

vLLM binds OpenMP where it starts one process a rank (vllm/utils/ompmultiprocessing.py) and keeps
one core of each rank for its scheduler.  An engine that computes in its own process schedules
between two steps on the same thread, so nothing is kept back, and the container's quota counts too.
"""

from __future__ import annotations

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
    "ThreadPlan",
    "allowed_cpus",
    "plan_here",
    "plan_threads",
    "quota_cpus",
]

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
    """The logical processors to compute on, one thread each; none: the user binds (`nobind`)."""

    cores: tuple[int, ...]

    def environment(self) -> dict[str, str]:
        """What OpenMP has to find in its environment when its library is loaded.

        One place of all the cores: the threads stay on them and the kernel may still move a thread
        away from a core that another process needs, which matters where the API server has no core
        of its own.
        """
        if not self.cores:
            return {}
        return {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "OMP_PLACES": "{" + ",".join(map(str, self.cores)) + "}",
            "OMP_PROC_BIND": "true",
        }

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Put `environment()` where a child process will find it."""
        environ.update(self.environment())


def plan_threads(
    cpus: Sequence[Cpu], quota_cpus: float | None, environ: Mapping[str, str]
) -> ThreadPlan:
    """Choose the cores of an engine's only rank.

    Args:
        cpus: the processors this process may run on.
        quota_cpus: the container's quota in processors, None without one.
        environ: vLLM's variables `VLLM_CPU_OMP_THREADS_BIND` ("auto", "nobind", or a list such as
            "0-3,8") and `VLLM_CPU_NUM_OF_RESERVED_CPU` (processors to leave alone).

    Raises:
        ConfigError: the list cannot be read, names processors that are not allowed here, or nothing
            is left to compute on.
    """
    bind = environ.get(BIND_ENV) or "auto"
    if bind == "nobind":
        return ThreadPlan(())
    if bind != "auto":
        return ThreadPlan(_named(bind, cpus))
    # One thread a physical core: two on one core share its vector units.
    highest = {(cpu.numa_node, cpu.physical_core): cpu.id for cpu in sorted(cpus, key=_by_id)}
    cores = sorted(highest.values())
    if quota_cpus is not None:
        cores = cores[: max(1, math.floor(quota_cpus))]
    reserved = _reserved(environ)
    if reserved >= len(cores):
        raise ConfigError(
            f"{RESERVED_ENV}={reserved} leaves nothing to compute on: {len(cores)} processors are "
            "usable here. Give a smaller number, or none."
        )
    return ThreadPlan(tuple(cores[: len(cores) - reserved]))


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
    """The container's CPU quota in processors (cgroup v2, else v1), or None without one."""
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
