"""The NPU family's graphs on the emulated device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.full]

SOURCE = """
import torch, torch_npu
from xllm_plugin.npu.attention import causal_mask
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.npu.graph_backend import NpuGraphBackend
from xllm_plugin.npu.graphs import within_spare_memory
from xllm_plugin.npu.testkit import probe_graphs
from xllm_plugin.testing.conformance import check_graph_backend
torch.manual_seed(0)
result = {"unchecked": [one.clause for one in check_graph_backend(NpuGraphBackend, probe_graphs)]}

config = GraphConfig()
total = torch.npu.mem_get_info()[1]
result["budget"] = [
    within_spare_memory(config, 0) is config,
    0 < within_spare_memory(config, total - 2**29).memory_bytes <= 2**29 < config.memory_bytes,
    within_spare_memory(config, total).memory_bytes]

mask = causal_mask(torch.device("npu"))
pages = [torch.randn(6, 128, 2 * 128).bfloat16().npu() for _ in range(2)]
query = torch.randn(2, 4, 128).bfloat16().npu()
table = torch.tensor([[3, 1], [4, 0]], dtype=torch.int32).npu()
def attend(lengths):
    return torch_npu.npu_fused_infer_attention_score_v2(
        query * 2, *pages, atten_mask=mask, actual_seq_qlen=[1, 2], actual_seq_kvlen=lengths,
        block_table=table, num_query_heads=4, num_key_value_heads=2, softmax_scale=0.1,
        input_layout="TND", sparse_mode=3, block_size=128)[0] + 1
with torch.inference_mode():
    backend = NpuGraphBackend()
    graph = backend.capture(lambda: attend([1, 1]))
    same = []
    for lengths in ([200, 5], [7, 128], [1, 1]):
        backend.lengths = lengths
        query.copy_(torch.randn(2, 4, 128))
        table.copy_(torch.randperm(4).view(2, 2))
        found = backend.replay(graph)
        same.append(torch.equal(found.cpu(), attend(lengths).cpu()))
    result["same"] = same
    try:
        backend.capture(lambda: query.sum().item())
    except RuntimeError as error:
        result["waits"] = str(error)
    import ctypes, logging
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("vllm.xllm_plugin").addHandler(handler)
    streams = [torch.npu.current_stream()]
    for _ in range(2):
        ctypes.CDLL("libascendcl.so").emulator_fail_streams()
        try:
            backend.capture(lambda: query + 1)
        except MemoryError as error:
            result["no streams"] = str(error)
    streams.append(torch.npu.current_stream())
    result["left"] = [streams[0] == streams[1], torch._C._len_torch_dispatch_stack()]
    result["said"] = said
    again = backend.capture(lambda: query + 1)
    backend.lengths = None
    result["again"] = torch.equal(backend.replay(again).cpu(), (query + 1).cpu())
    backend.drop(again)
    backend.lengths = [1, 1]
    result["after"] = torch.equal(backend.replay(graph).cpu(), attend([1, 1]).cpu())
"""


def test_replays_read_present_inputs_and_lengths(on_device: Callable[..., Any]) -> None:
    found = on_device(SOURCE, operators=True, XLLM_DEVICE="npu", XLLM_PLATFORM="xllm")
    assert "waits for the device" in found.pop("waits")
    assert found["same"] == [True] * 3
    assert found["after"]
    assert found["budget"] == [True, True, 0]
    assert "207008" in found["no streams"]
    assert found["left"] == [True, 0]
    assert found["again"]
    (said,) = found["said"]
    assert "no streams or events for another graph beside the 1 captured ones" in said
    assert found["unchecked"] == []
