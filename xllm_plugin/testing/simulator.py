"""An engine without a model: vLLM's scheduling rules as far as plans rely on them, and a clock.

It runs `make_plan` on a simulated device, so that policies can be tested over hours of traffic in
seconds.  What it keeps of vLLM's `schedule`: running requests before waiting ones, one token budget
and one chunk limit, victims from the end of the running list, no admission in a step that
preempted, whole prompts have to fit before a request joins; and, where steps are scheduled ahead,
that the next one is planned when the last one begins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm_plugin.scheduler.plan import Limits, Plan, Running, View, Waiting, make_plan
from xllm_plugin.scheduler.predictor import StepModel, StepShape, StepTimeLearner, Work
from xllm_plugin.scheduler.waiting_queue import WaitingQueue

__all__ = ["Policy", "SimulatedEngine", "SimulatedRequest", "plan_fcfs", "plan_shortest_first"]

Policy = Callable[[View, StepModel, Limits], Plan]


@dataclass(eq=False)
class SimulatedRequest:
    """One request and what became of it; times in s, lengths in tokens."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_ms: float = 1000.0
    tpot_ms: float = 50.0
    is_online: bool = True
    priority: int = 0
    computed_tokens: int = 0
    tokens_in_flight: int = 0
    num_blocks: int = 0
    num_preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def todo_tokens(self) -> int:
        """Tokens that are known or in flight, and not computed."""
        return self.prompt_tokens + self.num_sampled - self.computed_tokens

    @property
    def num_sampled(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.token_times_s) + self.tokens_in_flight

    @property
    def is_finished(self) -> bool:
        """All of its tokens are there."""
        return len(self.token_times_s) >= self.output_tokens

    @property
    def is_lost(self) -> bool:
        """Whether its first token came too late."""
        return bool(self.token_times_s) and self._ttft_ms() > self.ttft_ms

    @property
    def kept_promise(self) -> bool:
        """Whether TTFT and mean TPOT were met; false while unfinished."""
        if not self.is_finished:
            return False
        first_s, last_s = self.token_times_s[0], self.token_times_s[-1]
        mean_ms = (last_s - first_s) * 1e3 / max(1, len(self.token_times_s) - 1)
        return self._ttft_ms() <= self.ttft_ms and mean_ms <= self.tpot_ms

    def deadline_s(self, now_s: float) -> float:
        """When its next token that is not in flight is due."""
        if not self.num_sampled:
            return self.arrival_s + self.ttft_ms / 1e3
        first_s = self.token_times_s[0] if self.token_times_s else now_s
        return first_s + self.num_sampled * self.tpot_ms / 1e3

    def _ttft_ms(self) -> float:
        return (self.token_times_s[0] - self.arrival_s) * 1e3


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A step that was scheduled and has not ended."""

    shape: StepShape
    begins_s: float
    duration_ms: float
    sampling: tuple[tuple[SimulatedRequest, int], ...]
    """Requests that get a token at its end, with how often each had been preempted by then."""

    @property
    def ends_s(self) -> float:
        """On the clock of the engine."""
        return self.begins_s + self.duration_ms / 1e3


class SimulatedEngine:
    """Steps of one engine on a device that takes `duration_ms` for a `StepShape`.

    Args:
        duration_ms: the device.
        work: the prior that it is learned from.
        policy: `make_plan`, or another.
        limits: as of `make_plan`; the budgets that are asserted never to be exceeded.
        num_blocks: of the KV cache.
        block_tokens: tokens a block holds.
        runs_ahead: whether a step is scheduled while the one before it runs.
    """

    def __init__(
        self,
        duration_ms: Callable[[StepShape], float],
        work: Work,
        limits: Limits,
        *,
        policy: Policy = make_plan,
        num_blocks: int = 10_000,
        block_tokens: int = 16,
        runs_ahead: bool = False,
    ) -> None:
        self._duration_ms = duration_ms
        self._policy = policy
        self._num_ahead = int(runs_ahead)
        self._open: deque[SimulatedStep] = deque()
        self.learner = StepTimeLearner(work)
        self.limits = limits
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self.block_tokens = block_tokens
        self.now_s = 0.0
        self.running: list[SimulatedRequest] = []
        self.waiting: list[SimulatedRequest] = []
        self.admitted_since_overdue = 0
        self.last_plan = Plan()

    def add(self, request: SimulatedRequest) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def abort(self, request: SimulatedRequest) -> None:
        """Forget a request."""
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def view(self) -> View:
        """What the policy sees, at the moment at which the step is expected to begin."""
        model = self.learner.model
        now_s = self.now_s
        for step in self._open:
            now_s = max(now_s, step.begins_s) + model.predict_ms(step.shape) / 1e3
        return View(
            now_s=now_s,
            running=[_as_running(r, now_s) for r in self._to_run()],
            waiting=WaitingQueue(_as_waiting(r, now_s) for r in self.waiting),
            free_blocks=self.free_blocks,
            total_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            admitted_since_overdue=self.admitted_since_overdue,
        )

    def step(self) -> dict[str, int]:
        """Plan and schedule one step; tokens computed by request.

        Ends the oldest step that is open, if as many are as may be; empty if nothing could run.
        """
        plan = self._policy(self.view(), self.learner.model, self.limits)
        self.last_plan = plan
        self._check(plan)
        scheduled = self._schedule(plan)
        assert sum(scheduled.values()) <= self.limits.max_tokens
        assert len(self.running) <= self.limits.max_sequences
        if scheduled:
            shape = self._shape(scheduled)
            begins_s = self._open[-1].ends_s if self._open else self.now_s
            sampling = self._advance(scheduled)
            self._open.append(SimulatedStep(shape, begins_s, self._duration_ms(shape), sampling))
        if self._open and (len(self._open) > self._num_ahead or not scheduled):
            self._end(self._open.popleft())
        self.check_blocks()
        return scheduled

    def check_blocks(self) -> None:
        """The books of blocks agree."""
        held = sum(r.num_blocks for r in self.running)
        assert held + self.free_blocks == self.num_blocks, "KV blocks are lost or invented"
        assert self.free_blocks >= 0
        assert not any(r.num_blocks for r in self.waiting)

    def _to_run(self) -> list[SimulatedRequest]:
        """Without those whose last token is in flight."""
        return [r for r in self.running if r.num_sampled < r.output_tokens]

    def _check(self, plan: Plan) -> None:
        running = {r.request_id for r in self._to_run()}
        named = [*plan.order, *plan.hold, *plan.preempt]
        assert len(named) == len(set(named)), "a running request is named twice"
        assert set(named) == running, "a running request is left out"
        assert len(plan.admit) == len(set(plan.admit))
        assert set(plan.admit) <= {r.request_id for r in self.waiting}
        assert 0 < plan.token_budget <= self.limits.max_tokens

    def _schedule(self, plan: Plan) -> dict[str, int]:
        by_id = {r.request_id: r for r in (*self.running, *self.waiting)}
        for request_id in plan.preempt:
            self._give_up(by_id[request_id])
        offered = [by_id[i] for i in plan.order]
        held = [by_id[i] for i in plan.hold]
        named = {*plan.order, *plan.hold}
        ending = [r for r in self.running if r.request_id not in named]
        self.running = offered
        scheduled: dict[str, int] = {}
        budget, has_preempted = plan.token_budget, False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num = min(request.todo_tokens, budget, plan.chunk_tokens or budget)
            if request.todo_tokens == 1:
                num = 1
            while not self._allocate(request, request.computed_tokens + num):
                victim = self.running[-1]
                self._give_up(victim)
                has_preempted = True
                if victim is request:
                    break
            if request not in self.running:
                break
            scheduled[request.request_id] = num
            budget -= num
            index += 1
        if not has_preempted:
            self._admit(plan, by_id, scheduled, budget, len(held) + len(ending))
        self.running += held + ending
        return scheduled

    def _admit(
        self,
        plan: Plan,
        by_id: dict[str, SimulatedRequest],
        scheduled: dict[str, int],
        budget: int,
        num_beside: int,
    ) -> None:
        for request_id in plan.admit:
            request = by_id[request_id]
            places = self.limits.max_sequences - num_beside
            if budget <= 0 or len(self.running) >= places:
                return
            if self._blocks(request.todo_tokens) > self.free_blocks:
                return
            num = min(request.todo_tokens, budget, plan.chunk_tokens or budget)
            self._allocate(request, num)
            self.waiting.remove(request)
            self.running.append(request)
            scheduled[request_id] = num
            budget -= num
            self.admitted_since_overdue += 1
            if plan.turn is not None:
                self.admitted_since_overdue = 0

    def _shape(self, scheduled: dict[str, int]) -> StepShape:
        shape = StepShape()
        for request in self.running:
            num = scheduled.get(request.request_id, 0)
            if num == 1 == request.todo_tokens:
                shape = shape.with_decodes(1, request.computed_tokens)
            elif num:
                shape = shape.with_prefill(num, request.computed_tokens)
        return shape

    def _advance(self, scheduled: dict[str, int]) -> tuple[tuple[SimulatedRequest, int], ...]:
        """Count what a step computes; those whose known tokens it ends, and that get one more."""
        sampling = []
        for request in self.running:
            request.computed_tokens += scheduled.get(request.request_id, 0)
            if request.request_id in scheduled and not request.todo_tokens:
                request.tokens_in_flight += 1
                sampling.append((request, request.num_preemptions))
        return tuple(sampling)

    def _end(self, step: SimulatedStep) -> None:
        """The clock goes to the end of a step, and its tokens are there."""
        self.now_s = max(self.now_s, step.ends_s)
        self.learner.observe(step.shape, step.duration_ms)
        for request, num_preemptions in step.sampling:
            if request not in self.running or request.num_preemptions != num_preemptions:
                continue  # aborted or preempted meanwhile
            assert not request.is_finished, "a request is served twice"
            request.tokens_in_flight -= 1
            request.token_times_s.append(self.now_s)
            if request.is_finished:
                self.running.remove(request)
                self._release(request)

    def _allocate(self, request: SimulatedRequest, tokens: int) -> bool:
        needed = self._blocks(tokens) - request.num_blocks
        if needed > self.free_blocks:
            return False
        needed = max(needed, 0)
        self.free_blocks -= needed
        request.num_blocks += needed
        return True

    def _give_up(self, request: SimulatedRequest) -> None:
        self.running.remove(request)
        self._release(request)
        request.computed_tokens = request.tokens_in_flight = 0
        request.num_preemptions += 1
        self.waiting.insert(0, request)

    def _release(self, request: SimulatedRequest) -> None:
        self.free_blocks += request.num_blocks
        request.num_blocks = 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


def plan_fcfs(view: View, model: StepModel, limits: Limits) -> Plan:
    """vLLM's own order: decodes and started prompts, then arrivals, up to the token budget."""
    del model
    queue = sorted(view.waiting, key=lambda w: (not w.is_online, w.priority, w.arrival_s))
    return _plan_in_order(view, queue, limits)


def plan_shortest_first(view: View, model: StepModel, limits: Limits) -> Plan:
    """vLLM's ``--scheduling-policy priority`` with a prompt's length for its priority."""
    del model
    queue = sorted(view.waiting, key=lambda w: (not w.is_online, w.todo_tokens, w.arrival_s))
    return _plan_in_order(view, queue, limits)


def _plan_in_order(view: View, queue: list[Waiting], limits: Limits) -> Plan:
    tokens = sum(r.todo_tokens for r in view.running)
    admit = []
    for waiting in queue:
        if tokens >= limits.max_tokens:
            break
        admit.append(waiting.request_id)
        tokens += waiting.todo_tokens
    return Plan(
        order=tuple(r.request_id for r in view.running),
        admit=tuple(admit),
        token_budget=limits.max_tokens,
    )


def _as_running(request: SimulatedRequest, now_s: float) -> Running:
    times_s = request.token_times_s
    return Running(
        request.request_id,
        request.is_online,
        request.deadline_s(now_s),
        request.tpot_ms,
        request.arrival_s,
        request.priority,
        request.computed_tokens,
        request.todo_tokens,
        request.todo_tokens > 1,
        is_lost=request.is_lost,
        last_token_s=now_s if request.tokens_in_flight else times_s[-1] if times_s else -math.inf,
    )


def _as_waiting(request: SimulatedRequest, now_s: float) -> Waiting:
    return Waiting(
        request.request_id,
        request.is_online,
        request.deadline_s(now_s),
        request.tpot_ms,
        request.arrival_s,
        request.priority,
        request.todo_tokens,
        is_lost=request.is_lost,
    )
