"""The NPU family's record; imports neither torch nor torch_npu, and initialises no device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.errors import PlatformError
from xllm_plugin.hookspecs import hookimpl

__all__ = ["FAMILY", "SUPPORTED_TORCH_NPU", "register_device_families"]

SUPPORTED_TORCH_NPU = "2.13.0"


def probe() -> Probe:
    """Look for torch_npu, CANN and a device, in this order."""
    looked_for = f"torch_npu {SUPPORTED_TORCH_NPU}, CANN's libascendcl.so and an Ascend device"
    if importlib.util.find_spec("torch_npu") is None:
        return Probe(False, looked_for, "no torch_npu (pip install 'xllm-plugin[npu]')")
    version = torch_npu_version()
    if version.split("+")[0] != SUPPORTED_TORCH_NPU:
        return Probe(
            False, looked_for, f"torch_npu {version} (pip install torch_npu=={SUPPORTED_TORCH_NPU})"
        )
    from xllm_plugin.npu.acl import Acl

    try:
        num_devices = Acl().num_devices()
    except PlatformError as error:
        return Probe(False, looked_for, f"torch_npu {version}, and {error}")
    if not num_devices:
        return Probe(
            False,
            looked_for,
            f"torch_npu {version} and CANN, but no device; look at `npu-smi info`, at "
            "ASCEND_RT_VISIBLE_DEVICES and at the rights on /dev/davinci*",
        )
    return Probe(True, looked_for, f"torch_npu {version}, {num_devices} Ascend device(s)")


def torch_npu_version() -> str:
    """The version of torch_npu's distribution, or "unknown"."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


FAMILY = DeviceFamily(
    name="npu",
    preference=20,
    platform_class="xllm_plugin.npu.platform.XllmNpuPlatform",
    probe=probe,
    capabilities=Capabilities(memory_driver="xllm_plugin.npu.memory.NpuMemoryDriver"),
)


@hookimpl
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Bring the NPU family."""
    register(FAMILY)
