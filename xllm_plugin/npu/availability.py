"""Before anything slow: can the device be taken, and is there memory for what is asked?

CANN tells a device's memory only to a process that has taken it, and a server's process must not:
its engine, another process, will.  So a child asks and ends, and a driver that hangs or crashes
takes nobody with it.  As a command (``python -m xllm_plugin.npu.availability INDEX``) this file is
that child; it imports neither torch nor vLLM.
"""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import sys
from dataclasses import dataclass

from xllm_plugin.errors import NotNowError, PlatformError
from xllm_plugin.npu.acl import HBM_MEM, Acl

__all__ = ["Demand", "DeviceMemory", "ask", "check_memory", "gib"]

PATIENCE_S = 300
"""Taking a device is a matter of seconds; one that takes longer than this hangs."""

GIB = 2**30


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What a device had when it was asked."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """The least that a model needs on a device.

    Attributes:
        weights_bytes: in the type that they are served in; 0 where they are not known yet.
        kv_cache_bytes: of one request of `num_tokens`, or what was asked for in bytes.
        working_bytes: of what a step makes on its way.
        num_tokens: the longest request; None where `kv_cache_bytes` was asked for.
        step_tokens: the most tokens of a step.
        step_requests: the most requests of a step.
        utilization: the part of the device's memory that may be used.
    """

    weights_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    num_tokens: int | None
    step_tokens: int
    step_requests: int
    utilization: float

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.working_bytes


def ask(device_index: int) -> DeviceMemory:
    """What a device has, asked once in the life of this process.

    Raises:
        NotNowError: it cannot be taken; the message says what CANN said.
    """
    found = answer(device_index)
    if isinstance(found, str):
        raise NotNowError(cannot_be_taken(device_index, found))
    return found


@functools.cache
def answer(device_index: int) -> DeviceMemory | str:
    """What a device has, or why it cannot be taken.

    A value, so that it is kept: vLLM asks for a device's memory and ignores any error
    (vllm/engine/arg_utils.py), and a driver that hangs is not to be waited for twice.
    """
    command = [sys.executable, "-m", __name__, str(device_index)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE_S
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PATIENCE_S} s"
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return said[-1] if said else f"the driver ended the process ({done.returncode})"
    free, total = done.stdout.split()[-2:]
    return DeviceMemory(int(free), int(total))


def cannot_be_taken(device_index: int, reason: str) -> str:
    """One message for a device that is busy, sick or somebody else's: CANN has no code for each."""
    return (
        f"device {device_index} cannot be taken: {reason}. Another process or container may hold "
        "it, or it is not well: `npu-smi info` shows both. Free it, or name another one in "
        "ASCEND_RT_VISIBLE_DEVICES."
    )


def check_memory(device_index: int, memory: DeviceMemory, demand: Demand) -> None:
    """See that a model may fit.

    Raises:
        NotNowError: others hold memory that is asked for.
        PlatformError: the device is too small for the model.
    """
    share = math.ceil(memory.total_bytes * demand.utilization)
    free, total = gib(memory.free_bytes), gib(memory.total_bytes)
    if memory.free_bytes < share:
        fitting = math.floor(100 * memory.free_bytes / memory.total_bytes) / 100
        less = f", or give --gpu-memory-utilization {fitting}" if fitting else ""
        raise NotNowError(
            f"device {device_index} has {free} of its {total} GiB free, and "
            f"--gpu-memory-utilization {demand.utilization} asks for {gib(share)}: other processes "
            "hold the rest, and `npu-smi info` names them. End them, name another device in "
            f"ASCEND_RT_VISIBLE_DEVICES{less}."
        )
    if demand.num_tokens is None:  # vLLM, too, takes it out of all that is free
        limit_bytes, limit = memory.free_bytes, "all that is free"
        cache, flag = "the KV cache asked for", "--kv-cache-memory-bytes"
    else:
        limit_bytes, limit = share, f"--gpu-memory-utilization {demand.utilization}"
        cache = f"the KV cache of one request of {demand.num_tokens} tokens"
        flag = "--max-model-len"
    if demand.total_bytes > limit_bytes:
        raise PlatformError(
            f"device {device_index} gives {gib(limit_bytes)} of its {total} GiB ({limit}), and the "
            f"model needs at least {gib(demand.total_bytes)}: {gib(demand.weights_bytes)} for "
            f"weights in bfloat16, {gib(demand.kv_cache_bytes)} for {cache}, "
            f"{gib(demand.working_bytes)} to compute steps of {demand.step_tokens} tokens and "
            f"{demand.step_requests} requests. Give a smaller {flag}, --max-num-batched-tokens or "
            "--max-num-seqs, a smaller model or a device with more memory."
        )


def gib(num_bytes: int) -> str:
    """In GiB, as vLLM writes it."""
    return f"{num_bytes / GIB:.2f}"


def take_and_measure(acl: Acl, device_index: int) -> DeviceMemory:
    """Take a device in this process, for as long as it takes to read its memory.

    Raises:
        MemoryError: the device is out of memory.
        RuntimeError: anything else went wrong.
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    acl.call("aclInit", None)
    acl.call("aclrtSetDevice", device_index)
    acl.call("aclrtGetMemInfo", HBM_MEM, ctypes.byref(free), ctypes.byref(total))
    acl.call("aclrtResetDevice", device_index)
    return DeviceMemory(free.value, total.value)


def main() -> None:
    """Answer with two numbers, or with CANN's words on stderr."""
    try:
        memory = take_and_measure(Acl(), int(sys.argv[1]))
    except (MemoryError, PlatformError, RuntimeError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"\n{memory.free_bytes} {memory.total_bytes}\n")


if __name__ == "__main__":
    main()
