"""The NPU's memory driver on the emulated device; its contract is checked in test_conformance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.npu


def test_tensors_show_the_pages_behind_them(on_device: Callable[..., Any]) -> None:
    found = on_device(
        """
        import torch, torch_npu
        from xllm_plugin.npu.memory import NpuMemoryDriver
        driver = NpuMemoryDriver()
        size = driver.granularity_bytes
        start, (first, second) = driver.reserve(4 * size), driver.create(2)
        driver.map({start: first, start + size: second, start + 2 * size: first})
        tensor = driver.tensor(start, 4 * size)
        pages = tensor.view(4, size)
        result = {"device": str(tensor.device), "address": tensor.data_ptr() == start}
        pages[0].copy_(torch.full((size,), 3, dtype=torch.int8))
        pages[1].copy_(torch.full((size,), 5, dtype=torch.int8))
        result["alias"] = [int(pages[slot].cpu()[7]) for slot in range(3)]
        driver.unmap([start + 2 * size])
        driver.map({start + 2 * size: second})
        result["moved"] = int(pages[2].cpu()[7])
        try:
            driver.tensor(start + size, 4 * size)
        except ValueError as error:
            result["outside"] = str(error)
        before = torch.npu.mem_get_info()[0]
        driver.unmap([start, start + size, start + 2 * size])
        driver.release([first, second])
        driver.unreserve(start, 4 * size)
        result["given back"] = (torch.npu.mem_get_info()[0] - before) // size
        """
    )
    assert found.pop("outside").endswith("not in one reserved range")
    assert found == {
        "device": "npu:0",
        "address": True,
        "alias": [3, 5, 3],
        "moved": 5,
        "given back": 2,
    }
