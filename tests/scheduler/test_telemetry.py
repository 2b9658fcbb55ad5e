"""What an engine tells the outside, over a real socket, of a scheduler that tests set by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin.channel import ChannelClient, Snapshot
from xllm_plugin.errors import ChannelError, ConfigError
from xllm_plugin.scheduler.telemetry import Telemetry
from xllm_plugin.worker.messages import StepStamp


class Scheduler:
    """As much of vLLM's scheduler as telemetry reads."""

    def __init__(self, directory: Path, **channel: Any) -> None:
        self.counts = (0, 0)
        self.free = 99
        pool = SimpleNamespace(num_gpu_blocks=100, get_num_free_blocks=lambda: self.free)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        settings = {"directory": str(directory), "snapshot_interval_ms": 0, **channel}
        self.vllm_config = SimpleNamespace(
            additional_config={"xllm": {"channel": settings}},
            instance_id="vllm-id",
            model_config=SimpleNamespace(served_model_name="tiny", model="/models/tiny"),
            device_config=SimpleNamespace(device_type="cpu"),
            parallel_config=SimpleNamespace(data_parallel_index=3),
        )

    def get_request_counts(self) -> tuple[int, int]:
        return self.counts


def opened(scheduler: Any) -> Telemetry:
    telemetry = Telemetry(scheduler)
    telemetry.start()
    return telemetry


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "s"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def scheduler(directory: Path) -> Scheduler:
    return Scheduler(directory)


@pytest.fixture
def telemetry(scheduler: Any) -> Iterator[Telemetry]:
    telemetry = opened(scheduler)
    yield telemetry
    telemetry.close()


def look(directory: Path, instance_id: str = "vllm-id") -> Snapshot:
    with ChannelClient(directory / f"{instance_id}.dp3.sock", 30) as client:
        return client.snapshot()


def outputs(*token_counts: int) -> dict[int, Any]:
    """What `update_from_output` returns: one client's requests with new tokens each."""
    requests = [SimpleNamespace(new_token_ids=[7] * count) for count in token_counts]
    return {0: SimpleNamespace(outputs=requests), 1: SimpleNamespace(outputs=[])}


def scheduled(num_tokens: int) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=num_tokens)


def test_an_engine_says_who_it_is_as_soon_as_it_is_open(
    telemetry: Telemetry, directory: Path
) -> None:
    snapshot = look(directory)
    engine = snapshot.engine
    assert (engine.instance_id, engine.dp_rank, engine.pid) == ("vllm-id", 3, os.getpid())
    assert (engine.model, engine.platform, engine.device) == ("tiny", "xllm", "cpu")
    assert (snapshot.load.num_blocks_total, snapshot.load.num_blocks_free) == (99, 99)
    assert snapshot.load.num_steps == 0


@pytest.mark.parametrize(
    ("served", "name"), [(None, "/models/tiny"), (["first", "second"], "first"), ("one", "one")]
)
def test_the_model_s_name(scheduler: Any, directory: Path, served: Any, name: str) -> None:
    scheduler.vllm_config.model_config.served_model_name = served
    telemetry = opened(scheduler)
    try:
        assert look(directory).engine.model == name
    finally:
        telemetry.close()


def test_steps_are_counted_as_they_finish(
    telemetry: Telemetry, scheduler: Any, directory: Path
) -> None:
    scheduler.counts, scheduler.free = (2, 1), 40
    telemetry.num_preemptions += 1
    assert [telemetry.count_step(), telemetry.count_step()] == [1, 2]
    telemetry.record_step(scheduled(12), outputs(1, 3), StepStamp(step=1, duration_ms=10.0))
    telemetry.record_step(scheduled(2), outputs(1, 1), StepStamp(step=2, duration_ms=20.0))
    load = look(directory).load
    assert (load.num_running, load.num_waiting, load.num_blocks_free) == (2, 1, 40)
    assert (load.num_steps, load.num_scheduled_tokens, load.num_generated_tokens) == (2, 2, 6)
    assert load.num_preemptions == 1
    assert load.last_step_ms == 20.0
    assert load.smoothed_step_ms == pytest.approx(11.0)


def test_a_step_with_nothing_scheduled_is_no_step(telemetry: Telemetry, directory: Path) -> None:
    telemetry.record_step(scheduled(0), {}, None)
    assert look(directory).load.num_steps == 0


def test_a_worker_that_is_not_ours_measures_nothing(telemetry: Telemetry, directory: Path) -> None:
    assert telemetry.count_step() == 1
    telemetry.record_step(scheduled(5), outputs(1), None)
    load = look(directory).load
    assert (load.num_steps, load.last_step_ms, load.smoothed_step_ms) == (1, 0.0, 0.0)


def test_an_engine_that_falls_idle_says_so_before_the_interval_has_passed(directory: Path) -> None:
    scheduler: Any = Scheduler(directory, snapshot_interval_ms=1e9)
    telemetry = opened(scheduler)
    try:
        scheduler.counts = (0, 1)
        telemetry.record_change()
        assert look(directory).load.num_waiting == 1, "work has come, before any step has ended"
        scheduler.counts = (1, 0)
        telemetry.record_step(scheduled(5), outputs(1), None)
        assert look(directory).load.num_waiting == 1, "not due"
        scheduler.counts = (0, 0)
        telemetry.record_step(scheduled(1), outputs(1), None)
        assert look(directory).load.num_generated_tokens == 2
        assert look(directory).load.is_idle
        telemetry.record_change()
        assert look(directory).sequence == 3, "nothing new to say"
    finally:
        telemetry.close()


def test_closing_removes_the_socket_and_can_be_repeated(
    telemetry: Telemetry, directory: Path
) -> None:
    telemetry.close()
    telemetry.close()
    assert list(directory.glob("*.sock")) == []
    with pytest.raises(ChannelError):
        look(directory)


def test_a_channel_that_is_off_costs_nothing_and_breaks_nothing(directory: Path) -> None:
    scheduler: Any = Scheduler(directory, enabled=False)
    telemetry = opened(scheduler)
    telemetry.drain_calls()
    telemetry.record_step(scheduled(5), outputs(1), None)
    telemetry.record_change()
    telemetry.close()
    assert list(directory.iterdir()) == []


def test_a_fixed_instance_id_names_the_socket(directory: Path) -> None:
    scheduler: Any = Scheduler(directory, instance_id="fixed")
    telemetry = opened(scheduler)
    try:
        assert look(directory, "fixed").engine.instance_id == "fixed"
    finally:
        telemetry.close()


def test_settings_that_do_not_fit_stop_the_engine(directory: Path) -> None:
    scheduler: Any = Scheduler(directory, bogus=1)
    with pytest.raises(ConfigError, match=r"unknown setting 'channel\.bogus'"):
        opened(scheduler)
