"""What the family needs of a machine: torch_npu, CANN, a device, and a chip that it runs on.

Imports neither torch nor torch_npu, and initialises no device; a device's memory, which only a
process that has taken it is told, is asked for by a child (`npu/availability.py`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator

from xllm_plugin.accelerator.family import Fact
from xllm_plugin.errors import NotNowError, PlatformError
from xllm_plugin.npu import availability
from xllm_plugin.npu.acl import PACKAGE_CANN, PACKAGE_DRIVER, Acl
from xllm_plugin.npu.socs import SOCS, soc_named

__all__ = ["SUPPORTED_TORCH_NPU", "examine", "requirements"]

SUPPORTED_TORCH_NPU = "2.13.0"
MIN_CANN = (8, 5)
"""Of torch_npu 2.12 by its own table, which does not name 2.13 yet."""

UNKNOWN = "of unknown version"


def examine() -> tuple[Fact, ...]:
    """The requirements and, where all are met, the memory of the device that is used."""
    facts = tuple(requirements())
    return facts if facts[-1].mend else (*facts, memory_fact())


def requirements() -> Iterator[Fact]:
    """In the order in which one needs the other; the last one is the first that is not met."""
    yield (wheel := torch_npu_fact())
    if wheel.mend:
        return
    needed = f"{'.'.join(map(str, MIN_CANN))} or newer"
    try:
        acl = Acl()
    except PlatformError as error:
        yield Fact("CANN", "none", needed, str(error))
        return
    cann = acl.package_version(PACKAGE_CANN)
    if cann is not None and is_older(cann, MIN_CANN):
        yield Fact("CANN", cann, needed, f"install CANN {needed}, and source its set_env.sh")
        return
    yield Fact("CANN", cann or UNKNOWN, needed)
    yield Fact("driver", acl.package_version(PACKAGE_DRIVER) or UNKNOWN)
    num_devices = acl.num_devices()
    if not num_devices:
        mend = (
            "look at `npu-smi info`, at ASCEND_RT_VISIBLE_DEVICES and at the rights on "
            "/dev/davinci*"
        )
        yield Fact("devices", "0", "at least 1", mend)
        return
    yield Fact("devices", str(num_devices), "at least 1")
    yield chip_fact(acl.soc_name())


def torch_npu_fact() -> Fact:
    """The version of torch_npu, which is not imported."""
    needed = f"{SUPPORTED_TORCH_NPU}, that of torch {SUPPORTED_TORCH_NPU}"
    install = f"pip install torch_npu=={SUPPORTED_TORCH_NPU}"
    if importlib.util.find_spec("torch_npu") is None:
        mend = f'{install}, on a machine with CANN alone (docs/npu.md, "Install")'
        return Fact("torch_npu", "none", needed, mend)
    version = torch_npu_version()
    is_right = version.split("+")[0] == SUPPORTED_TORCH_NPU
    return Fact("torch_npu", version, needed, "" if is_right else install)


def torch_npu_version() -> str:
    """The version of torch_npu's distribution, or "unknown"."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def chip_fact(name: str | None) -> Fact:
    """The chip by CANN's name for it; one without a name is taken."""
    needed = " or ".join(soc.product for soc in SOCS)
    if name is None:
        return Fact("chip", "without a name", needed)
    soc = soc_named(name)
    if soc is None:
        return Fact("chip", name, needed, f"it is not supported; {needed} are")
    return Fact("chip", f"{name} ({soc.product})", needed)


def memory_fact() -> Fact:
    """What is free on the first device, the one that is used; or why it cannot be taken."""
    try:
        memory = availability.ask(0)
    except NotNowError as error:
        return Fact("device 0", "cannot be taken", "", str(error))
    free, total = availability.gib(memory.free_bytes), availability.gib(memory.total_bytes)
    return Fact("device 0", f"{free} of {total} GiB free")


def is_older(version: str, than: tuple[int, ...]) -> bool:
    """Compare a version such as 8.3.RC1 by its leading numbers."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return numbers is not None and tuple(map(int, numbers[0].split("."))) < than
