"""Plans are those of the planner's plain form, which walks every request at every step."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm_plugin.scheduler import plan as planning
from xllm_plugin.scheduler.plan import Limits, Plan, Running, View, Waiting, make_plan
from xllm_plugin.scheduler.predictor import StepModel, StepShape, Work
from xllm_plugin.scheduler.waiting_queue import Ranked, WaitingQueue

WORK = Work(weight_ms=10, token_ms=0.2, kv_token_ms=1e-4, pair_ms=1e-5, overhead_ms=64)
MODEL = StepModel(work=WORK, factors=(0, 0, 1, 1, 1, 1, 1, 0), error=0.05, num_samples=100)
MODELS = [MODEL, msgspec.structs.replace(MODEL, error=0.9)]


class Reference(planning._Planner):
    """The plain form of what the planner does in a cheaper one."""

    def run_online_decodes(self) -> None:
        super().run_online_decodes()
        rows = StepShape()
        for r in (*self._decodes, *self._hold, *self._lost):
            rows = rows.with_decodes(1, r.computed_tokens, r.todo_tokens)
        self._rows = rows

    def _hold_spare(self, budget_ms: float) -> None:
        spare_s = self._view.now_s + 2 * self._model.bound_ms(self._step) / 1e3
        spare = sorted(
            (r for r in self._decodes if r.deadline_s > spare_s),
            key=lambda r: r.deadline_s,
            reverse=True,
        )
        for num in planning._growing(len(spare)):
            held = {r.request_id for r in spare[:num]}
            rest = [r for r in self._decodes if r.request_id not in held]
            step = StepShape()
            for r in (*rest, *self._lost):
                step = step.with_decodes(1, r.computed_tokens, r.todo_tokens)
            if self._model.bound_ms(step) <= budget_ms:
                self._decodes, self._step = rest, step
                self._hold += spare[:num]
                return

    def _waiting(self) -> list[Waiting]:
        return sorted(
            (w for w in self._view.waiting if w.is_online), key=lambda w: int(w.request_id[1:])
        )

    def _ranked(self) -> tuple[list[planning.Prompt], list[planning.Prompt]]:
        turn = self._turn = self._overdue_turn()
        cost = planning._PromptCost(self._model, self._step)
        now_s = self._view.now_s
        prompts: list[planning.Prompt] = [*self._prompts, *self._waiting()]
        in_time: list[Ranked] = []
        late: list[Ranked] = []
        for index, p in enumerate(prompts):
            least_s = cost.least_s(p.todo_tokens, p.computed_tokens)
            if not p.is_lost and now_s + least_s <= p.deadline_s:
                in_time.append((p.priority, p.deadline_s, least_s, index))
            else:
                late.append((p.priority, least_s, least_s, index))
        self._num_late = len(late)
        in_time.sort()
        share = self._share_of_prompts()
        kept, dropped = planning._most_on_time(in_time[: planning.MAX_CONSIDERED], now_s, share)
        late += dropped
        late.sort()
        first: list[planning.Prompt] = [] if turn is None else [turn]
        first += [prompts[index] for *_, index in kept if prompts[index] is not turn]
        rest = [prompts[index] for *_, index in late[: planning.MAX_CONSIDERED]]
        return first, [p for p in rest if p is not turn]

    def _overdue_turn(self) -> planning.Prompt | None:
        if self._view.admitted_since_overdue + 1 < planning.OVERDUE_TURN:
            return None
        prompts: list[planning.Prompt] = [*self._prompts, *self._waiting()]
        oldest = min(prompts, key=lambda p: p.arrival_s)
        if oldest.arrival_s > self._view.now_s - self._limits.max_wait_s:
            return None
        return oldest

    def _growth_of_decodes(self, requests: Sequence[Running]) -> int:
        return sum(self._growth(r, r.todo_tokens) for r in requests)

    def run_offline_prompts(self) -> None:
        prompts: list[planning.Prompt] = sorted(
            self._offline_prompts, key=lambda r: (r.priority, r.arrival_s)
        )
        if not self._is_online_due and (self._model.is_reliable or not self._has_online()):
            waiting = sorted(
                (w for w in self._view.waiting if not w.is_online),
                key=lambda w: int(w.request_id[1:]),
            )
            prompts += heapq.nsmallest(
                planning.MAX_CONSIDERED, waiting, key=lambda w: (w.priority, w.arrival_s)
            )
            self._take_offline(prompts)
        self._hold += [r for r in self._offline_prompts if r.request_id not in self._chunks]


def reference(view: View, model: StepModel, limits: Limits) -> Plan:
    planner = Reference(view, model, limits)
    planner.run_online_decodes()
    planner.run_online_prompts()
    planner.make_room()
    planner.run_offline_decodes()
    planner.run_offline_prompts()
    return planner.finished()


@st.composite
def views(draw: st.DrawFn) -> tuple[View, Limits]:
    """Queues from none to several hundred; times from a few values, so that many are equal."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    coarse = draw(st.sampled_from([0.25, 1e-4]))
    lost_share = draw(st.sampled_from([0.0, 0.0, 0.3]))
    online_share = draw(st.sampled_from([0.0, 0.5, 1.0]))
    due_s = draw(st.sampled_from([(-5, -1), (-1, 1), (0, 30)]))
    num_running, num_waiting = draw(st.integers(0, 60)), draw(st.sampled_from([0, 1, 7, 400]))

    def some(low: float, high: float) -> float:
        return round(rng.uniform(low, high) / coarse) * coarse

    running = [
        Running(
            f"r{i}",
            rng.random() < online_share,
            some(-1, 2),
            rng.choice([20.0, 50.0]),
            some(-60, 0),
            rng.choice([0, 0, 1]),
            rng.randint(1, 400),
            rng.choice([1, 1, 1, 1, 3]) if i % 9 else rng.randint(2, 900),
            i % 9 == 0,
            is_lost=rng.random() < lost_share,
            last_token_s=some(-0.5, 0),
        )
        for i in range(num_running)
    ]
    waiting = [
        Waiting(
            f"w{i}",
            rng.random() < online_share,
            some(*due_s),
            rng.choice([20.0, 50.0]),
            some(-60, 0),
            rng.choice([0, 0, 1]),
            rng.choice([1, 16, 160, rng.randint(1, 900)]),
            rng.choice([0, 0, 64]),
            is_lost=rng.random() < lost_share,
        )
        for i in range(num_waiting)
    ]
    view = View(
        now_s=0.0,
        running=running,
        waiting=WaitingQueue(waiting),
        free_blocks=draw(st.sampled_from([0, 20, 10**5])),
        total_blocks=10**5,
        block_tokens=16,
        admitted_since_overdue=draw(st.sampled_from([0, 3])),
    )
    limits = Limits(
        max_sequences=max(num_running, draw(st.sampled_from([8, 64, 512]))),
        max_tokens=draw(st.sampled_from([128, 2048])),
        max_step_ms=draw(st.sampled_from([100.0, 250.0, 5000.0])),
    )
    return view, limits


@given(views(), st.sampled_from(MODELS))
@settings(max_examples=150, deadline=None)
def test_every_plan_is_the_plain_form_s(made: tuple[View, Limits], model: StepModel) -> None:
    view, limits = made
    assert make_plan(view, model, limits) == reference(view, model, limits)
