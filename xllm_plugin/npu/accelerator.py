"""The NPU family's record; imports neither torch nor torch_npu, and initialises no device."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.errors import PlatformError
from xllm_plugin.hookspecs import hookimpl
from xllm_plugin.npu.acl import Acl
from xllm_plugin.npu.socs import SOCS, soc_named

__all__ = ["FAMILY", "SUPPORTED_TORCH_NPU", "register_device_families"]

SUPPORTED_TORCH_NPU = "2.13.0"
MIN_CANN = (8, 5)
"""Of torch_npu 2.12 by its own table, which does not name 2.13 yet."""


def probe() -> Probe:
    """Look for torch_npu, CANN and a device, in this order."""
    looked_for = f"torch_npu {SUPPORTED_TORCH_NPU}, CANN's libascendcl.so and an Ascend device"
    if importlib.util.find_spec("torch_npu") is None:
        return Probe(False, looked_for, "no torch_npu (only beside CANN; see docs/npu.md)")
    version = torch_npu_version()
    if version.split("+")[0] != SUPPORTED_TORCH_NPU:
        return Probe(
            False, looked_for, f"torch_npu {version} (pip install torch_npu=={SUPPORTED_TORCH_NPU})"
        )
    try:
        acl = Acl()
    except PlatformError as error:
        return Probe(False, looked_for, f"torch_npu {version}, and {error}")
    return probe_cann(acl, looked_for, f"torch_npu {version}")


def probe_cann(acl: Acl, looked_for: str, so_far: str) -> Probe:
    """Look at what the loaded CANN says about itself and its devices."""
    cann = acl.cann_version()
    so_far += f", CANN {cann or 'of unknown version'}"
    if cann is not None and is_older(cann, MIN_CANN):
        needed = ".".join(map(str, MIN_CANN))
        return Probe(False, looked_for, f"{so_far}, which is older than {needed}; install that one")
    num_devices = acl.num_devices()
    if not num_devices:
        return Probe(
            False,
            looked_for,
            f"{so_far}, but no device; look at `npu-smi info`, at ASCEND_RT_VISIBLE_DEVICES and at "
            "the rights on /dev/davinci*",
        )
    name = acl.soc_name()
    if name is not None and soc_named(name) is None:
        known = " and ".join(soc.product for soc in SOCS)
        return Probe(False, looked_for, f"{so_far} and {name}; supported are {known}")
    return Probe(True, looked_for, f"{so_far}, {num_devices} device(s) {name or 'without a name'}")


def is_older(version: str, than: tuple[int, ...]) -> bool:
    """Compare a version such as 8.3.RC1 by its leading numbers."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return numbers is not None and tuple(map(int, numbers[0].split("."))) < than


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
    capabilities=Capabilities(
        graph_modes=("eager", "full"),
        memory_driver="xllm_plugin.npu.memory.NpuMemoryDriver",
        graph_backend="xllm_plugin.npu.graphs.NpuGraphBackend",
    ),
)


@hookimpl
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Bring the NPU family."""
    register(FAMILY)
