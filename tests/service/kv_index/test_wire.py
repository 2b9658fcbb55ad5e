"""The wire format is vLLM's: what its own classes encode is understood, and nothing is missing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from xllm_plugin.service.kv_index import wire

events = pytest.importorskip("vllm.distributed.kv_events", reason="no vLLM to compare with")
pytestmark = pytest.mark.filterwarnings("default")

STORED: dict[str, Any] = {
    "block_hashes": [b"\x01" * 32, 2**64 - 1],
    "parent_block_hash": b"p",
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": 1,
    "medium": "CPU",
    "lora_name": "l",
    "extra_keys": [("l", ("image", -3), "salt"), None],
    "group_idx": 1,
    "kv_cache_spec_kind": "full_attention",
    "kv_cache_spec_sliding_window": 128,
    "locality": "REMOTE",
    "ownership": "o",
    "session_id": "s",
}


def as_vllm_sends(*found: Any, rank: int | None = 3) -> wire.Batch:
    batch = events.KVEventBatch(ts=1.5, events=list(found), data_parallel_rank=rank)
    return wire.decode(msgspec.msgpack.Encoder().encode(batch))


def test_every_event_is_read_as_it_was_meant() -> None:
    removed = {"block_hashes": [b"a", 2], "medium": "GPU", "group_idx": 2, "locality": "LOCAL"}
    batch = as_vllm_sends(
        events.BlockStored(**STORED), events.BlockRemoved(**removed), events.AllBlocksCleared()
    )
    assert (batch.ts, batch.data_parallel_rank) == (1.5, 3)
    stored, gone, cleared = batch.events
    assert isinstance(stored, wire.BlockStored)
    for name in wire.BlockStored.__struct_fields__:
        expected = STORED[name]
        if name == "extra_keys":
            expected = [["l", ["image", -3], "salt"], None]
        assert getattr(stored, name) == expected
    assert gone == wire.BlockRemoved(**removed)
    assert cleared == wire.AllBlocksCleared()


def test_fields_that_vllm_leaves_out_are_defaults() -> None:
    least = {name: STORED[name] for name in list(STORED)[:4]}
    stored = events.BlockStored(**least, lora_id=None, medium=None, lora_name=None)
    assert as_vllm_sends(stored, rank=None) == wire.Batch(1.5, [wire.BlockStored(**least)])


def test_the_frames_are_those_of_its_publisher() -> None:
    assert events.ZmqEventPublisher.END_SEQ == wire.END_OF_REPLAY


def test_vllm_has_no_other_event() -> None:
    """Red when upstream adds one: it has to be understood."""
    union = events.KVEventBatch.__annotations__["events"]
    names = {one.__name__ for one in union.__args__[0].__args__}
    assert names == {"BlockStored", "BlockRemoved", "AllBlocksCleared"}


def test_nonsense_is_refused() -> None:
    for payload in (b"", b"\xc1", msgspec.msgpack.encode([1.0, [{"type": "Other"}]])):
        with pytest.raises(msgspec.DecodeError):
            wire.decode(payload)
