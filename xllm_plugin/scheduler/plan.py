"""What runs in the next step: a pure function of the requests' slack and the step-time model.

In this order (paper, section 3.1 and 3.2; ProServe's slide batching, arXiv 2512.12928):

1. Decodes of online requests run.  The n-th token after the first is due n times TPOT after it, so
   steps that were faster than promised have earned credit.  The tightest of these deadlines is the
   step's budget.  If all together would break it, those that can spare a whole step are held.  Who
   would miss its TPOT even alone on this device binds nobody.
2. Prompts of online requests share what is left of the budget: those that can still meet their
   TTFT by deadline, as many as can (J. M. Moore, "An n job, one machine sequencing algorithm for
   minimizing the number of late jobs", 1968).  A first chunk that the budget cuts waits until the
   decodes were spared a step.  Nobody joins whose decoding would make the batch too slow for its
   promises.
3. Then those whose promise is broken: decodes first, longest waiting first, and at a fourth of
   their pace whatever it costs; then prompts, least work first, and those that have waited too long
   in turns with all others.
4. If these lack KV blocks or places, offline requests give up theirs, those with least computed
   first.
5. Offline decodes are merged while the step stays within its budget; offline prompts are read when
   no online one is due.  Both stop at the next step when online work comes.
6. If there are still too few blocks, nothing is held: vLLM takes them from the last in order.

A held request keeps its KV blocks.  Plans know of no LoRA adapters: `slo.py` holds those that a
step has no room for, and after rule 6 lets the least urgent of these give up blocks.  Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, TypeVar

import msgspec

from xllm_plugin.scheduler.predictor import StepModel, StepShape
from xllm_plugin.scheduler.waiting_queue import Columns, Ranked, Waiting, WaitingQueue

__all__ = [
    "Bound",
    "Limits",
    "Plan",
    "Running",
    "View",
    "Waiting",
    "blocks_lacking",
    "make_plan",
    "num_blocks",
]

MIN_CHUNK_TOKENS: Final = 16
"""Smaller chunks are not worth a row, unless they end a prompt."""
CAUTIOUS_CHUNK_TOKENS: Final = 256
"""At most this many beside decodes, while the model cannot be relied on."""
LOST_TOKENS: Final = 16
"""The promise of a request this many tokens behind is given up."""
LOST_SLOWDOWN: Final = 4.0
"""A request whose promise is broken gets a token in this many times its TPOT, whatever it costs."""
MAX_CONSIDERED: Final = 128
"""Waiting requests by deadline that a place is looked for; bounds the cost."""
MAX_REFUSED: Final = 8
"""Of these, that would slow the batch too much, before no more are tried."""
OVERDUE_TURN: Final = 4
"""One admission in this many goes to the longest-waiting overdue request."""
LEAST_GROWTH: Final = 2.0
"""A step may grow to this many times its decodes where nothing else bounds it: on a device too slow
for its promises, prompts would otherwise wait until no request decodes."""
UNPROMISED_STEP: Final = 0.25
"""Part of the longest step that prompts which nobody is waiting for in time may fill."""
FREE_FOR_ONLINE: Final = 0.1
"""Part of all KV blocks that offline requests leave free."""


class Bound(StrEnum):
    """What kept the step from being larger."""

    WORK = "work"
    """Nothing; there was no more to do."""
    TPOT = "tpot"
    """The tightest deadline of a decode."""
    STEP_LIMIT = "step_limit"
    """Steps stay short enough that a request which comes now is not late by that alone."""
    TOKENS = "tokens"
    """`max_num_batched_tokens`."""
    BATCH = "batch"
    """One more decoding row would break promises."""
    MEMORY = "memory"
    """KV blocks, or places in the batch."""
    CAUTION = "caution"
    """The step-time model cannot be relied on."""


class Running(msgspec.Struct, frozen=True, gc=False):
    """A request in the batch.

    Attributes:
        request_id: vLLM's.
        is_online: whether its promise counts.
        deadline_s: when its next token is due, on the view's clock.
        tpot_ms: promised.
        arrival_s: on the view's clock.
        priority: lower is earlier.
        computed_tokens: in the KV cache.
        todo_tokens: known and not yet computed: 1 and its drafts for a decode, more in a prompt.
        is_prefill: whether these are part of a prompt, or of one that was preempted.
        is_lost: whether its promise is broken, whatever is done for it now.
        last_token_s: when its last token came.
    """

    request_id: str
    is_online: bool
    deadline_s: float
    tpot_ms: float
    arrival_s: float
    priority: int
    computed_tokens: int
    todo_tokens: int
    is_prefill: bool
    is_lost: bool = False
    last_token_s: float = -math.inf


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The engine between two steps.

    Attributes:
        now_s: on any clock; all times are on it.
        running: in vLLM's order.
        waiting: the queue, not to be changed while a plan is made.
        free_blocks: of the KV cache.
        total_blocks: of the KV cache.
        block_tokens: tokens a block holds.
        admitted_since_overdue: admissions since the last overdue request's turn.
    """

    now_s: float
    running: Sequence[Running] = ()
    waiting: WaitingQueue = msgspec.field(default_factory=WaitingQueue)
    free_blocks: int
    total_blocks: int
    block_tokens: int
    admitted_since_overdue: int = 0


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change from step to step.

    Attributes:
        max_sequences: in the batch, held ones included.
        max_tokens: of one step.
        max_step_ms: of a step with prompts in it.
        target: part of a budget that is used.
        max_wait_s: an online request that waits longer is overdue.
    """

    max_sequences: int
    max_tokens: int
    max_step_ms: float
    target: float = 0.98
    max_wait_s: float = 30.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to run.

    Attributes:
        order: running requests to offer to the step, first served first.  If blocks run out, the
            last gives up its own.
        hold: running requests to leave out of the step; they keep their blocks.
        preempt: running requests to give up their blocks before the step.
        admit: waiting requests to put first, in this order; no more may join.
        token_budget: of the whole step.
        chunk_tokens: of one prompt in this step; 0 without bound.
        step: what is expected to run.
        predicted_ms: how long.
        bound: why it is not larger.
        num_late: online requests whose TTFT can no longer be met.
        turn: the overdue request that has its turn in this step, if one has.
    """

    order: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    preempt: tuple[str, ...] = ()
    admit: tuple[str, ...] = ()
    token_budget: int = 0
    chunk_tokens: int = 0
    step: StepShape = StepShape()
    predicted_ms: float = 0.0
    bound: Bound = Bound.WORK
    num_late: int = 0
    turn: str | None = None


Prompt = Running | Waiting
Tokens = TypeVar("Tokens", float, Columns)
_DEADLINE = operator.attrgetter("deadline_s")
_TPOT = operator.attrgetter("tpot_ms")
_ARRIVAL = operator.attrgetter("arrival_s")
_LAST_TOKEN = operator.attrgetter("last_token_s")


def make_plan(view: View, model: StepModel, limits: Limits) -> Plan:
    """Plan one step; see the module's text.

    Whatever the view, the plan names each request at most once, keeps within `limits`, and lets
    something run if anything can.
    """
    planner = _Planner(view, model, limits)
    planner.run_online_decodes()
    planner.run_online_prompts()
    planner.make_room()
    planner.run_offline_decodes()
    planner.run_offline_prompts()
    return planner.finished()


def num_blocks(tokens: int, block_tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    return -(-tokens // block_tokens)


def blocks_lacking(view: View, plan: Plan, running: Iterable[Running]) -> int:
    """KV blocks that `running` want in the step beyond those that are free once `plan` preempts."""
    size, preempted = view.block_tokens, frozenset(plan.preempt)
    freed = [r.computed_tokens for r in view.running if r.request_id in preempted]
    wanted = 0
    for r in running:
        chunk = min(r.todo_tokens, plan.chunk_tokens or r.todo_tokens)
        after = num_blocks(r.computed_tokens + chunk, size)
        wanted += after - num_blocks(r.computed_tokens, size)
    return wanted - view.free_blocks - sum(num_blocks(tokens, size) for tokens in freed)


class _Planner:
    """The working state of one `make_plan`."""

    def __init__(self, view: View, model: StepModel, limits: Limits) -> None:
        self._view, self._model, self._limits = view, model, limits
        self._decodes: list[Running] = []
        self._prompts: list[Running] = []
        self._offline_decodes: list[Running] = []
        self._offline_prompts: list[Running] = []
        for r in view.running:
            if r.is_online:
                (self._prompts if r.is_prefill else self._decodes).append(r)
            else:
                (self._offline_prompts if r.is_prefill else self._offline_decodes).append(r)
        # Decodes whose promise is broken: those that run, and those that may wait.
        self._lost: list[Running] = []
        self._waiting_lost: list[Running] = []
        self._is_online_due = bool(self._prompts or view.waiting.num_online)
        self._step = StepShape()
        self._rows = StepShape()
        self._most_ms = self._budget_ms = limits.max_step_ms
        self._unpromised_ms = math.inf
        self._is_saving = False
        # What no promise can be kept below: a row alone.
        self._lone_ms = model.predict_ms(StepShape().with_decodes(1, 0))
        self._tpot_ms = math.inf
        self._bound = Bound.WORK
        self._chunks: dict[str, int] = {}
        self._chosen: list[Running] = []
        self._admitted: list[Waiting] = []
        self._hold: list[Running] = []
        self._preempt: list[Running] = []
        self._num_late = 0
        self._turn: Prompt | None = None
        self._num_blocks = 0
        self._is_full = False
        self._blocks_for_online = self._free_blocks = view.free_blocks

    # Online decodes.

    def run_online_decodes(self) -> None:
        """All whose promise can be kept, unless some can spare a step that others cannot."""
        if not self._decodes:
            return
        self._part_lost()
        self._step = _with_decodes(self._step, [*self._decodes, *self._lost])
        self._rows = self._step
        decodes_ms = self._model.bound_ms(self._step)
        self._most_ms = self._budget_ms = max(self._limits.max_step_ms, LEAST_GROWTH * decodes_ms)
        kept = self._keepable()
        if not kept:
            return
        now_s, target = self._view.now_s, self._limits.target
        budget_ms = target * (min(map(_DEADLINE, kept)) - now_s) * 1e3
        if self._model.is_reliable and decodes_ms > budget_ms and self._hold_spare(budget_ms):
            kept = self._keepable()
        self._tpot_ms = min(map(_TPOT, kept))
        self._budget_ms = min(budget_ms, self._most_ms)
        # One more TPOT is kept for a step that is slower than said.  Work without a promise would
        # else use all credit up, and a last token have none.
        spare_ms = min([r.deadline_s * 1e3 - r.tpot_ms for r in kept]) - now_s * 1e3
        self._unpromised_ms = target * spare_ms
        self._is_saving = self._model.is_reliable and self._budget_ms < self._saved_ms()

    def _keepable(self) -> list[Running]:
        """Decodes whose promise this device can keep."""
        lone_ms = self._lone_ms
        return [r for r in self._decodes if r.tpot_ms >= lone_ms]

    def _saved_ms(self) -> float:
        """The budget once the tightest promise has been spared one step with prompts in it.

        Chunks cut to a single TPOT would pay a step's own cost each, and leave every token, the
        last included, at the edge of its deadline: one slow step breaks the promise.
        """
        spared_ms = max(0.0, self._tpot_ms - self._model.bound_ms(self._step))
        return min(self._limits.target * (self._tpot_ms + spared_ms), self._most_ms)

    def _part_lost(self) -> None:
        """Set those apart whose promise is broken; they wait for what others leave, for a while."""
        now_s = self._view.now_s
        lost = [
            r
            for r in self._decodes
            if r.is_lost or (r.deadline_s - now_s) * 1e3 <= -LOST_TOKENS * r.tpot_ms
        ]
        if not lost:
            return
        gone = {r.request_id for r in lost}
        self._decodes = [r for r in self._decodes if r.request_id not in gone]
        for r in lost:
            waits_until_s = r.last_token_s + LOST_SLOWDOWN * r.tpot_ms / 1e3
            may_wait = self._model.is_reliable and now_s < waits_until_s
            (self._waiting_lost if may_wait else self._lost).append(r)

    def _hold_spare(self, budget_ms: float) -> bool:
        """Hold the fewest with most slack, if that lets the tightest keep its promise."""
        spare_s = self._view.now_s + 2 * self._model.bound_ms(self._step) / 1e3
        spare = [r for r in self._decodes if r.deadline_s > spare_s]
        spare.sort(key=_DEADLINE, reverse=True)
        step, num_held = self._step, 0
        for num in _growing(len(spare)):  # the tightest itself is not among them
            step = _with_decodes(step, spare[num_held:num], sign=-1)
            num_held = num
            if self._model.bound_ms(step) <= budget_ms:
                held = {r.request_id for r in spare[:num]}
                self._decodes = [r for r in self._decodes if r.request_id not in held]
                self._step = step
                self._hold += spare[:num]
                return True
        return False

    # Online prompts.

    def run_online_prompts(self) -> None:
        """By urgency, within the budget of time, tokens and rows.

        Decodes whose promise is broken come between the prompts that can be on time and the rest.
        """
        in_time, late = self._ranked() if self._is_online_due else ([], [])
        offline = (*self._offline_decodes, *self._offline_prompts)
        self._blocks_for_online += sum(self._blocks(r.computed_tokens) for r in offline)
        self._num_blocks += self._growth_of_decodes([*self._decodes, *self._lost])
        self._count_rows(in_time)
        goes_on = self._run_prompts(in_time)
        self._run_waiting_lost()
        self._count_rows(late)
        if goes_on:
            self._shorten_step()
            self._run_prompts(late)
        self._hold += [r for r in self._prompts if r.request_id not in self._chunks]

    def _count_rows(self, prompts: Iterable[Prompt]) -> None:
        """As the batch will be once those of `prompts` that have been started decode."""
        for p in prompts:
            if isinstance(p, Running):
                self._rows = self._rows.with_decodes(1, p.computed_tokens + p.todo_tokens)

    def _run_prompts(self, prompts: Iterable[Prompt]) -> bool:
        """Give each what fits, in this order; whether more may follow."""
        num_places = self._limits.max_sequences - len(self._view.running)
        num_places += len(self._offline_decodes) + len(self._offline_prompts)
        num_refused = 0
        for prompt in prompts:
            must_run = prompt is self._turn or not self._step.num_tokens
            if isinstance(prompt, Waiting):
                self._is_full = (
                    self._is_full or num_places <= len(self._admitted) or not self._has_room(prompt)
                )
                if self._is_full:
                    self._bound = Bound.MEMORY
                    continue
                if not must_run and not self._may_join(prompt):
                    self._bound = Bound.BATCH
                    num_refused += 1
                    if num_refused == MAX_REFUSED:
                        return False
                    continue
            if not self._take_chunk(prompt, must_run=must_run):
                return False
            if isinstance(prompt, Waiting):
                self._rows = self._rows.with_decodes(1, prompt.computed_tokens + prompt.todo_tokens)
            self._tpot_ms = min(self._tpot_ms, self._keepable_ms(prompt))
        return True

    def _shorten_step(self) -> None:
        """Let who comes meanwhile wait less for prompts that keep no promise."""
        if not self._model.is_reliable:
            return
        most_ms = UNPROMISED_STEP * self._limits.max_step_ms
        if self._step.num_tokens:
            most_ms = max(most_ms, LEAST_GROWTH * self._model.bound_ms(self._step))
        self._budget_ms = min(self._budget_ms, most_ms, self._unpromised_ms)

    def _run_waiting_lost(self) -> None:
        """Those that have waited longest, as many as what is kept allows."""
        lost = sorted(self._waiting_lost, key=_LAST_TOKEN)
        self._rows = _with_decodes(self._rows, lost)
        is_bound = bool(self._decodes or self._chunks)
        num = self._num_that_fit(lost, is_bound=is_bound)
        self._step = _with_decodes(self._step, lost[:num])
        if not is_bound:
            least_ms = LEAST_GROWTH * self._model.bound_ms(self._step)
            self._budget_ms = self._most_ms = max(self._most_ms, least_ms)
        self._num_blocks += self._growth_of_decodes(lost[:num])
        self._lost += lost[:num]
        self._hold += lost[num:]

    def _num_that_fit(self, decodes: Sequence[Running], *, is_bound: bool) -> int:
        """How many of the first of `decodes` the step has room for, and time if it is bound."""
        num_left = self._limits.max_tokens - self._step.num_tokens
        num = min(len(decodes), num_left // max((r.todo_tokens for r in decodes), default=1))
        if not num or not is_bound:
            return num
        context = max(r.computed_tokens for r in decodes)
        budget_ms = min(self._budget_ms, self._unpromised_ms)
        return self._model.decodes_within(self._step, budget_ms, num, context)

    def _may_join(self, prompt: Prompt) -> bool:
        if not self._model.is_reliable:
            return True
        joined = self._rows.with_decodes(1, prompt.computed_tokens + prompt.todo_tokens)
        allowed_ms = self._limits.target * min(self._tpot_ms, self._keepable_ms(prompt))
        return self._model.bound_ms(joined) <= allowed_ms

    def _keepable_ms(self, prompt: Prompt) -> float:
        """Its TPOT; infinite if it would be missed even alone: then nobody is to wait for it."""
        return prompt.tpot_ms if prompt.tpot_ms >= self._lone_ms else math.inf

    def _ranked(self) -> tuple[list[Prompt], list[Prompt]]:
        """Online prompts that can all be on time, and others, each most urgent first.

        At most `MAX_CONSIDERED` of each; the overdue one whose turn has come is the first of all.
        """
        turn = self._turn = self._overdue_turn()
        now_s = self._view.now_s
        cost = _PromptCost(self._model, self._step)
        queued = self._view.waiting.sift(now_s, cost.least_s)
        in_time, late = queued.in_time(MAX_CONSIDERED), list[Ranked]()
        # Started prompts are numbered before all that wait.
        for number, p in enumerate(self._prompts, start=-len(self._prompts)):
            least_s = cost.least_s(p.todo_tokens, p.computed_tokens)
            if not p.is_lost and now_s + least_s <= p.deadline_s:
                in_time.append((p.priority, p.deadline_s, least_s, number))
            else:
                late.append((p.priority, least_s, least_s, number))
        self._num_late = len(late) + queued.num_late

        def prompt_of(number: int) -> Prompt:
            return self._prompts[number] if number < 0 else queued.request(number)

        in_time.sort()
        share = self._share_of_prompts()
        kept, dropped = _most_on_time(in_time[:MAX_CONSIDERED], now_s, share)
        late += dropped
        late += queued.late(MAX_CONSIDERED)
        late.sort()
        turns: list[Prompt] = [] if turn is None else [turn]
        first, rest = (
            [prompt for *_, number in ranked if (prompt := prompt_of(number)) is not turn]
            for ranked in (kept, late[:MAX_CONSIDERED])
        )
        return turns + first, rest

    def _overdue_turn(self) -> Prompt | None:
        """The request that has waited longest, if it is overdue and its turn has come."""
        if self._view.admitted_since_overdue + 1 < OVERDUE_TURN:
            return None
        queued = self._view.waiting.oldest_online()
        prompts: list[Prompt] = [*self._prompts, *([queued] if queued else [])]
        oldest = min(prompts, key=_ARRIVAL)
        if oldest.arrival_s > self._view.now_s - self._limits.max_wait_s:
            return None
        return oldest

    def _share_of_prompts(self) -> float:
        """Part of the time that decodes leave, if none of their credit is spent."""
        if self._tpot_ms == math.inf:
            return 1.0
        used = self._model.predict_ms(self._step) / (self._limits.target * self._tpot_ms)
        return max(0.05, 1.0 - used)

    def _take_chunk(self, prompt: Prompt, *, must_run: bool) -> bool:
        """Give `prompt` what fits; whether more may follow."""
        tokens_left = self._limits.max_tokens - self._step.num_tokens
        if tokens_left < 1:
            self._bound = Bound.TOKENS
            return False
        most = min(prompt.todo_tokens, tokens_left)
        fits = self._fitting(prompt, most)
        if self._would_take_more(prompt, fits):
            return True
        least = min(MIN_CHUNK_TOKENS, prompt.todo_tokens)
        if self._is_saving and fits < most and not (must_run or self._chunks):
            least = prompt.todo_tokens
        if fits < least:
            self._bound = self._why_short(fits, tokens_left)
            if not must_run:
                return False
            fits = min(least, tokens_left)
        self._chunks[prompt.request_id] = fits
        self._step = self._step.with_prefill(fits, prompt.computed_tokens)
        self._num_blocks += self._growth(prompt, fits)
        if isinstance(prompt, Running):
            self._chosen.append(prompt)
        else:
            self._admitted.append(prompt)
        if fits < prompt.todo_tokens:
            self._bound = self._why_short(fits, tokens_left)
            return False
        self._keep_in_time(prompt)
        return True

    def _would_take_more(self, prompt: Prompt, fits: int) -> bool:
        """Whether vLLM, which serves who runs before who joins, would give it what is not its."""
        if isinstance(prompt, Waiting) or not self._admitted:
            return False
        return fits < min(prompt.todo_tokens, max(self._chunks.values()))

    def _keep_in_time(self, prompt: Prompt) -> None:
        """Let what is added to a step in which `prompt` ends not make it late."""
        due_ms = (prompt.deadline_s - self._view.now_s) * 1e3
        is_kept = prompt.is_online and not prompt.is_lost
        if is_kept and due_ms >= self._model.bound_ms(self._step):
            self._budget_ms = min(self._budget_ms, due_ms)

    def _fitting(self, prompt: Prompt, most: int) -> int:
        is_cautious = not self._model.is_reliable
        if is_cautious and not self._decodes:
            return most
        fits = self._model.prefill_tokens_within(
            self._step, self._budget_ms, most, prompt.computed_tokens
        )
        if is_cautious:
            most = min(most, CAUTIOUS_CHUNK_TOKENS - self._step.prefill_tokens)
            fits = min(most, max(fits, MIN_CHUNK_TOKENS))
        return fits

    def _why_short(self, fits: int, tokens_left: int) -> Bound:
        if fits >= tokens_left:
            return Bound.TOKENS
        if not self._model.is_reliable:
            return Bound.CAUTION
        return Bound.TPOT if self._budget_ms < self._most_ms else Bound.STEP_LIMIT

    # Memory.

    def make_room(self) -> None:
        """Let offline requests give up the blocks and places that online ones lack."""
        lacking_blocks = self._blocks_needed() - self._view.free_blocks
        lacking_places = len(self._view.running) + len(self._admitted) - self._limits.max_sequences
        for victim in sorted(
            (*self._offline_decodes, *self._offline_prompts),
            key=lambda r: (-r.priority, r.computed_tokens),
        ):
            if lacking_places <= 0 and lacking_blocks <= 0:
                break
            self._preempt.append(victim)
            lacking_places -= 1
            lacking_blocks -= self._blocks(victim.computed_tokens)
        gone = {r.request_id for r in self._preempt}
        self._offline_decodes = [r for r in self._offline_decodes if r.request_id not in gone]
        self._offline_prompts = [r for r in self._offline_prompts if r.request_id not in gone]
        self._free_blocks = self._view.free_blocks + sum(
            self._blocks(victim.computed_tokens) for victim in self._preempt
        )

    def _blocks_needed(self) -> int:
        """By the step so far; vLLM lets a request join only if its whole prompt has room."""
        return self._num_blocks + sum(
            self._blocks(w.todo_tokens + 1) - self._blocks(self._chunks[w.request_id])
            for w in self._admitted
        )

    def _has_room(self, prompt: Waiting) -> bool:
        """Whether it could join, if offline requests gave way; the first always may.

        Without room it would be refused, and all that the plan left out for its sake have waited in
        vain.  Nobody passes it: it would never find room.
        """
        if not self._view.running and not self._admitted:
            return True
        needed = self._blocks_needed() + self._blocks(prompt.todo_tokens + 1)
        return needed <= self._blocks_for_online

    def _blocks(self, tokens: int) -> int:
        return num_blocks(tokens, self._view.block_tokens)

    def _growth(self, prompt: Prompt, tokens: int) -> int:
        computed = prompt.computed_tokens
        return self._blocks(computed + tokens) - self._blocks(computed)

    def _growth_of_decodes(self, requests: Sequence[Running]) -> int:
        """`_growth` of all, without a call for each: an open block has room for some tokens."""
        size = self._view.block_tokens
        return sum([-((-r.computed_tokens % size - r.todo_tokens) // size) for r in requests])

    # Offline.

    def run_offline_decodes(self) -> None:
        """As many, oldest first, as keep the step well within its budget."""
        decodes = sorted(self._offline_decodes, key=lambda r: (r.priority, r.arrival_s))
        num = 0
        if self._model.is_reliable or not self._has_online():
            num = self._num_that_fit(decodes, is_bound=self._has_online())
        self._step = _with_decodes(self._step, decodes[:num])
        self._num_blocks += self._growth_of_decodes(decodes[:num])
        self._offline_decodes = decodes[:num]
        self._hold += decodes[num:]

    def run_offline_prompts(self) -> None:
        """When no online prompt is due, and while the batch still gains by another row."""
        prompts: list[Prompt] = sorted(
            self._offline_prompts, key=lambda r: (r.priority, r.arrival_s)
        )
        if not self._is_online_due and (self._model.is_reliable or not self._has_online()):
            prompts += self._view.waiting.offline(MAX_CONSIDERED)
            self._shorten_step()
            self._take_offline(prompts)
        self._hold += [r for r in self._offline_prompts if r.request_id not in self._chunks]

    def _take_offline(self, prompts: Sequence[Prompt]) -> None:
        num_places = self._limits.max_sequences - len(self._view.running)
        num_free = self._free_blocks - int(FREE_FOR_ONLINE * self._view.total_blocks)
        decodes = [*self._decodes, *self._lost, *self._offline_decodes, *self._hold]
        rows = _with_decodes(StepShape(), decodes)
        for prompt in prompts:
            if isinstance(prompt, Waiting):
                num_free -= self._blocks(prompt.todo_tokens)
                is_alone = not (self._view.running or self._admitted)
                if num_places <= len(self._admitted) or (num_free < 0 and not is_alone):
                    self._bound = Bound.MEMORY
                    return
                if (
                    self._model.is_reliable
                    and rows.num_sequences
                    and self._model.is_saturated(rows)
                ):
                    self._bound = Bound.BATCH
                    return
            rows = rows.with_decodes(1, prompt.computed_tokens + prompt.todo_tokens)
            if not self._take_chunk(prompt, must_run=not self._step.num_tokens):
                return

    def _has_online(self) -> bool:
        return bool(self._decodes or self._lost or self._is_online_due)

    # The end.

    def finished(self) -> Plan:
        """The plan; everything is offered if blocks are short, or nothing would have run.

        Of what is offered `slo.py` may hold some all the same, for their LoRA adapters.
        """
        hold = self._hold
        decodes = sorted(self._decodes, key=_DEADLINE)
        online = [r for r in self._chosen if r.is_online]
        offline = [r for r in self._chosen if not r.is_online]
        offered = [*decodes, *self._lost, *self._offline_decodes, *online, *offline]
        if self._num_blocks > self._free_blocks:
            # vLLM takes blocks from the last, and a held request could not give up its own.
            offered = [*decodes, *online, *self._lost, *self._offline_decodes, *offline]
            offered += sorted(hold, key=lambda r: (not r.is_online, r.is_lost, r.deadline_s))
            hold = []
            self._bound = Bound.MEMORY
        elif not self._step.num_tokens:
            offered, hold = hold, []
        most, turn = self._limits.max_tokens, self._turn
        return Plan(
            order=tuple(r.request_id for r in offered),
            hold=tuple(r.request_id for r in hold),
            preempt=tuple(r.request_id for r in self._preempt),
            admit=tuple(w.request_id for w in self._admitted),
            token_budget=min(self._step.num_tokens, most) or most,
            chunk_tokens=max(self._chunks.values(), default=0),
            step=self._step,
            predicted_ms=self._model.predict_ms(self._step),
            bound=self._bound,
            num_late=self._num_late,
            turn=turn.request_id if turn is not None and turn.request_id in self._chunks else None,
        )


class _PromptCost:
    """What reading a prompt costs beside the decodes of now, linear in tokens and pairs.

    As it is expected, without a margin: nobody is given up for a doubt.
    """

    def __init__(self, model: StepModel, step: StepShape) -> None:
        empty_ms = model.predict_ms(step)
        pairs = msgspec.structs.replace(step, prefill_pairs=10**6)
        self._pair_s = (model.predict_ms(pairs) - empty_ms) / 1e9
        chunk = msgspec.structs.replace(
            step,
            num_tokens=step.num_tokens + CAUTIOUS_CHUNK_TOKENS,
            prefill_tokens=CAUTIOUS_CHUNK_TOKENS,
        )
        self._token_s = (model.predict_ms(chunk) - empty_ms) / CAUTIOUS_CHUNK_TOKENS / 1e3

    def least_s(self, todo_tokens: Tokens, computed_tokens: Tokens) -> Tokens:
        """The least time that many tokens after so many computed ones take, in s."""
        return todo_tokens * (self._token_s + self._pair_s * (computed_tokens + todo_tokens / 2))


def _most_on_time(
    ranked: Sequence[Ranked], now_s: float, share: float
) -> tuple[list[Ranked], list[Ranked]]:
    """Split prompts into those that can all be on time, and the rest ranked by the least time.

    Whenever one would be late, the longest so far is left out (of the lowest priority): Moore's
    algorithm, which loses the fewest.

    Args:
        ranked: by priority and deadline.
        now_s: on the clock of deadlines.
        share: part of the time that goes to prompts.
    """
    taken: list[tuple[int, float, int]] = []
    dropped: set[int] = set()
    end_s = now_s
    for place, (priority, deadline_s, least_s, _) in enumerate(ranked):
        needed_s = least_s / share
        heapq.heappush(taken, (-priority, -needed_s, place))
        end_s += needed_s
        if end_s > deadline_s:
            _, saved_s, longest = heapq.heappop(taken)
            end_s += saved_s
            dropped.add(longest)
    kept = [entry for place, entry in enumerate(ranked) if place not in dropped]
    rest = [ranked[place] for place in dropped]
    return kept, [(priority, least_s, least_s, index) for priority, _, least_s, index in rest]


def _with_decodes(step: StepShape, requests: Sequence[Running], *, sign: int = 1) -> StepShape:
    """`step` with these rows more, or with `sign` -1 less."""
    return StepShape(
        step.num_sequences + sign * len(requests),
        step.num_tokens + sign * sum([r.todo_tokens for r in requests]),
        step.context_tokens + sign * sum([r.computed_tokens for r in requests]),
        step.prefill_tokens,
        step.prefill_pairs,
    )


def _growing(most: int) -> Iterable[int]:
    """1, 2, 4, ... and `most` itself."""
    num = 1
    while num < most:
        yield num
        num *= 2
    if most:
        yield most
