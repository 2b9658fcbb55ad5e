"""What a server's engines lead to expect: the time to first token, given what waits before.

It is computed in the API server from what the engine has learned and published, and is as good as
these figures: prefixes in the cache are not known here, nor for how long a full KV cache lets
nothing in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from xllm_plugin.channel.messages import Reading, Snapshot
from xllm_plugin.scheduler.predictor import StepModel, StepShape

__all__ = ["EngineLimits", "Forecast", "forecast_of"]


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Settings of the engine that bound a step.

    Attributes:
        max_tokens: of one step, vLLM's ``max_num_batched_tokens``.
        block_size: tokens in a block of the KV cache.
        step_ms: what a step may take while others decode; None if nothing keeps it short.
    """

    max_tokens: int
    block_size: int
    step_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the least busy engine of a server would do with a request that comes now.

    Attributes:
        model: predicts steps.
        decodes: a step with the requests that run now, and no prompt.
        chunk_tokens: of prompts that go into one step beside them.
        wait_ms: until the step that runs now ends.
        num_engines: that share what waits.
    """

    model: StepModel
    decodes: StepShape
    chunk_tokens: int
    wait_ms: float = 0.0
    num_engines: int = 1

    def ttft_ms(self, num_tokens: int, ahead_tokens: int = 0) -> float:
        """The expected time to first token of a prompt.

        Args:
            num_tokens: of the prompt.
            ahead_tokens: of prompts that are served before it, on all engines together.
        """
        tokens = num_tokens + ahead_tokens / self.num_engines
        steps, rest = divmod(tokens, self.chunk_tokens)
        mean_context = num_tokens // 2
        full_ms = self.model.predict_ms(self._step(self.chunk_tokens, mean_context))
        rest_ms = self.model.predict_ms(self._step(math.ceil(rest), mean_context)) if rest else 0.0
        return self.wait_ms + steps * full_ms + rest_ms

    def alone_ms(self, num_tokens: int) -> float:
        """The expected time to first token on an engine that has nothing else to do."""
        idle = Forecast(self.model, StepShape(), max(self.chunk_tokens, num_tokens))
        return idle.ttft_ms(num_tokens)

    def _step(self, tokens: int, mean_context: int) -> StepShape:
        decodes = self.decodes
        return StepShape(
            decodes.num_sequences + 1,
            decodes.num_tokens + tokens,
            decodes.context_tokens,
            tokens,
            tokens * mean_context,
        )


def forecast_of(readings: Iterable[Reading], section: str, limits: EngineLimits) -> Forecast | None:
    """The forecast that the engines' latest snapshots allow.

    Args:
        readings: one an engine.
        section: of the snapshot, which holds the `StepModel`.
        limits: of each of these engines.

    Returns:
        None when no engine that answers has a step model that can be relied on.

    Raises:
        ChannelError: the section is there but of another version.
    """
    snapshots = [reading.snapshot for reading in readings if reading.snapshot]
    known = [
        (snapshot, model)
        for snapshot in snapshots
        if (model := snapshot.section(section, StepModel)) and model.is_reliable
    ]
    if not known:
        return None
    snapshot, model = min(known, key=lambda entry: _num_requests(entry[0]))
    load = snapshot.load
    context_tokens = (load.num_blocks_total - load.num_blocks_free) * limits.block_size
    decodes = StepShape(load.num_running, load.num_running, context_tokens)
    return Forecast(
        model=model,
        decodes=decodes,
        chunk_tokens=_chunk_tokens(model, decodes, limits),
        # The step that runs now is on average half done.
        wait_ms=0.0 if load.is_idle else load.smoothed_step_ms / 2,
        num_engines=len(snapshots),
    )


def _num_requests(snapshot: Snapshot) -> int:
    return snapshot.load.num_running + snapshot.load.num_waiting


def _chunk_tokens(model: StepModel, decodes: StepShape, limits: EngineLimits) -> int:
    most = max(1, limits.max_tokens - decodes.num_tokens)
    if limits.step_ms is None or not decodes.num_sequences:
        return most
    return max(1, model.prefill_tokens_within(decodes, limits.step_ms, most))
