"""One simulated instance: continuous batching with chunked prefill over a KV cache with prefixes.

What it keeps of vLLM's V1 scheduler (`vllm/v1/core/sched/scheduler.py`): requests that decode go
before prompts, prompts begun before waiting ones, one token budget a step, first come first served;
a prompt joins when all of it fits; when the cache is full the request that joined last is preempted
and computed again; blocks that nobody uses stay cached and go least recently used first, a chain's
end before its beginning.  A block counts as cached from the step on that computes it.

KV memory is counted in tokens: whole blocks of prompts by their hash, all else by the token.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from xllm_plugin.bench.fleet_simulator.profile import StepProfile, pairs_of
from xllm_plugin.errors import InternalError
from xllm_plugin.registration import Load

__all__ = ["Engine", "Job", "Outcome", "Stored"]


@dataclass(slots=True, eq=False)
class Job:
    """One request at one instance.

    Args:
        number: of the request.
        blocks: hashes of its prompt's blocks, the last of which may be incomplete.
        prompt_tokens: its length.
        output_tokens: how many it will generate, at least 1.
    """

    number: int
    blocks: Sequence[int]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    """That it did not have to compute when it began first."""
    num_preemptions: int = 0
    computed: int = 0
    """Tokens whose keys and values are there, while its prompt is computed."""
    num_generated: int = 0
    """When it was preempted last, or 0."""
    num_shared: int = 0
    """Blocks, from the first on, that it holds under their hashes."""
    private_tokens: int = 0
    """All else that it holds."""
    last_count: int = 0
    """Number of the decoding step that makes its last token."""
    is_decoding: bool = False
    has_begun: bool = False
    """Whether it was admitted before."""

    @property
    def todo_tokens(self) -> int:
        """Tokens that have to be known before its next."""
        return self.prompt_tokens + self.num_generated


@dataclass(frozen=True, slots=True)
class Stored:
    """A chain of blocks that came into the cache, after `parent`."""

    blocks: tuple[int, ...]
    parent: int | None


@dataclass(slots=True)
class Outcome:
    """What a step has brought when it ends."""

    first: list[Job] = field(default_factory=list)
    """Got their first token."""
    done: list[Job] = field(default_factory=list)
    """Got their last."""
    stored: list[Stored] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    """Blocks that left the cache; before those that came."""


class Engine:
    """One instance.  `add` a job; while `is_busy`, `begin` a step, and `end` it when it is over.

    Args:
        profile: how fast it is, and its limits.
        block_tokens: tokens that one block hash stands for.
        slowness: every step takes so many times as long.
    """

    def __init__(self, profile: StepProfile, block_tokens: int, slowness: float = 1.0) -> None:
        self.profile = profile
        self.block_tokens = block_tokens
        self.slowness = slowness
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        """In the order in which they joined."""
        self.busy_s = 0.0
        self.computed_tokens = 0
        """Of prompts, those computed again included."""
        self.num_steps = 0
        self._prompts: list[Job] = []
        self._decodes: list[tuple[int, int, Job]] = []
        """A heap by the decoding step that finishes each; preempted ones stay in it, stale."""
        self._num_decodes = 0
        self._context_tokens = 0
        """Of all that decode, in the next step."""
        self._decode_count = 0
        self._joined = 0
        self._references: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        """Cached and used by nobody, the next to go first."""
        self._used_tokens = 0
        self._outcome = Outcome()
        self._chunks: list[tuple[Job, int]] = []
        self._itl_sum_s = 0.0
        self._itl_count = 0

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do."""
        return bool(self.running or self.waiting)

    @property
    def used_tokens(self) -> int:
        """KV tokens of requests that run."""
        return self._used_tokens

    @property
    def cached_blocks(self) -> int:
        """Blocks whose hashes are known here."""
        return len(self._references) + len(self._free)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)

    def load(self) -> Load:
        """What a heartbeat says: requests of now, speed since the last one."""
        tpot_s = self._itl_sum_s / self._itl_count if self._itl_count else None
        self._itl_sum_s, self._itl_count = 0.0, 0
        return Load(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_usage=min(1.0, self._used_tokens / self.profile.kv_tokens),
            tpot_s=tpot_s,
        )

    def begin(self) -> float:
        """Begin a step; returns how many seconds it takes."""
        self._make_room_for_decodes()
        budget = self.profile.max_step_tokens - self._num_decodes
        chunks = self._chunks
        pairs = 0.0
        for job in self._prompts:
            if budget <= 0:
                break
            budget, more = self._compute(job, budget)
            pairs += more
        while budget > 0 and self.waiting and len(self.running) < self.profile.max_requests:
            job = self.waiting[0]
            if not self._admit(job):
                break
            self.waiting.popleft()
            budget, more = self._compute(job, budget)
            pairs += more
        num_tokens = sum(num for _, num in chunks)
        seconds = self.slowness * self.profile.step_s(
            num_tokens, pairs, self._num_decodes, self._context_tokens
        )
        if not chunks and not self._num_decodes:
            raise InternalError("a step has nothing to do: the KV cache is too small for a request")
        self._itl_sum_s += seconds * self._num_decodes
        self._itl_count += self._num_decodes
        self.busy_s += seconds
        self.computed_tokens += num_tokens
        self.num_steps += 1
        return seconds

    def end(self) -> Outcome:
        """End the step that was begun."""
        outcome, self._outcome = self._outcome, Outcome()
        if self._num_decodes:
            self._decode_count += 1
            self._context_tokens += self._num_decodes
            decodes = self._decodes
            while decodes and decodes[0][0] <= self._decode_count:
                _, _, job = heapq.heappop(decodes)
                if job.is_decoding and job.last_count <= self._decode_count:
                    self._context_tokens -= job.prompt_tokens + job.output_tokens
                    self._num_decodes -= 1
                    self._leave(job)
                    outcome.done.append(job)
        for job, _ in self._chunks:
            if job.computed == job.todo_tokens:
                self._prompt_is_there(job, outcome)
        self._chunks.clear()
        return outcome

    def check_integrity(self) -> None:
        """Raise `InternalError` unless the books of KV memory agree."""
        private = sum(job.private_tokens for job in self.running)
        decoded = sum(self._decoded(job) for job in self.running)
        shared = len(self._references) * self.block_tokens
        if private + decoded + shared != self._used_tokens:
            raise InternalError(
                f"{self._used_tokens} KV tokens are counted, {private + decoded + shared} are held"
            )
        if self._references.keys() & self._free.keys():
            raise InternalError("a block is used and free")
        if self._used_tokens + len(self._free) * self.block_tokens > self.profile.kv_tokens:
            raise InternalError("the KV cache holds more than it can")
        if any(job.private_tokens or job.num_shared for job in self.waiting):
            raise InternalError("a waiting request holds KV memory")

    # -- prompts --------------------------------------------------------------------------------

    def _admit(self, job: Job) -> bool:
        """Let a job join if all of its prompt fits."""
        usable = (job.prompt_tokens - 1) // self.block_tokens
        num_hits = num_free = 0
        for block in job.blocks[:usable]:
            if block in self._free:
                num_free += 1
            elif block not in self._references:
                break
            num_hits += 1
        hit_tokens = num_hits * self.block_tokens
        more = num_free * self.block_tokens + job.todo_tokens - hit_tokens
        if self._used_tokens + more > self.profile.kv_tokens:
            return False
        for block in job.blocks[:num_hits]:
            if block in self._free:
                del self._free[block]
            self._references[block] = self._references.get(block, 0) + 1
        self._used_tokens += more
        self._evict()
        job.num_shared = num_hits
        job.private_tokens = job.todo_tokens - hit_tokens
        job.computed = hit_tokens
        if not job.has_begun:
            job.has_begun = True
            job.cached_tokens = hit_tokens
        self.running[job] = None
        self._prompts.append(job)
        return True

    def _compute(self, job: Job, budget: int) -> tuple[int, float]:
        """Put a chunk of a prompt into this step; returns what is left of the budget, and pairs."""
        num = min(job.todo_tokens - job.computed, budget)
        pairs = pairs_of(job.computed, num)
        job.computed += num
        self._chunks.append((job, num))
        self._share(job)
        return budget - num, pairs

    def _share(self, job: Job) -> None:
        """Let others find the whole blocks that this step computes; copies of one count once."""
        size = self.block_tokens
        whole = min(job.computed, job.prompt_tokens) // size
        new: list[int] = []
        for depth in range(job.num_shared, whole):
            block = job.blocks[depth]
            references = self._references.get(block, 0)
            self._references[block] = references + 1
            if references:
                self._used_tokens -= size
            elif block in self._free:
                del self._free[block]
            else:
                new.append(block)
                continue
            self._store(job, depth, new)
            new = []
        if whole > job.num_shared:
            job.private_tokens -= (whole - job.num_shared) * size
            job.num_shared = whole
            self._store(job, whole, new)

    def _store(self, job: Job, end: int, blocks: list[int]) -> None:
        """Tell of `blocks`, the ones before number `end` of a job's."""
        if blocks:
            first = end - len(blocks)
            parent = job.blocks[first - 1] if first else None
            self._outcome.stored.append(Stored(tuple(blocks), parent))

    def _prompt_is_there(self, job: Job, outcome: Outcome) -> None:
        """Its next token comes with this step."""
        self._prompts.remove(job)
        if job.num_generated == 0:
            outcome.first.append(job)
        num_left = job.output_tokens - job.num_generated - 1
        if num_left == 0:
            self._leave(job)
            outcome.done.append(job)
            return
        job.is_decoding = True
        job.last_count = self._decode_count + num_left
        self._joined += 1
        heapq.heappush(self._decodes, (job.last_count, self._joined, job))
        self._num_decodes += 1
        self._context_tokens += job.todo_tokens + 1

    # -- memory ---------------------------------------------------------------------------------

    def _make_room_for_decodes(self) -> None:
        """One more token for each that decodes; preempt until they fit."""
        while self._used_tokens + self._num_decodes > self.profile.kv_tokens:
            self._preempt(next(reversed(self.running)))
        self._used_tokens += self._num_decodes
        self._evict()

    def _preempt(self, job: Job) -> None:
        if job.is_decoding:
            num_left = job.last_count - self._decode_count
            num_generated = job.output_tokens - num_left
            self._num_decodes -= 1
            self._context_tokens -= job.prompt_tokens + num_generated
        else:
            num_generated = job.num_generated
            self._prompts.remove(job)
        self._leave(job)
        job.num_generated = num_generated
        job.num_preemptions += 1
        job.computed = 0
        self.waiting.appendleft(job)

    def _leave(self, job: Job) -> None:
        """Give back what a job holds; whole blocks stay cached, its last ones go first."""
        self._used_tokens -= job.private_tokens + self._decoded(job)
        for block in reversed(job.blocks[: job.num_shared]):
            count = self._references[block] - 1
            if count:
                self._references[block] = count
            else:
                del self._references[block]
                self._free[block] = None
                self._used_tokens -= self.block_tokens
        job.private_tokens = job.num_shared = 0
        job.is_decoding = False
        del self.running[job]

    def _decoded(self, job: Job) -> int:
        """KV tokens that a job has taken since its prompt was there.

        The last token that was made has no keys and values yet.
        """
        if not job.is_decoding:
            return 0
        num_generated = job.output_tokens - (job.last_count - self._decode_count)
        return num_generated - 1 - job.num_generated

    def _evict(self) -> None:
        room = self.profile.kv_tokens - self._used_tokens
        while len(self._free) * self.block_tokens > room:
            block, _ = self._free.popitem(last=False)
            self._outcome.removed.append(block)
