"""How the CUDA memory driver is checked on a device; see `xllm_plugin.testing.conformance`."""

from __future__ import annotations

from xllm_plugin.cuda.memory import CudaMemoryDriver
from xllm_plugin.testing.conformance import MemoryKit, MemoryProbe

__all__ = ["MEMORY_KIT", "probe_memory"]


def probe_memory(driver: CudaMemoryDriver) -> MemoryProbe:
    """Reading and writing; what needs a device that fails or is busy on demand stays unchecked."""

    def read(address: int, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        with driver.current():
            driver.call("cuMemcpyDtoH", data, address, num_bytes)
        return bytes(data)

    def write(address: int, data: bytes) -> None:
        with driver.current():
            driver.call("cuMemcpyHtoD", address, data, len(data))

    return MemoryProbe(read=read, write=write)


MEMORY_KIT = MemoryKit(CudaMemoryDriver, probe_memory)
