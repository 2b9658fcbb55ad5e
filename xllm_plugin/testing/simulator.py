"""An engine without a model: vLLM's scheduling rules as far as plans rely on them, and a clock.

It runs `make_plan` on a simulated device, so that policies can be tested over hours of traffic in
seconds.  What it keeps of vLLM's `schedule`: running requests before waiting ones, one token budget
and one chunk limit, victims from the end of the running list, no admission in a step that
preempted, whole prompts have to fit before a request joins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from xllm_plugin.scheduler.plan import Limits, Plan, Running, View, Waiting, make_plan
from xllm_plugin.scheduler.predictor import StepModel, StepShape, StepTimeLearner, Work
from xllm_plugin.scheduler.waiting_queue import WaitingQueue

__all__ = ["SimulatedEngine", "SimulatedRequest", "plan_fcfs"]

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
    num_blocks: int = 0
    num_preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)

    @property
    def todo_tokens(self) -> int:
        """Tokens that are known and not computed."""
        return self.prompt_tokens + len(self.token_times_s) - self.computed_tokens

    @property
    def is_finished(self) -> bool:
        """All of its tokens are there."""
        return len(self.token_times_s) >= self.output_tokens

    @property
    def deadline_s(self) -> float:
        """When its next token is due."""
        if not self.token_times_s:
            return self.arrival_s + self.ttft_ms / 1e3
        return self.token_times_s[0] + len(self.token_times_s) * self.tpot_ms / 1e3

    @property
    def kept_promise(self) -> bool:
        """Whether TTFT and mean TPOT were met; false while unfinished."""
        if not self.is_finished:
            return False
        first_s, last_s = self.token_times_s[0], self.token_times_s[-1]
        mean_ms = (last_s - first_s) * 1e3 / max(1, len(self.token_times_s) - 1)
        return (first_s - self.arrival_s) * 1e3 <= self.ttft_ms and mean_ms <= self.tpot_ms


class SimulatedEngine:
    """Steps of one engine on a device that takes `duration_ms` for a `StepShape`.

    Args:
        duration_ms: the device.
        work: the prior that it is learned from.
        policy: `make_plan`, or another.
        limits: as of `make_plan`; the budgets that are asserted never to be exceeded.
        num_blocks: of the KV cache.
        block_tokens: tokens a block holds.
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
    ) -> None:
        self._duration_ms = duration_ms
        self._policy = policy
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
        """What the policy sees."""
        return View(
            now_s=self.now_s,
            running=[_as_running(r) for r in self.running],
            waiting=WaitingQueue(_as_waiting(r) for r in self.waiting),
            free_blocks=self.free_blocks,
            total_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            admitted_since_overdue=self.admitted_since_overdue,
        )

    def step(self) -> dict[str, int]:
        """Plan and run one step; tokens computed by request.  Empty if nothing could run."""
        plan = self._policy(self.view(), self.learner.model, self.limits)
        self.last_plan = plan
        self._check(plan)
        scheduled = self._schedule(plan)
        assert sum(scheduled.values()) <= self.limits.max_tokens
        assert len(self.running) <= self.limits.max_sequences
        if scheduled:
            shape = self._shape(scheduled)
            duration_ms = self._duration_ms(shape)
            self.learner.observe(shape, duration_ms)
            self.now_s += duration_ms / 1e3
            self._take_in(scheduled)
        self.check_blocks()
        return scheduled

    def check_blocks(self) -> None:
        """The books of blocks agree."""
        held = sum(r.num_blocks for r in self.running)
        assert held + self.free_blocks == self.num_blocks, "KV blocks are lost or invented"
        assert self.free_blocks >= 0
        assert not any(r.num_blocks for r in self.waiting)

    def _check(self, plan: Plan) -> None:
        running = {r.request_id for r in self.running}
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
            self._admit(plan, by_id, scheduled, budget, len(held))
        self.running += held
        return scheduled

    def _admit(
        self,
        plan: Plan,
        by_id: dict[str, SimulatedRequest],
        scheduled: dict[str, int],
        budget: int,
        num_held: int,
    ) -> None:
        for request_id in plan.admit:
            request = by_id[request_id]
            places = self.limits.max_sequences - num_held
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
            if plan.serves_overdue:
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

    def _take_in(self, scheduled: dict[str, int]) -> None:
        for request in list(self.running):
            request.computed_tokens += scheduled.get(request.request_id, 0)
            if request.request_id in scheduled and not request.todo_tokens:
                assert not request.is_finished, "a request is served twice"
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
        request.computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.insert(0, request)

    def _release(self, request: SimulatedRequest) -> None:
        self.free_blocks += request.num_blocks
        request.num_blocks = 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


def plan_fcfs(view: View, model: StepModel, limits: Limits) -> Plan:
    """vLLM's own order: decodes and started prompts, then arrivals, up to the token budget."""
    tokens = sum(r.todo_tokens for r in view.running)
    admit = []
    for waiting in sorted(view.waiting, key=lambda w: (not w.is_online, w.priority, w.arrival_s)):
        if tokens >= limits.max_tokens:
            break
        admit.append(waiting.request_id)
        tokens += waiting.todo_tokens
    del model
    return Plan(
        order=tuple(r.request_id for r in view.running),
        admit=tuple(admit),
        token_budget=limits.max_tokens,
    )


def _as_running(request: SimulatedRequest) -> Running:
    return Running(
        request.request_id,
        request.is_online,
        request.deadline_s,
        request.tpot_ms,
        request.arrival_s,
        request.priority,
        request.computed_tokens,
        request.todo_tokens,
        request.todo_tokens > 1,
    )


def _as_waiting(request: SimulatedRequest) -> Waiting:
    assert math.isfinite(request.deadline_s)
    return Waiting(
        request.request_id,
        request.is_online,
        request.deadline_s,
        request.tpot_ms,
        request.arrival_s,
        request.priority,
        request.todo_tokens,
    )
