"""Real engine channels behind a FastAPI app that is wired as vLLM wires its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="vLLM's API server brings FastAPI")

from xllm_plugin.channel import ChannelConfig, EngineChannel, EngineIdentity, EngineLoad
from xllm_plugin.testing.fake_memory import memory_section
from xllm_plugin.xtensor.messages import (
    MemoryReport,
    MemorySection,
    PoolMemberReport,
    PoolSection,
)

LOAD = EngineLoad(
    num_running=3,
    num_waiting=2,
    num_blocks_total=100,
    num_blocks_free=25,
    num_scheduled_tokens=64,
    num_steps=10,
    last_step_ms=20.0,
    smoothed_step_ms=15.0,
    num_generated_tokens=1234,
    num_preemptions=1,
)


MEMORY = memory_section(
    pages=MemoryReport(
        page_bytes=100,
        num_free=1,
        num_allocated=2,
        num_mapped=50,
        num_retired=3,
        num_reusable=4,
        num_created=70,
        num_released=10,
        num_maps=90,
        num_unmaps=20,
        num_reused=30,
        num_premapped=5,
        commit_s=0.25,
        release_s=0.5,
        num_commits=6,
        num_releases=7,
        num_premap_failures=2,
        num_map_calls=8,
        num_unmap_calls=4,
        map_s=0.125,
        unmap_s=1.5,
    ),
    pool=PoolSection(
        name="gpu",
        total_bytes=20_000,
        leased_bytes=8000,
        min_bytes=3000,
        max_bytes=10_000,
        members=(
            PoolMemberReport(
                name="this",
                pid=1,
                leased_bytes=8000,
                unmet_bytes=0,
                min_bytes=3000,
                max_bytes=10_000,
            ),
            PoolMemberReport(
                name="other",
                pid=2,
                leased_bytes=11_000,
                unmet_bytes=2500,
                min_bytes=1000,
                max_bytes=20_000,
            ),
        ),
    ),
)


@pytest.fixture
def memory() -> MemorySection:
    """What an engine with an elastic KV cache says of it."""
    return MEMORY


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def start_engine(directory: Path) -> Iterator[Callable[[int], EngineChannel]]:
    """Starts the engine of one data-parallel rank; closes them all."""
    channels: list[EngineChannel] = []

    def start(dp_rank: int = 0) -> EngineChannel:
        identity = EngineIdentity(
            instance_id="abcde",
            model="tiny",
            platform="xllm",
            device="cpu",
            pid=os.getpid(),
            dp_rank=dp_rank,
        )
        channels.append(EngineChannel(ChannelConfig(directory=directory), identity, lambda: LOAD))
        channels[-1].start()
        return channels[-1]

    yield start
    for channel in channels:
        channel.close()


@pytest.fixture
def vllm_config(directory: Path) -> Any:
    """The fields of vLLM's VllmConfig that the instance side reads."""
    return SimpleNamespace(
        instance_id="abcde",
        additional_config={"xllm": {"channel": {"directory": str(directory)}}},
        parallel_config=SimpleNamespace(
            data_parallel_index=0,
            data_parallel_size=2,
            data_parallel_size_local=1,
            local_engines_only=False,
            _api_process_count=1,
        ),
        model_config=SimpleNamespace(served_model_name="tiny"),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048, max_num_seqs=64),
        cache_config=SimpleNamespace(block_size=16),
        device_config=SimpleNamespace(device_type="cpu"),
    )
