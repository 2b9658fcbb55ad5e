"""The NPU family's self-test on the emulated device; mistakes of a device are made on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
import torch
from xllm_plugin.npu import selftest
from xllm_plugin.testing.cann.device import contract
def run(*names):
    cases = [case for case in selftest.CASES if not names or case.operator in names]
    return [[c.name, c.passed, c.error, c.problem, c.time_us is not None]
            for c in selftest.check_operators(cases)]
result = {"right": run()}
for name in ("npu_rms_norm", "npu_swiglu"):
    kept = contract.EMULATED[name]
    # The host's side is looked up at each call, the device's was registered at the start.
    contract.EMULATED[name] = lambda *a, kept=kept, **k: [
        t * torch.nan for t in torch.utils._pytree.tree_leaves(kept(*a, **k))]
    result[name] = run(name)
    contract.EMULATED[name] = kept
case = selftest.Case("npu_gelu", "2", lambda g: ((torch.ones(2), ), {}))
result["refused"] = [c.problem for c in selftest.check_operators([case])]
"""


def test_it_passes_what_is_right_and_fails_what_is_wrong(on_device: Callable[..., Any]) -> None:
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    assert len(found["right"]) == 16
    for name, passed, error, problem, timed in found["right"]:
        assert (passed, error, problem, timed) == (True, 0.0, "", True), name
    for name in ("npu_rms_norm", "npu_swiglu"):
        assert [passed for _, passed, *_ in found[name]] == [False], name
    assert "npu_gelu is not emulated" in found["refused"][0]
