"""A device that is busy, or has too little memory: one message each, before anything slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_plugin.errors import NotNowError, PlatformError
from xllm_plugin.npu import availability
from xllm_plugin.npu.availability import Demand, DeviceMemory, answer, ask, check_memory
from xllm_plugin.testing.cann import Emulator

GIB = 2**30


def demand(
    weights: float, kv_cache: float, working: float = 0, num_tokens: int | None = 4096
) -> Demand:
    return Demand(
        int(weights * GIB),
        int(kv_cache * GIB),
        int(working * GIB),
        num_tokens,
        step_tokens=2048,
        step_requests=256,
        utilization=0.5,
    )


def memory(free: float, total: float) -> DeviceMemory:
    return DeviceMemory(int(free * GIB), int(total * GIB))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Each test asks anew."""
    yield
    answer.cache_clear()


def test_what_fits_exactly_is_accepted() -> None:
    check_memory(0, memory(32, 64), demand(20, 11, 1))


def test_memory_of_other_processes_is_a_matter_of_the_moment() -> None:
    with pytest.raises(
        NotNowError,
        match=r"device 3 has 19\.90 of its 64\.00 GiB free, and --gpu-memory-utilization 0\.5 asks "
        r"for 32\.00: other processes hold the rest.*npu-smi info.*--gpu-memory-utilization 0\.31",
    ):
        check_memory(3, memory(19.9, 64), demand(1, 1))


def test_a_model_that_is_too_large_is_told_what_it_needs() -> None:
    with pytest.raises(
        PlatformError,
        match=r"device 0 gives 32\.00 of its 64\.00 GiB .* needs at least 32\.50: 20\.00 for "
        r"weights in bfloat16, 11\.75 for the KV cache of one request of 4096 tokens, 0\.75 to "
        r"compute steps of 2048 tokens and 256 requests\. Give a smaller --max-model-len, "
        "--max-num-batched-tokens or --max-num-seqs",
    ):
        check_memory(0, memory(64, 64), demand(20, 11.75, 0.75))


def test_a_cache_asked_for_in_bytes_may_take_all_that_is_free() -> None:
    check_memory(0, memory(60, 64), demand(20, 39, 1, num_tokens=None))
    with pytest.raises(PlatformError, match=r"gives 60\.00 .*smaller --kv-cache-memory-bytes"):
        check_memory(0, memory(60, 64), demand(20, 39, 1.5, num_tokens=None))


@pytest.fixture
def surroundings(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A child of this process finds the emulated CANN."""
    for name, value in emulator.environment(operators=False).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return monkeypatch


@pytest.mark.npu
def test_a_device_tells_its_memory_to_a_child(surroundings: pytest.MonkeyPatch) -> None:
    surroundings.setenv("XLLM_CANN_MEMORY_BYTES", str(3 * GIB))
    surroundings.setenv("XLLM_CANN_USED_BYTES", str(GIB))
    assert ask(0) == DeviceMemory(2 * GIB, 3 * GIB)


@pytest.mark.npu
def test_others_may_hold_more_than_there_is(surroundings: pytest.MonkeyPatch) -> None:
    surroundings.setenv("XLLM_CANN_MEMORY_BYTES", str(GIB))
    surroundings.setenv("XLLM_CANN_USED_BYTES", str(2 * GIB))
    assert ask(0) == DeviceMemory(0, GIB)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("XLLM_CANN_BUSY", "1", "error 507033: device 0 is set up by another process"),
        ("XLLM_CANN_DEVICES", "0", "error 107001: device 0 of 0"),
        ("LD_LIBRARY_PATH", "", "CANN's runtime cannot be loaded"),
    ],
)
def test_a_device_that_cannot_be_taken(
    surroundings: pytest.MonkeyPatch, name: str, value: str, found: str
) -> None:
    surroundings.setenv(name, value)
    with pytest.raises(NotNowError, match=f"device 0 cannot be taken: .*{found}.*npu-smi info"):
        ask(0)


@pytest.mark.parametrize(
    ("does", "found"),
    [
        ("kill -SEGV $$", r"the driver ended the process \(-11\)"),
        ("exec sleep 60", "no answer within"),
    ],
)
def test_a_driver_that_crashes_or_hangs_takes_nobody_with_it(
    does: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    driver, asked = tmp_path / "python", tmp_path / "asked"
    driver.write_text(f"#!/bin/sh\necho >> {asked}\n{does}\n")
    driver.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(driver))
    monkeypatch.setattr(availability, "PATIENCE_S", 0.2)
    for _ in range(2):  # vLLM asks as well, and ignores the answer
        with pytest.raises(NotNowError, match=found):
            ask(0)
    assert asked.read_text() == "\n", "it is not waited for twice"
