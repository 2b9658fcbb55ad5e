"""The real torch_npu over the emulated CANN, without operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.npu


def test_device_memory_copies_streams_and_events(on_device: Callable[..., Any]) -> None:
    found = on_device(
        """
        import ctypes, torch, torch_npu
        result = {"before": [torch.npu.is_available(), torch.npu.device_count()]}
        torch.npu.set_device(0)
        there = torch.empty(1000, device="npu:0")
        result["fresh_is_nan"] = bool(there.cpu().isnan().all())
        here = torch.arange(1000.0)
        there.copy_(here)
        again = torch.empty_like(there).copy_(there)
        result["device"] = str(again.device)
        result["same"] = torch.equal(again.cpu(), here)
        pinned = torch.empty(1000, pin_memory=True)
        pinned.copy_(there, non_blocking=True)
        torch.npu.synchronize()
        result["pinned_same"] = torch.equal(pinned, here)

        stream = torch.npu.Stream()
        first, second = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
        first.record(stream)
        stream.wait_event(first)
        second.record(stream)
        second.synchronize()
        result["in_order"] = first.elapsed_time(second) >= 0
        cann = ctypes.CDLL("libascendcl.so")
        cann.emulator_hold()
        late = torch.npu.Event()
        late.record()
        result["while_busy"] = [second.query(), late.query(), stream.query()]
        cann.emulator_release()
        late.synchronize()
        result["when_idle"] = [late.query(), stream.query()]

        free, total = torch.npu.mem_get_info()
        block = torch.empty(2**26, dtype=torch.uint8, device="npu")
        result["memory"] = [total, free - torch.npu.mem_get_info()[0]]
        result["name"] = torch.npu.get_device_name(0)
        """
    )
    assert found["before"] == [True, 1]
    assert found["fresh_is_nan"]
    assert found["device"] == "npu:0"
    assert found["same"]
    assert found["pinned_same"]
    assert found["in_order"]
    assert found["while_busy"] == [True, False, False]
    assert found["when_idle"] == [True, True]
    assert found["memory"][0] == 4 * 2**30
    assert found["memory"][1] >= 2**26
    assert found["name"] == "Ascend910B3"


def test_mistakes_and_limits_are_the_devices(on_device: Callable[..., Any]) -> None:
    found = on_device(
        """
        import torch, torch_npu
        def refusal(call):
            try:
                call()
            except RuntimeError as error:
                return str(error)
        torch.npu.set_device(0)
        result = {
            "second device": refusal(lambda: torch.npu.set_device(1)),
            "too much": refusal(lambda: torch.empty(2**28, dtype=torch.uint8, device="npu")),
            "operator": refusal(lambda: torch.npu.synchronize(torch.zeros(3, device="npu").sum())),
            "host tensor": refusal(lambda: torch_npu.npu_rms_norm(torch.ones(2, 4), torch.ones(4))),
        }
        """,
        XLLM_CANN_MEMORY_BYTES=str(2**27),
    )
    assert found["second device"]
    assert "out of memory" in found["too much"]
    assert found["operator"]
    assert "PrivateUse1" in found["host tensor"] or "npu" in found["host tensor"]


def test_without_a_device_importing_still_works(on_device: Callable[..., Any]) -> None:
    found = on_device(
        """
        import torch, torch_npu
        result = [torch.npu.is_available(), torch.npu.device_count(), torch.ones(2).sum().item()]
        """,
        XLLM_CANN_DEVICES="0",
    )
    assert found == [False, 0, 2.0]
