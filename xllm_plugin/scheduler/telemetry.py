"""What the scheduler tells the outside: counts kept each step, a snapshot when one is due."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from xllm_plugin import __version__
from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.channel.engine import EngineChannel, ExponentialMean
from xllm_plugin.channel.messages import EngineIdentity, EngineLoad
from xllm_plugin.channel.paths import usable
from xllm_plugin.config import load_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

    from xllm_plugin.worker.messages import StepStamp

__all__ = ["Telemetry"]


class Telemetry:
    """Counts what vLLM does not keep and owns the engine's end of the channel.

    Args:
        scheduler: vLLM's.
        on_queued: wakes an idle engine for a call that waits for its thread.
    """

    def __init__(self, scheduler: Scheduler, on_queued: Callable[[], None] | None = None) -> None:
        self._scheduler = scheduler
        self.num_preemptions = 0
        self._num_steps = 0
        self._was_idle = True
        self._num_generated_tokens = 0
        self._num_scheduled_tokens = 0
        self._last_step_ms = 0.0
        self._step_ms = ExponentialMean()
        vllm_config = scheduler.vllm_config
        channel = usable(load_config(vllm_config.additional_config).channel)
        self._channel = EngineChannel(
            channel, _identity(vllm_config, channel), self._load_now, on_queued=on_queued
        )

    @property
    def channel(self) -> EngineChannel:
        """Where parts of the scheduler add their sections and calls, before `start`."""
        return self._channel

    def start(self) -> None:
        """Publish the first snapshot; the socket is open when this returns."""
        self._channel.start()

    def count_step(self) -> int:
        """Count a step that is about to run; return its number, from 1."""
        self._num_steps += 1
        return self._num_steps

    def drain_calls(self) -> None:
        """Execute control calls that were queued for the engine's thread."""
        self._channel.drain_calls()

    def record_step(
        self, scheduler_output: SchedulerOutput, outputs: Any, stamp: StepStamp | None
    ) -> None:
        """Count a finished step and publish if due.

        Args:
            scheduler_output: what was scheduled.
            outputs: what `Scheduler.update_from_output` returned.
            stamp: the worker's own measurement, if it was our worker.
        """
        if scheduler_output.total_num_scheduled_tokens:
            self._num_scheduled_tokens = scheduler_output.total_num_scheduled_tokens
            self._num_generated_tokens += _count_tokens(outputs)
        if stamp is not None and stamp.step:
            self._last_step_ms = stamp.duration_ms
            self._step_ms.add(stamp.duration_ms)
        self.record_change()

    def record_change(self) -> None:
        """Publish if due, and at once when requests have come to an idle engine or left it so.

        Called wherever requests come and go outside the end of a step: the first prefill of a
        long prompt takes seconds, in which the engine must not look idle.
        """
        is_idle = self._is_idle()
        self._channel.publish_if_due(force=is_idle != self._was_idle)
        self._was_idle = is_idle

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._channel.close()

    def _is_idle(self) -> bool:
        return not any(self._scheduler.get_request_counts())

    def _load_now(self) -> EngineLoad:
        num_running, num_waiting = self._scheduler.get_request_counts()
        pool = self._scheduler.kv_cache_manager.block_pool
        return EngineLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            # Block 0 is vLLM's null block and never holds tokens.
            num_blocks_total=max(pool.num_gpu_blocks - 1, 0),
            num_blocks_free=pool.get_num_free_blocks(),
            num_scheduled_tokens=self._num_scheduled_tokens,
            num_steps=self._num_steps,
            last_step_ms=self._last_step_ms,
            smoothed_step_ms=self._step_ms.value,
            num_generated_tokens=self._num_generated_tokens,
            num_preemptions=self.num_preemptions,
        )


def _identity(vllm_config: VllmConfig, channel: ChannelConfig) -> EngineIdentity:
    model = vllm_config.model_config
    name = model.served_model_name or model.model
    return EngineIdentity(
        instance_id=channel.resolve_instance_id(vllm_config.instance_id),
        model=name if isinstance(name, str) else name[0],
        platform="xllm",
        device=vllm_config.device_config.device_type,
        pid=os.getpid(),
        dp_rank=vllm_config.parallel_config.data_parallel_index,
        version=__version__,
    )


def _count_tokens(outputs: dict[int, Any]) -> int:
    return sum(
        len(output.new_token_ids) for client in outputs.values() for output in client.outputs
    )
