"""Memory as the kernel and an engine tell it: what is read, and what is told when nothing is."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from xllm_plugin.bench.engine_memory import (
    Sampler,
    kv_bytes_per_token,
    memory_of,
    resident,
    snapshot_of,
)
from xllm_plugin.channel.messages import EngineIdentity, EngineLoad, Reading, Readings, Snapshot
from xllm_plugin.errors import ModelError, NotNowError
from xllm_plugin.testing.fake_memory import memory_section
from xllm_plugin.xtensor.messages import MEMORY_SECTION


def snapshot(**sections: Any) -> Snapshot:
    engine = EngineIdentity(instance_id="i", model="m", platform="xllm", device="cpu", pid=7)
    return Snapshot(
        sequence=1,
        monotonic_s=0.0,
        wall_time_s=0.0,
        engine=engine,
        load=EngineLoad(num_running=2),
        sections=sections,
    )


def client(*readings: Reading) -> httpx.Client:
    body = msgspec.json.encode(Readings(engines=readings))
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    return httpx.Client(base_url="http://server", transport=transport)


def test_the_kernel_counts_shared_memory_apart(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text(
        "Name:\tengine: 1\nVmRSS:\t    2048 kB\nRssAnon:\t 1536 kB\nRssShmem:\t     512 kB\n"
    )
    found = resident(7, tmp_path)
    assert (found.all_bytes, found.shared_bytes) == (2 * 2**20, 2**19)
    assert resident(os.getpid()).all_bytes > 2**20
    (tmp_path / "7" / "status").write_text("Name:\tengine\nState:\tZ (zombie)\n")
    for pid in (7, 8):
        with pytest.raises(NotNowError, match=f"process {pid} has ended"):
            resident(pid, tmp_path)


def test_an_engine_s_memory_travels_as_json() -> None:
    section = memory_section()
    found = snapshot_of(client(Reading(dp_rank=0, snapshot=snapshot(**{MEMORY_SECTION: section}))))
    assert found.load.num_running == 2
    assert memory_of(found) == section


@pytest.mark.parametrize(
    ("readings", "message"),
    [((), "one engine"), ((Reading(dp_rank=0, error="too old"),), "too old")],
)
def test_a_server_without_a_snapshot_is_told_of(
    readings: tuple[Reading, ...], message: str
) -> None:
    with pytest.raises(NotNowError, match=message):
        snapshot_of(client(*readings))


def test_a_fixed_cache_tells_nothing() -> None:
    with pytest.raises(NotNowError, match="not elastic"):
        memory_of(snapshot())


def test_a_token_s_keys_and_values(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 576}))
    assert kv_bytes_per_token(tmp_path) == 2 * 2 * 30 * 3 * 64
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    assert kv_bytes_per_token(tmp_path) == 2 * 2 * 30 * 3 * 32
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="num_key_value_heads"):
        kv_bytes_per_token(tmp_path)


def test_samples_are_taken_from_the_beginning_to_the_end() -> None:
    several = threading.Event()
    taken = []

    def take() -> int:
        taken.append(len(taken))
        if len(taken) > 3:
            several.set()
        return taken[-1]

    with Sampler(take, every_s=0.0) as sampler:
        assert sampler.samples[0] == 0
        assert several.wait(60)
    assert sampler.samples == taken


def test_what_a_sample_raises_the_block_raises() -> None:
    failed = threading.Event()

    def take() -> None:
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise NotNowError("the engine is gone")

    with pytest.raises(NotNowError, match="gone"), Sampler(take, every_s=0.0):
        assert failed.wait(60)
