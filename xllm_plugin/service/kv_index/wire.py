"""vLLM's KV events as they travel, mirrored so that the service need not import vLLM.

Source: ``vllm/distributed/kv_events.py`` of vLLM 0.32; `tests/service/kv_index/test_wire.py`
compares with it.  A message has three frames: topic, sequence number (8 bytes, big-endian) and a
msgpack batch.  Batches are arrays, events maps that name their type; fields that we do not know are
skipped.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = [
    "END_OF_REPLAY",
    "AllBlocksCleared",
    "Batch",
    "BlockHash",
    "BlockRemoved",
    "BlockStored",
    "Event",
    "decode",
]

END_OF_REPLAY: Final = (-1).to_bytes(8, "big", signed=True)
"""Sequence number of the frame that ends a replay."""

BlockHash = bytes | int
"""Opaque: its kind depends on VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES of the instance."""


class _Event(msgspec.Struct, tag=True, frozen=True, gc=False):
    pass


class BlockStored(_Event, frozen=True, gc=False):
    """Blocks of one chain have come into a cache; `token_ids` are all of them together."""

    block_hashes: list[BlockHash]
    parent_block_hash: BlockHash | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    """What beside the tokens tells a block from others, one entry a block: LoRA, images, salt."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    locality: str | None = None


class BlockRemoved(_Event, frozen=True, gc=False):
    """Blocks are no longer in a cache."""

    block_hashes: list[BlockHash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class AllBlocksCleared(_Event, frozen=True, gc=False):
    """The cache of the device is empty."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one step has changed."""

    ts: float
    events: list[Event]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(Batch)


def decode(payload: bytes) -> Batch:
    """Read one batch.  Raises `msgspec.DecodeError` (or `ValidationError`, its child)."""
    return _decoder.decode(payload)
