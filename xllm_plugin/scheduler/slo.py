"""The policy `slo` around vLLM's scheduler: what it sees, how a plan is put into force.

vLLM's `schedule` is not copied.  A plan is put into force by what it reads at each call, and taken
back after it (seam "scheduler-plan"):

* a held request is taken out of `running` for the call, and put back with its KV blocks; so is one
  whose LoRA adapter the step has no room for, which is found here and not by the plan;
* the order of `running` decides who is served first, and who gives up blocks: the last;
* waiting requests to admit are put first in `waiting`, and `max_num_active_reqs` says how many;
* `max_num_scheduled_tokens` and `long_prefill_token_threshold` bound the step and its chunks.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import msgspec
from vllm.v1.core.sched.interface import PauseState

from xllm_plugin.errors import ConfigError, PromiseError
from xllm_plugin.scheduler.adapters import NO_ADAPTER, Urgency, adapters_to_run
from xllm_plugin.scheduler.config import SchedulerConfig
from xllm_plugin.scheduler.plan import (
    LOST_SLOWDOWN,
    Bound,
    Limits,
    Plan,
    Running,
    View,
    blocks_lacking,
    make_plan,
    num_blocks,
)
from xllm_plugin.scheduler.predictor import StepModel, StepShape, StepTimeLearner
from xllm_plugin.scheduler.prior import prior_work
from xllm_plugin.scheduler.promise import Promise, read_promise
from xllm_plugin.scheduler.report import Listed, SchedulerReport, StepReport, class_report
from xllm_plugin.scheduler.slo_metrics import SloMetrics, SloSnapshot
from xllm_plugin.scheduler.step_limit import max_step_ms
from xllm_plugin.scheduler.trace import StepTrace, TracedStep
from xllm_plugin.scheduler.waiting_queue import Waiting, WaitingQueue
from xllm_plugin.worker.resumed import resumed_tokens

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    from xllm_plugin.worker.messages import StepMessage, StepStamp

__all__ = ["SloPolicy"]

logger = logging.getLogger(__name__)

RECENT_REQUESTS: Final = 32
"""Their TTFTs say how long a step may take."""
LOADED_CHUNK_TOKENS: Final = 256
"""For requests whose KV a connector has loaded; plans do not see them."""
MAX_EMPTY_STEPS: Final = 3


@dataclass(slots=True)
class Tracked:
    """What the policy keeps of one request.

    Attributes:
        promise: made to it.
        arrival_s: on the policy's clock.
        cached_tokens: of its prompt, when it came.
        first_token_s: when its first token had come.
        num_given: output tokens that it came with (`resumed.py`).
        num_tokens: output tokens that it has, these included.
        last_token_s: when the last of them came.
    """

    promise: Promise
    arrival_s: float
    cached_tokens: int
    first_token_s: float | None = None
    num_given: int = 0
    num_tokens: int = 0
    last_token_s: float = -math.inf

    @property
    def is_lost(self) -> bool:
        """Whether its promise is broken: its first token came too late."""
        if self.first_token_s is None:
            return False
        return (self.first_token_s - self.arrival_s) * 1e3 > self.promise.ttft_ms

    def deadline_s(self, num_tokens: int, now_s: float) -> float:
        """When the token after `num_tokens` is due; some of those may still be in flight."""
        num_tokens -= self.num_given
        if not num_tokens:
            return self.arrival_s + self.promise.ttft_ms / 1e3
        first_s = now_s if self.first_token_s is None else self.first_token_s
        return first_s + num_tokens * self.promise.tpot_ms / 1e3


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A step under way.

    Attributes:
        shape: what it is made of.
        predicted_ms: how long it is to take.
        began_s: when it was planned.
        plan: that it was scheduled under; None if vLLM was left alone.
        num_waiting: requests in the queue then.
    """

    shape: StepShape
    predicted_ms: float
    began_s: float
    plan: Plan | None
    num_waiting: int

    @property
    def bound(self) -> str:
        """What kept it from being larger; empty if it was not planned."""
        return "" if self.plan is None else self.plan.bound.value


class SloPolicy:
    """Plans each step of one scheduler, learns from it, and counts.

    Args:
        scheduler: vLLM's, constructed.
        config: our settings.
        clock: monotonic seconds.
        wall_clock: seconds since 1970, the clock of `Request.arrival_time`.

    Raises:
        ConfigError: the model needs what this policy cannot give; the message says what.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        config: SchedulerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if scheduler.need_mamba_block_aligned_split:
            raise ConfigError(
                "scheduler.policy=slo does not go with --mamba-cache-mode align: its chunks end at "
                "blocks, not where a deadline needs. Use policy=fcfs, or another cache mode."
            )
        self._scheduler = scheduler
        self._defaults = config.default_promise
        self._clock, self._wall_clock = clock, wall_clock
        self._recent_ttft_ms = deque[float](maxlen=RECENT_REQUESTS)
        self._limits = Limits(
            max_sequences=scheduler.max_num_active_reqs,
            max_tokens=scheduler.max_num_scheduled_tokens,
            max_step_ms=self._step_limit_ms(),
            target=config.target,
            max_wait_s=config.max_wait_s,
        )
        self._learner = StepTimeLearner(prior_work(scheduler.vllm_config))
        self._is_base_apart = scheduler.vllm_config.device_config.device_type == "cpu"
        self._metrics = SloMetrics()
        self._requests: dict[str, Tracked] = {}
        self._queue = WaitingQueue()
        self._queued: list[Request] = []  # what vLLM had in its queue when ours was made
        self._steps: dict[int, OpenStep] = {}
        self._plan: Plan | None = None
        self._trace = None
        if config.step_trace is not None:
            rank = scheduler.vllm_config.parallel_config.data_parallel_index
            self._trace = StepTrace(config.step_trace, rank)
        self._last_step = StepReport()
        self._began_s = 0.0
        self._ended_s = 0.0
        self._is_next_due = False
        self._admitted_since_overdue = 0
        self._num_empty_steps = 0

    # Requests.

    def add(self, request: Request) -> None:
        """Remember a new request and what it was promised."""
        waited_s = max(0.0, self._wall_clock() - request.arrival_time)
        arrival_s = self._clock() - waited_s
        tracked = self._requests.get(request.request_id)
        if tracked is not None:  # the next turn of a streaming session
            tracked.arrival_s = arrival_s
            self._renew(request.request_id)
            return
        promise = self._promise_of(request)
        if promise.is_online:
            self._limit_steps(promise.ttft_ms)
        num_given = len(resumed_tokens(request.sampling_params))
        self._requests[request.request_id] = Tracked(
            promise,
            arrival_s,
            self._cached_tokens(request),
            num_given=num_given,
            num_tokens=num_given,
        )

    def interrupt(self) -> None:
        """The engine is paused, or goes on: what begins next has not waited for the step before."""
        self._is_next_due = False

    def forget(self, requests: Iterable[Request]) -> None:
        """Requests that were aborted."""
        for request in requests:
            self._requests.pop(request.request_id, None)

    def _limit_steps(self, ttft_ms: float) -> None:
        """Keep steps short enough for requests like those that came of late."""
        self._recent_ttft_ms.append(ttft_ms)
        limit_ms = self._step_limit_ms()
        if limit_ms != self._limits.max_step_ms:
            self._limits = msgspec.structs.replace(self._limits, max_step_ms=limit_ms)

    def _step_limit_ms(self) -> float:
        runs_ahead = self._scheduler.scheduler_config.async_scheduling
        return max_step_ms(self._defaults.ttft_ms, self._recent_ttft_ms, runs_ahead=runs_ahead)

    def _promise_of(self, request: Request) -> Promise:
        defaults = replace(self._defaults, priority=request.priority)
        params = request.sampling_params
        try:
            return read_promise(params.extra_args if params else None, defaults)
        except PromiseError as error:
            # The API server refuses it; who comes past that must not end the engine.
            self._metrics.num_invalid += 1
            logger.warning("request %s gets the default promise: %s", request.request_id, error)
            return defaults

    def _cached_tokens(self, request: Request) -> int:
        if not self._scheduler.cache_config.enable_prefix_caching:
            return 0
        _, num_tokens, _ = self._scheduler.kv_cache_manager.get_computed_blocks(request)
        return int(num_tokens)

    # A step.

    @contextlib.contextmanager
    def planned(self) -> Iterator[None]:
        """Plan, and keep the plan in force while vLLM schedules."""
        began_s = self._began_s = self._clock()
        if self._may_not_plan():
            self._plan = None
            with self._unplanned():
                yield
            return
        view = self._view(self._begins_s(began_s))
        plan = make_plan(view, self._learner.model, self._limits_beside(view))
        plan = self._plan = self._with_room_for_adapters(plan, view)
        held = self._take_out(plan)
        classes = Counter(self._requests[r.request_id].promise.service_class.value for r in held)
        self._metrics.record_plan(plan, classes, (self._clock() - began_s) * 1e3)
        num_running = len(self._scheduler.running)
        try:
            with self._limited(plan, len(held)):
                yield
        finally:
            self._count_admissions(plan, len(self._scheduler.running) - num_running)
            self._scheduler.running += held

    def _may_not_plan(self) -> bool:
        """Whether vLLM is paused, or nothing has run lately and it has to find its own way out."""
        if self._num_empty_steps >= MAX_EMPTY_STEPS:
            self._num_empty_steps = 0
            return True
        return self._scheduler.pause_state != PauseState.UNPAUSED

    @contextlib.contextmanager
    def _unplanned(self) -> Iterator[None]:
        """Leave vLLM alone, but for adapters that one step has no room for.

        Where requests without an adapter run apart, one at most joins, and only if nobody runs.
        If blocks are short, vLLM takes them from those that run, not from those held here.
        """
        scheduler = self._scheduler
        if scheduler.lora_config is None:
            yield
            return
        running, most = scheduler.running, scheduler.max_num_active_reqs
        arrival_s = {r.request_id: self._requests[r.request_id].arrival_s for r in running}
        claims = [(_adapter_of(r), (False, arrival_s[r.request_id])) for r in running]
        chosen = self._adapters_to_run(claims)
        held = [r for r in running if _adapter_of(r) not in chosen]
        scheduler.running = [r for r in running if _adapter_of(r) in chosen]
        scheduler.max_num_active_reqs = most - len(held)
        if self._is_base_apart:
            num_there = len(scheduler.running) + scheduler.num_waiting_for_streaming_input
            num_places = num_there + (not scheduler.running)
            scheduler.max_num_active_reqs = min(scheduler.max_num_active_reqs, num_places)
        try:
            yield
        finally:
            scheduler.running += held
            scheduler.max_num_active_reqs = most

    def _adapters_to_run(self, claims: Iterable[tuple[int, Urgency]]) -> frozenset[int]:
        return adapters_to_run(
            claims, self._scheduler.lora_config.max_loras, is_base_apart=self._is_base_apart
        )

    def _with_room_for_adapters(self, plan: Plan, view: View) -> Plan:
        """The plan without requests whose adapters the step has no room for; they are held.

        Whose turn it is comes first; otherwise its turn would go by, and it never be served.  vLLM
        takes blocks only from those that run: if these lack some, the least urgent held give up
        theirs, or the most urgent would.
        """
        requests = self._scheduler.requests
        if self._scheduler.lora_config is None:
            return plan
        adapter = {i: _adapter_of(requests[i]) for i in (*plan.order, *plan.admit)}
        running = {r.request_id: r for r in view.running}

        def claim(made: Running | Waiting) -> tuple[int, Urgency]:
            name = made.request_id
            return adapter[name], (False, -math.inf) if name == plan.turn else _when_due(made)

        claims = [claim(running[i]) for i in plan.order]
        if not self._num_empty_steps:  # else those to admit had no room: they wait for the others
            claims += [claim(view.waiting[i]) for i in plan.admit]
        chosen = self._adapters_to_run(claims)
        held = [i for i in plan.order if adapter[i] not in chosen]
        turn = plan.turn if plan.turn is not None and adapter[plan.turn] in chosen else None
        order = [i for i in plan.order if adapter[i] in chosen]
        victims: list[str] = []
        if plan.bound is Bound.MEMORY and order:
            lacking = blocks_lacking(view, plan, [running[i] for i in order])
            victims = _giving_up(lacking, [running[i] for i in held], view.block_tokens)
        return msgspec.structs.replace(
            plan,
            order=tuple(order),
            hold=(*plan.hold, *(i for i in held if i not in victims)),
            preempt=(*plan.preempt, *victims),
            admit=tuple(i for i in plan.admit if adapter[i] in chosen),
            turn=turn,
        )

    def _begins_s(self, now_s: float) -> float:
        """When the step that is planned now is to begin: after those that are under way."""
        if not self._steps:
            return now_s
        steps = list(self._steps.values())
        began_s = max(steps[0].began_s, self._ended_s)
        return max(now_s, began_s + sum(step.predicted_ms for step in steps) / 1e3)

    def _view(self, now_s: float) -> View:
        scheduler = self._scheduler
        pool = scheduler.kv_cache_manager.block_pool
        # Each group of layers takes blocks of its own.
        num_groups = len(scheduler.kv_cache_config.kv_cache_groups)
        running = [
            self._as_running(request, now_s)
            for request in scheduler.running
            if not _ends_in_flight(request)
        ]
        return View(
            now_s=now_s,
            running=[view for view in running if view.todo_tokens > 0],
            waiting=self._queue_of(scheduler.waiting, now_s),
            free_blocks=pool.get_num_free_blocks(),
            total_blocks=pool.num_gpu_blocks,
            block_tokens=max(1, scheduler.block_size // max(1, num_groups)),
            admitted_since_overdue=self._admitted_since_overdue,
        )

    def _limits_beside(self, view: View) -> Limits:
        """The limits without the places of those that vLLM counts and a plan does not see."""
        scheduler = self._scheduler
        num_unseen = len(scheduler.running) - len(view.running)
        num_unseen += scheduler.num_waiting_for_streaming_input
        if not num_unseen:
            return self._limits
        most = self._limits.max_sequences - num_unseen
        return msgspec.structs.replace(self._limits, max_sequences=most)

    def _as_running(self, request: Request, now_s: float) -> Running:
        tracked = self._requests[request.request_id]
        promise = tracked.promise
        in_flight = request.num_output_placeholders
        computed = request.num_computed_tokens
        todo = request.num_tokens_with_spec + in_flight - computed
        return Running(
            request.request_id,
            promise.is_online,
            tracked.deadline_s(request.num_output_tokens + in_flight, now_s),
            promise.tpot_ms,
            tracked.arrival_s,
            promise.priority,
            computed,
            todo,
            todo > 1 + len(request.spec_token_ids),
            is_lost=tracked.is_lost,
            last_token_s=now_s if in_flight else tracked.last_token_s,
        )

    def _queue_of(self, waiting: Iterable[Request], now_s: float) -> WaitingQueue:
        """The queue as vLLM has it now; made from the last one, for few come and go in a step."""
        requests = list(waiting)
        if requests != self._queued:
            for request in set(self._queued).difference(requests):
                if request.request_id in self._queue:
                    self._queue.remove(request.request_id)
            for request in requests:
                if request.request_id not in self._queue:
                    self._queue.add(self._as_waiting(request, now_s))
            self._queued = requests
        return self._queue

    def _renew(self, request_id: str) -> None:
        """Let a request that waits be looked at again: what is known of it has changed."""
        if request_id in self._queue:
            self._queue.remove(request_id)
            self._queued = [r for r in self._queued if r.request_id != request_id]

    def _as_waiting(self, request: Request, now_s: float) -> Waiting:
        tracked = self._requests[request.request_id]
        promise = tracked.promise
        todo = self._todo_tokens(request)
        return Waiting(
            request.request_id,
            promise.is_online,
            tracked.deadline_s(request.num_output_tokens, now_s),
            promise.tpot_ms,
            tracked.arrival_s,
            promise.priority,
            todo,
            request.num_tokens - todo,
            tracked.is_lost,
        )

    def _todo_tokens(self, request: Request) -> int:
        return max(1, request.num_tokens - self._requests[request.request_id].cached_tokens)

    def _take_out(self, plan: Plan) -> list[Request]:
        """Put running and waiting requests into the plan's order; those held are returned."""
        scheduler, requests = self._scheduler, self._scheduler.requests
        stay = []
        for request_id in plan.preempt:
            request = requests[request_id]
            if not scheduler._request_blocks_can_be_freed(request):  # noqa: SLF001
                stay.append(request)  # a step that writes them is in flight
                continue
            scheduler.running.remove(request)
            scheduler._preempt_request(  # noqa: SLF001
                request,
                time.monotonic(),
                drop_stale_output=scheduler.requires_kv_delivery,
            )
            # It may come back in this very step; the runner must then take it for a new one.
            scheduler.prev_step_scheduled_req_ids.discard(request_id)
        offered = [requests[request_id] for request_id in plan.order]
        held = [*stay, *(requests[request_id] for request_id in plan.hold)]
        known = {request.request_id for request in (*offered, *held)}
        rest = [r for r in scheduler.running if r.request_id not in known]
        scheduler.running = [*offered, *rest]
        if plan.admit:
            admit = [requests[request_id] for request_id in plan.admit]
            scheduler.waiting.remove_requests(admit)
            for request in reversed(admit):
                scheduler.waiting.prepend_request(request)
        return held

    @contextlib.contextmanager
    def _limited(self, plan: Plan, num_held: int) -> Iterator[None]:
        scheduler, config = self._scheduler, self._scheduler.scheduler_config
        num_loaded = len(scheduler.kv_holding_waiting)
        tokens = plan.token_budget + LOADED_CHUNK_TOKENS * bool(num_loaded)
        tokens += self._rows_for_drafts(plan)
        chunk = max(plan.chunk_tokens, 1 + scheduler.num_spec_tokens) if plan.chunk_tokens else 0
        before = (
            scheduler.max_num_active_reqs,
            scheduler.max_num_scheduled_tokens,
            scheduler.adaptive_long_prefill_threshold,
            config.long_prefill_token_threshold,
        )
        scheduler.max_num_active_reqs = min(
            before[0] - num_held,
            len(scheduler.running)
            + scheduler.num_waiting_for_streaming_input
            + num_loaded
            + len(plan.admit),
        )
        scheduler.max_num_scheduled_tokens = min(before[1], tokens)
        scheduler.adaptive_long_prefill_threshold = False
        config.long_prefill_token_threshold = min(before[3] or chunk, chunk or before[3])
        try:
            yield
        finally:
            (
                scheduler.max_num_active_reqs,
                scheduler.max_num_scheduled_tokens,
                scheduler.adaptive_long_prefill_threshold,
                config.long_prefill_token_threshold,
            ) = before

    def _rows_for_drafts(self, plan: Plan) -> int:
        """vLLM gives a prompt with one token to compute rows for drafts, or lets it not join."""
        num_drafts = self._scheduler.num_spec_tokens
        if not num_drafts:
            return 0
        asked = [self._scheduler.requests[request_id] for request_id in plan.admit]
        return num_drafts * sum(self._todo_tokens(request) <= num_drafts for request in asked)

    def _count_admissions(self, plan: Plan, num_joined: int) -> None:
        if num_joined <= 0:
            return
        self._admitted_since_overdue += num_joined
        if plan.turn is not None:
            self._admitted_since_overdue = 0

    # After it.

    def record_scheduled(self, output: SchedulerOutput, step: int) -> None:
        """Remember what step number `step` is made of; 0 if nothing was scheduled."""
        if not step:
            self._num_empty_steps += self._scheduler.has_unfinished_requests()
            self._is_next_due = False
            return
        self._num_empty_steps = 0
        shape = self._shape_of(output.num_scheduled_tokens)
        if not output.scheduled_encoder_inputs:  # their time is in no term of the model
            predicted_ms = self._learner.model.predict_ms(shape)
            num_waiting = len(self._scheduler.waiting)
            self._steps[step] = OpenStep(
                shape, predicted_ms, self._began_s, self._plan, num_waiting
            )

    def _shape_of(self, scheduled: Mapping[str, int]) -> StepShape:
        """What a step is made of; tokens of offline requests are counted."""
        num_decode_tokens = 1 + self._scheduler.num_spec_tokens
        context_tokens = prefill_tokens = prefill_pairs = 0
        for request_id, num in scheduled.items():
            before = self._scheduler.requests[request_id].num_computed_tokens - num
            if num <= num_decode_tokens:
                context_tokens += before
            else:
                prefill_tokens += num
                prefill_pairs += num * before + num * (num + 1) // 2
            if not self._requests[request_id].promise.is_online:
                self._metrics.offline_tokens += num
        num_tokens = sum(scheduled.values())
        return StepShape(len(scheduled), num_tokens, context_tokens, prefill_tokens, prefill_pairs)

    def record_step(
        self, message: StepMessage | None, outputs: dict[int, Any], stamp: StepStamp | None
    ) -> None:
        """Learn from a finished step, and count its tokens.

        A step is as long as a request waits for it: to here from the end of the one before, or from
        its own planning if the engine had nothing to do meanwhile.  That is the worker's time and
        what surrounds it.
        """
        now_s = self._clock()
        step = self._steps.pop(message.step, None) if message is not None else None
        if message is not None and step is not None and stamp is not None:
            self._learn(message.step, step, stamp, now_s)
        self._ended_s = now_s
        self._is_next_due = bool(self._scheduler.running)
        for client in outputs.values():
            for output in client.outputs:
                self._record_output(output, now_s)

    def _learn(self, number: int, step: OpenStep, stamp: StepStamp, now_s: float) -> None:
        shape = step.shape
        gap_ms = max(0.0, step.began_s - self._ended_s) * 1e3 if self._is_next_due else 0.0
        elapsed_ms = (now_s - max(step.began_s, self._ended_s)) * 1e3 + gap_ms
        duration_ms = max(stamp.duration_ms, elapsed_ms)
        error = self._learner.model.error
        self._learner.observe(shape, duration_ms)
        self._metrics.predicted_ms += step.predicted_ms
        self._metrics.measured_ms += duration_ms
        self._last_step = StepReport(
            num_sequences=shape.num_sequences,
            decode_tokens=shape.num_tokens - shape.prefill_tokens,
            prefill_tokens=shape.prefill_tokens,
            context_tokens=shape.context_tokens,
            predicted_ms=step.predicted_ms,
            measured_ms=duration_ms,
            bound=step.bound,
        )
        if self._trace is not None:
            self._trace.write(
                TracedStep(
                    step=number,
                    rank=self._trace.rank,
                    began_s=step.began_s,
                    shape=shape,
                    predicted_ms=step.predicted_ms,
                    error=error,
                    measured_ms=duration_ms,
                    worker_ms=stamp.duration_ms,
                    gap_ms=gap_ms,
                    bound=step.bound,
                    num_running=len(step.plan.order) + len(step.plan.hold) if step.plan else 0,
                    num_held=len(step.plan.hold) if step.plan else 0,
                    num_waiting=step.num_waiting,
                    num_late=step.plan.num_late if step.plan else 0,
                )
            )

    def _record_output(self, output: Any, now_s: float) -> None:
        tracked = self._requests.get(output.request_id)
        if tracked is None:
            return
        num_new = len(output.new_token_ids)
        if num_new:
            self._renew(output.request_id)  # of a preempted request, from a step in flight
            if tracked.promise.is_online:
                due_s = tracked.deadline_s(tracked.num_tokens + num_new - 1, now_s)
                self._metrics.record_slack((due_s - now_s) * 1e3, num_new)
            tracked.num_tokens += num_new
            tracked.last_token_s = now_s
            if tracked.first_token_s is None:
                tracked.first_token_s = now_s
        if output.finish_reason is not None:
            self._settle(output.request_id, tracked, now_s)

    def _settle(self, request_id: str, tracked: Tracked, now_s: float) -> None:
        if tracked.first_token_s is not None:
            first_s = tracked.first_token_s
            ttft_ms = (first_s - tracked.arrival_s) * 1e3
            num_made = tracked.num_tokens - tracked.num_given
            tpot_ms = (now_s - first_s) * 1e3 / max(1, num_made - 1)
            self._metrics.record_finished(tracked.promise, ttft_ms, tpot_ms)
        request = self._scheduler.requests.get(request_id)
        if request is None or request.is_finished():
            del self._requests[request_id]
        else:  # a streaming session, whose next turn may come
            tracked.first_token_s, tracked.num_given, tracked.num_tokens = None, 0, 0
            self._renew(request_id)

    def close(self) -> None:
        """Close the trace, if there is one."""
        if self._trace is not None:
            self._trace.close()

    # For the snapshot.

    def model(self) -> StepModel:
        """The step-time model of now."""
        return self._learner.model

    def snapshot(self) -> SloSnapshot:
        """The counters of now."""
        model = self._learner.model
        return self._metrics.snapshot(model.error, is_model_reliable=model.is_reliable)

    def report(self) -> SchedulerReport:
        """The requests of now and the last step."""
        requests = list(self._listed(self._clock()))
        model = self._learner.model
        return SchedulerReport(
            policy="slo",
            online=class_report(requests, is_online=True),
            offline=class_report(requests, is_online=False),
            step=self._last_step,
            error=model.error,
            is_cautious=not model.is_reliable,
        )

    def _listed(self, now_s: float) -> Iterator[Listed]:
        """The requests that it was told of, also while a step of theirs is under way."""
        scheduler = self._scheduler
        held = frozenset(self._plan.hold if self._plan else ())
        for is_running, requests in ((True, scheduler.running), (False, scheduler.waiting)):
            for request in requests:
                tracked = self._requests.get(request.request_id)
                if tracked is None:  # it came while this policy was not in force
                    continue
                num_tokens = request.num_output_tokens + request.num_output_placeholders
                yield Listed(
                    tracked.promise.is_online,
                    is_running,
                    is_running and request.request_id in held,
                    (tracked.deadline_s(num_tokens, now_s) - now_s) * 1e3,
                )


def _ends_in_flight(request: Request) -> bool:
    """Whether its last token is in flight: vLLM schedules it no more (as its `schedule` has it)."""
    in_flight = request.num_output_placeholders
    if not in_flight:
        return False
    num_known = request.num_computed_tokens + 2 - in_flight
    return num_known >= request.num_prompt_tokens + request.max_tokens


def _adapter_of(request: Request) -> int:
    return NO_ADAPTER if request.lora_request is None else request.lora_request.lora_int_id


def _giving_up(lacking: int, held: Iterable[Running], block_tokens: int) -> list[str]:
    """The least urgent of `held` whose blocks make up for what is lacking, or all."""
    victims = []
    for r in sorted(held, key=_when_due, reverse=True):
        if lacking <= 0:
            break
        victims.append(r.request_id)
        lacking -= num_blocks(r.computed_tokens, block_tokens)
    return victims


def _when_due(view: Running | Waiting) -> tuple[bool, float]:
    """Smaller is more urgent: online ones by when they are due, then offline ones by arrival."""
    if not view.is_online:
        return True, view.arrival_s
    if not view.is_lost:
        return False, view.deadline_s
    if isinstance(view, Running):
        return False, view.last_token_s + LOST_SLOWDOWN * view.tpot_ms / 1e3
    return False, view.deadline_s + (LOST_SLOWDOWN - 1) * view.tpot_ms / 1e3
