"""An engine on the emulated device sleeps, gives its memory back, and answers as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xllm_plugin.models import prepare

pytestmark = [pytest.mark.npu, pytest.mark.engine, pytest.mark.full]

SOURCE = """
import torch
from vllm import LLM, SamplingParams
KV_BYTES = 2**26
llm = LLM(MODEL, enable_sleep_mode=True, max_model_len=512, max_num_seqs=4,
          kv_cache_memory_bytes=KV_BYTES)
prompts = [{"prompt_token_ids": [(7 * i * i + n) % 4000 for i in range(150)]} for n in range(3)]
sampling = SamplingParams(temperature=0, max_tokens=12)
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
runner = worker.model_runner
weights = sum(one.nbytes for one in runner.get_model().parameters())

def ask():
    return [list(one.outputs[0].token_ids) for one in llm.generate(prompts, sampling)]

def free():
    torch.npu.empty_cache()
    return torch.npu.mem_get_info()[0]

def refused(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"

before = ask()
num_captured = runner.graphs.statistics().num_captures
result = {"given back": {}, "same": {}, "captured": num_captured > 0}
for level in (1, 2):
    at_work = free()
    llm.sleep(level)
    asleep = free()
    result["given back"][level] = (asleep - at_work) / (KV_BYTES + weights)
    state = [worker.sleep_mode_backend.state()]
    if level == 1:
        llm.wake_up(tags=["weights"])
        state.append(worker.sleep_mode_backend.state())
        result["KV cache is away"] = asleep - free() <= 1.1 * weights + 2**20
        llm.wake_up(tags=["kv_cache"])
    else:
        llm.wake_up()
        llm.collective_rpc("reload_weights")
    state.append(worker.sleep_mode_backend.state())
    result[f"states {level}"] = state
    result["same"][level] = ask() == before
result["captured again"] = runner.graphs.statistics().num_captures > num_captured
result["level 3"] = refused(lambda: worker.sleep_mode_backend.suspend(3))
result["tag"] = refused(lambda: worker.sleep_mode_backend.resume(["graphs"]))
"""


def test_it_answers_as_before(on_device: Callable[..., Any]) -> None:
    found = on_device(
        f"MODEL = {str(prepare('tiny-llama'))!r}\n{SOURCE}",
        operators=True,
        XLLM_DEVICE="npu",
        XLLM_PLATFORM="xllm",
        XLLM_GRAPH__MIN_USES="1",
        XLLM_GRAPH__REPLAN_STEPS="2",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1",
    )
    assert "MisuseError: level=3: give 1" in found.pop("level 3")
    assert "MisuseError: tags=['graphs']: give weights, kv_cache or both" in found.pop("tag")
    given_back = found.pop("given back")  # as a part; a segment with anything else in it stays
    assert given_back["1"] > 0.95
    assert given_back["2"] > 0.85
    assert found == {
        "same": {"1": True, "2": True},
        "captured": True,
        "captured again": True,
        "KV cache is away": True,
        "states 1": ["SUSPENDED", "SUSPENDED", "RUNNING"],
        "states 2": ["SUSPENDED", "RUNNING"],
    }


STORAGES = """
from types import SimpleNamespace
import torch, torch_npu
from xllm_plugin.errors import NotNowError
from xllm_plugin.npu.sleep import NpuSleep
layer = torch.nn.Linear(256, 4096, bias=False).npu()
layer.register_buffer("table", torch.arange(9.0).npu())
layer.register_buffer("on_host", torch.arange(5.0))
layer.tied = torch.nn.Parameter(layer.weight.data[:7])
cache = torch.zeros(2**24, dtype=torch.int8, device="npu")
view = cache[5:9]
kept = (layer.weight, layer.tied, layer.table, layer.on_host)
expected = [one.detach().cpu().clone() for one in kept]
runner = SimpleNamespace(get_model=lambda: layer, graphs=None, kv_caches=[cache, view])
sleep = NpuSleep(runner)
sleep.suspend(1)
sleep.suspend(1)  # again, as after a sleep that failed: nothing is lost
result = {"asleep": [layer.weight.untyped_storage().nbytes(), view.untyped_storage().nbytes()]}
total = torch.npu.mem_get_info()[1]
taken = torch.empty(total - 2**23, dtype=torch.int8, device="npu")
try:
    sleep.resume()
except NotNowError as error:
    result["full"] = str(error)
del taken
torch.npu.empty_cache()
sleep.resume()
sleep.resume()
found = [one.detach().cpu() for one in kept]
result["same"] = [torch.equal(a, b) for a, b in zip(found, expected)]
cache.fill_(3)
result["view"] = view.tolist()
result["state"] = sleep.state()
"""


def test_views_and_tied_weights_are_right_and_a_full_device_can_be_tried_again(
    on_device: Callable[..., Any],
) -> None:
    variables = {"XLLM_CANN_MEMORY_BYTES": str(2**26), "XLLM_DEVICE": "npu"}
    found = on_device(STORAGES, operators=True, XLLM_PLATFORM="xllm", **variables)
    assert "no memory for" in found["full"]
    assert "call /wake_up again" in found.pop("full")
    assert found == {
        "asleep": [0, 0],
        "same": [True] * 4,
        "view": [3] * 4,
        "state": "RUNNING",
    }
