"""The NPU family's record; imports neither torch nor torch_npu, and initialises no device."""

from __future__ import annotations

from collections.abc import Callable

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.hookspecs import hookimpl
from xllm_plugin.npu.requirements import SUPPORTED_TORCH_NPU, examine, requirements

__all__ = ["FAMILY", "probe", "register_device_families"]

LOOKED_FOR = f"torch_npu {SUPPORTED_TORCH_NPU}, CANN's libascendcl.so and an Ascend device"


def probe() -> Probe:
    """What was found on the way to a device, up to what is missing."""
    facts = tuple(requirements())
    found = ", ".join(f"{fact.name} {fact.found}" for fact in facts)
    mend = facts[-1].mend
    return Probe(not mend, LOOKED_FOR, f"{found}: {mend}" if mend else found)


FAMILY = DeviceFamily(
    name="npu",
    preference=20,
    platform_class="xllm_plugin.npu.platform.XllmNpuPlatform",
    probe=probe,
    capabilities=Capabilities(
        graph_modes=("eager", "full"),
        memory_driver="xllm_plugin.npu.memory.NpuMemoryDriver",
        graph_backend="xllm_plugin.npu.graph_backend.NpuGraphBackend",
    ),
    examine=examine,
)


@hookimpl
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Bring the NPU family."""
    register(FAMILY)
