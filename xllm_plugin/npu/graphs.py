"""Graph mode: a step of one-token requests is launched whole, as one captured graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch_npu  # noqa: F401  registers torch.npu
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from xllm_plugin.graph.cache import GraphCache
from xllm_plugin.graph.config import GraphConfig
from xllm_plugin.graph.mode import BatchShape, GraphKey, GraphMode
from xllm_plugin.npu.graph_backend import NpuGraphBackend

__all__ = ["DecodeGraphs", "within_spare_memory"]

logger = logging.getLogger("vllm.xllm_plugin")


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

    def drop_all(self) -> None:
        """See `GraphCache`."""
        self._cache.drop_all()

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
