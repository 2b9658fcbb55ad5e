"""Graph mode: a step of one-token requests is launched whole, by torch_npu's NPUGraph.

Attention takes its lengths from the host, and a captured task would keep those of its capture.
torch_npu replaces them before each replay (`NPUGraph.update`), on a stream of its own, and the
replayed work waits for that alone: the host waits for nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch_npu  # noqa: F401  registers torch.npu
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from xllm_plugin.accelerator.graphs import GraphHandle
from xllm_plugin.graph.cache import GraphCache
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.graph.mode import BatchShape, GraphKey, GraphMode

__all__ = ["DecodeGraphs", "NpuGraphBackend", "within_spare_memory"]

logger = logging.getLogger("vllm.xllm_plugin")

LENGTHS = "actual_seq_kvlen"
"""The argument of attention that differs from step to step and is the host's."""

STREAMS_RAN_OUT = re.compile(r"\b20700[58]\b")
"""CANN's errors: no resource, no stream (acl/error_codes/rt_error_codes.h)."""

num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, what its work returned, and the memory that it took."""

    graph: Any
    output: Any
    num_bytes: int


class NpuGraphBackend:
    """A `GraphBackend` over NPUGraph.

    Attributes:
        lengths: keys of each request in the next replay; None where no attention is captured.
    """

    def __init__(self) -> None:
        self.lengths: Sequence[int] | None = None
        self._graphs: dict[GraphHandle, Captured] = {}
        self._numbers = count(1)
        self._told_of_streams = False

    def capture(self, run: Callable[[], Any]) -> GraphHandle:
        """See `GraphBackend`."""
        graph = torch.npu.NPUGraph()
        torch.npu.synchronize()
        torch.npu.empty_cache()  # as the capture will, which must not count
        before_bytes = torch.npu.memory_reserved()
        stream, num_modes = torch.npu.current_stream(), num_dispatch_modes()
        try:
            with torch.npu.graph(graph, auto_dispatch_capture=True):
                output = run()
        except BaseException as error:  # raised again; half a capture keeps its memory
            # torch_npu leaves neither of these if its capture cannot begin or end.
            if num_dispatch_modes() > num_modes:
                graph.graph_dispatch_mode.__exit__(None, None, None)
            torch.npu.set_stream(stream)
            graph.reset()
            if self._finds_no_room(error):
                raise MemoryError(str(error)) from error
            raise
        handle = GraphHandle(next(self._numbers))
        num_bytes = max(0, torch.npu.memory_reserved() - before_bytes)
        self._graphs[handle] = Captured(graph, output, num_bytes)
        return handle

    def replay(self, graph: GraphHandle) -> Any:
        """See `GraphBackend`; `lengths` are put in first."""
        captured = self._get(graph)
        if self.lengths is not None:
            captured.graph.update([{LENGTHS: list(self.lengths)}])
        captured.graph.replay()
        return captured.output

    def drop(self, graph: GraphHandle) -> None:
        """See `GraphBackend`."""
        self._get(graph).graph.reset()
        del self._graphs[graph]
        torch.npu.empty_cache()

    def memory_used_bytes(self) -> int:
        """See `GraphBackend`; as measured at each capture."""
        return sum(captured.num_bytes for captured in self._graphs.values())

    def _finds_no_room(self, error: BaseException) -> bool:
        """Whether memory or streams ran out; of streams the log tells once."""
        errors = list(_with_causes(error))
        lacks_streams = any(STREAMS_RAN_OUT.search(str(one)) for one in errors)
        if lacks_streams and not self._told_of_streams:
            self._told_of_streams = True
            num_graphs = len(self._graphs)
            setting = f"graph.max_graphs to {num_graphs}" if num_graphs else "graph.mode to off"
            logger.warning(
                "xllm-plugin: the device has no streams or events for another graph beside the %d "
                "captured ones; steps of other sizes run eagerly. Set %s to keep to these, or end "
                "other processes on the device.",
                num_graphs,
                setting,
            )
        return lacks_streams or any(isinstance(one, torch.OutOfMemoryError) for one in errors)

    def _get(self, graph: GraphHandle) -> Captured:
        if graph not in self._graphs:
            raise ValueError(f"graph {graph} is unknown or dropped")
        return self._graphs[graph]


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised over: ending a capture that failed fails too."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__


def within_spare_memory(config: GraphConfig, working_bytes: int) -> GraphConfig:
    """Settings under which graphs leave alone the memory that eager steps work in.

    Args:
        config: the settings asked for.
        working_bytes: what the largest step makes and holds at once; weights and the KV cache are
            in place.
    """
    free_bytes, _ = torch.npu.mem_get_info()
    unused_bytes = torch.npu.memory_reserved() - torch.npu.memory_allocated()
    spare_bytes = max(0, free_bytes + unused_bytes - working_bytes)
    if spare_bytes >= config.memory_bytes:
        return config
    logger.info(
        "xllm-plugin: graphs may take %d MiB, not graph.memory_bytes (%d MiB): weights, the KV "
        "cache and the steps themselves need the rest.",
        spare_bytes // 2**20,
        config.memory_bytes // 2**20,
    )
    return config.model_copy(update={"memory_bytes": spare_bytes})


class DecodeGraphs:
    """Runs the model on a graph where a step has one new token a request and its size is common.

    A batch is padded to the graph's size with requests of one key in block 0, which vLLM gives to
    nobody; each has a slot of its own there.

    Args:
        runner: vLLM's, with its KV cache in place.
        config: sizes and limits.
    """

    def __init__(self, runner: Any, config: GraphConfig) -> None:
        (group,) = runner.attn_groups[0]
        self._runner = runner
        self._layer_names: list[str] = group.layer_names
        self._builder = group.get_metadata_builder()
        self._backend = NpuGraphBackend()
        self._cache = GraphCache(self._backend, frozenset({GraphMode.FULL}), config)
        table = runner.input_batch.block_table[0]
        size, device = runner.max_num_reqs, runner.device
        self._input_ids = torch.zeros(size, dtype=torch.int32, device=device)
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)
        self._own_slots = torch.arange(size, device=device) % table.block_size
        self._slots = self._own_slots.clone()
        self._table = torch.zeros_like(table.block_table.gpu)
        self._query_ends = torch.arange(size + 1, dtype=torch.int32)

    def forward(
        self, eager: Callable[[], Any], input_ids: torch.Tensor, positions: torch.Tensor
    ) -> Any:
        """The model's output for this step, [tokens, hidden].

        Args:
            eager: runs it operator by operator.
            input_ids: [tokens].
            positions: [tokens].
        """
        captured = self._cache.maintain(self._work)
        if captured is not None:
            logger.info(
                "xllm-plugin: steps of %d requests run as one graph from now on (%d MiB in all).",
                captured.num_tokens,
                self._backend.memory_used_bytes() // 2**20,
            )
        lengths = self._lengths_of_decodes()
        num_tokens = len(input_ids)
        shape = BatchShape(num_tokens, is_decode=lengths is not None)
        decision = self._cache.decide(shape)
        if decision.key is None or lengths is None:
            return eager()
        size = decision.key.num_tokens
        self._fill(size, input_ids, positions)
        self._backend.lengths = [*lengths, *[1] * (size - num_tokens)]
        return self._cache.replay(decision.key)[:num_tokens]

    def statistics(self) -> Any:
        """See `GraphCache`."""
        return self._cache.statistics()

    def _lengths_of_decodes(self) -> list[int] | None:
        """Keys of each request if each has one new token, else None."""
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return None
        lengths: list[int] | None = metadata[self._layer_names[0]].lengths_of_decodes()
        return lengths

    def _fill(self, size: int, input_ids: torch.Tensor, positions: torch.Tensor) -> None:
        table, num_tokens = self._runner.input_batch.block_table[0], len(input_ids)
        self._input_ids[:num_tokens].copy_(input_ids)
        self._positions[:num_tokens].copy_(positions)
        self._table[:num_tokens].copy_(table.get_device_tensor(num_tokens))
        self._slots[:num_tokens].copy_(table.slot_mapping.gpu[:num_tokens])
        self._input_ids[num_tokens:size].zero_()
        self._positions[num_tokens:size].zero_()
        self._table[num_tokens:size].zero_()
        self._slots[num_tokens:size].copy_(self._own_slots[num_tokens:size])

    def _work(self, key: GraphKey) -> Callable[[], Any]:
        """What is captured: the step's metadata, made on the device, and the model."""
        size, runner = key.num_tokens, self._runner
        ends = self._query_ends[: size + 1]
        common = CommonAttentionMetadata(
            query_start_loc=ends,
            query_start_loc_cpu=ends,
            seq_lens=torch.ones(size, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.ones(size, dtype=torch.int32),
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=runner.max_model_len,
            block_table_tensor=self._table[:size],
            slot_mapping=self._slots[:size],
        )
        slots = dict.fromkeys(self._layer_names, self._slots[:size])
        self._input_ids[:size].zero_()
        self._positions[:size].zero_()
        self._table[:size].zero_()
        self._slots[:size].copy_(self._own_slots[:size])

        def run() -> Any:
            metadata = dict.fromkeys(self._layer_names, self._builder.build(0, common))
            config = runner.vllm_config
            with set_forward_context(metadata, config, num_tokens=size, slot_mapping=slots):
                return runner.model(
                    input_ids=self._input_ids[:size],
                    positions=self._positions[:size],
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )

        return run
