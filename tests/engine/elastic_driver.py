"""One tiny engine in this process, its KV cache elastic or not; what it answered, as JSON.

``python elastic_driver.py MODEL [OPTIONS]`` with XLLM_XTENSOR__ENABLED; OPTIONS are those of vLLM's
`LLM`, as JSON.  `test_elastic_memory` compares.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import psutil
from driving import greedy, report, scenarios, tiny_engine
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)

BLOCK_TOKENS = 32
NUM_BLOCKS = 65  # of so many tokens; an odd number
PROMPTS = (
    "The sun rises in the",
    "Once upon a time there was a fox who",
    "One two three four five six seven eight nine ten eleven twelve " * 6,
    "def fibonacci(n):",
)


def rss_of_pages() -> int:
    """Bytes of the driver's file that this process has in memory."""
    return sum(m.rss for m in psutil.Process().memory_maps() if "memfd:xllm-pages" in m.path)


class Mirror:
    """What a listener to KV events takes the prefix cache to hold: (group, hash)."""

    def __init__(self) -> None:
        self.held: set[tuple[int, Any]] = set()
        self.num_removed = 0

    def hear(self, events: Sequence[Any]) -> None:
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.held.clear()
                continue
            named = {(event.group_idx, block_hash) for block_hash in event.block_hashes}
            if isinstance(event, BlockStored):
                self.held |= named
            elif isinstance(event, BlockRemoved):
                self.held -= named
                self.num_removed += len(named)


class Driver:
    """The scenarios; every method that does not start with an underscore is one."""

    def __init__(self, model: str, options: str = "{}") -> None:
        chosen = {"dtype": "float32", "block_size": BLOCK_TOKENS, **json.loads(options)}
        self._scale = BLOCK_TOKENS // chosen["block_size"]
        # Odd, so that a column may begin inside a page.
        chosen.setdefault("num_gpu_blocks_override", NUM_BLOCKS * self._scale | 1)
        events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
        self._llm = tiny_engine(model, kv_events_config=events, **chosen)
        core: Any = self._llm.llm_engine.engine_core
        self._core = core.engine_core
        self._scheduler = self._core.scheduler
        self._cache = self._scheduler._memory._cache
        self.found_memory: dict[str, Any] = {}
        self._mirror = Mirror()
        self._scheduler.kv_event_publisher.publish = lambda batch: self._mirror.hear(batch.events)
        self.tables = {"all": 0, "plain_ranges": 0}

    def _generate(self, prompts: Sequence[str], params: Any) -> list[list[int]]:
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def _check(self) -> None:
        if self._cache is not None:
            self._cache._pool.check_integrity()
        for request in self._scheduler.running:
            for table in self._scheduler.kv_cache_manager.get_block_ids(request.request_id):
                self.tables["all"] += 1
                self.tables["plain_ranges"] += table == list(range(table[0], table[0] + len(table)))

    def _set_budget(self, num_blocks: int | None = None) -> None:
        """So many blocks of `BLOCK_TOKENS`, or the fewest there may be; None is all."""
        if self._cache is not None:
            section = self._cache.section()
            num_bytes = section.num_slabs * section.slab_bytes
            if num_blocks is not None:
                least = section.min_budget_slabs * section.slab_bytes
                num_bytes = max(least, num_blocks * self._scale * section.block_bytes)
            self._scheduler._memory.set_memory_budget(num_bytes)

    def _settle(self) -> Any:
        """Let the workers hear of everything; the section afterwards."""
        while self._scheduler.has_requests():
            self._core.step_fn()
        return self._cache.section()

    def chunked_prefill(self) -> list[list[int]]:
        """Prompts longer than a step, beside others that decode."""
        return self._generate(PROMPTS, greedy(max_tokens=60))

    def prefix_caching(self) -> dict[str, Any]:
        """The same long prompt again finds its blocks."""
        prompt = PROMPTS[2] + "and then"
        self._generate([prompt], greedy())
        again = self._llm.generate([prompt] * 3, greedy(), use_tqdm=False)
        cached = [output.num_cached_tokens for output in again]
        return {"tokens": [list(o.outputs[0].token_ids) for o in again], "cached": cached}

    def preemption(self) -> list[list[int]]:
        """More tokens than the budget holds."""
        before = self._scheduler._telemetry.num_preemptions
        self._set_budget(20)
        found = self._generate([f"{i} {PROMPTS[i % 2]}" for i in range(8)], greedy(max_tokens=150))
        self.found_memory["preemptions"] = self._scheduler._telemetry.num_preemptions - before
        self._set_budget()
        self._check()
        return found

    def resized_while_running(self) -> list[list[int]]:
        """The budget goes down, up and down again under eight requests."""
        engine = self._llm.llm_engine
        for i in range(8):
            engine.add_request(str(i), f"{i} {PROMPTS[i % 4]}", greedy(max_tokens=100))
        finished = {}
        budgets = {20: 18, 60: None, 100: 25}
        step = 0
        while engine.has_unfinished_requests():
            if step in budgets:
                self._set_budget(budgets[step])
            finished.update({o.request_id: o for o in engine.step() if o.finished})
            self._check()
            step += 1
        self._set_budget()
        return [list(finished[str(i)].outputs[0].token_ids) for i in range(8)]

    def _compare_events(self) -> None:
        """What a listener takes to be cached, and what is."""
        manager = self._scheduler.kv_cache_manager
        self._mirror.hear(manager.take_events())
        hashes = [block.block_hash for block in manager.block_pool.blocks if block.block_hash]
        cached = {(get_group_id(h), maybe_convert_block_hash(get_block_hash(h))) for h in hashes}
        self.found_memory |= {
            "num_cached": len(cached),
            "num_removed": self._mirror.num_removed,
            "num_wrongly_held": len(self._mirror.held - cached),
            "num_not_told": len(cached - self._mirror.held),
        }

    def _drafts(self) -> int:
        """Tokens of drafts that were taken."""
        name = "vllm:spec_decode_num_accepted_tokens"
        return sum(int(m.value) for m in self._llm.get_metrics() if m.name == name)

    def _follow_memory(self) -> None:
        """Memory in this process is that of the blocks which requests use."""
        slab_bytes = self._cache.section().slab_bytes
        self._llm.reset_prefix_cache()
        self._settle()
        memory = self._core.model_executor.driver_worker.worker.elastic_memory()
        pages = memory.pool
        pages.policy = type(pages.policy)(premap_pages=0, keep_mapped_pages=0, idle_s=0.0)
        pages.maintain()
        idle_bytes = rss_of_pages()
        engine = self._llm.llm_engine
        for i in range(4):
            engine.add_request(f"m{i}", PROMPTS[2], greedy(max_tokens=40))
        live = []
        while engine.has_unfinished_requests():
            engine.step()
            pages.maintain()
            section = self._cache.section()
            # A page counts at each address where it shows.
            shown_bytes = len(memory.range.aliases) * slab_bytes
            live.append((section.resident_bytes + shown_bytes, rss_of_pages()))
            self.found_memory["num_aliases"] = max(
                self.found_memory.get("num_aliases", 0), len(memory.range.aliases)
            )
        self._llm.reset_prefix_cache()
        section = self._settle()
        pages.maintain()
        self.found_memory |= {
            "slab_bytes": slab_bytes,
            "idle_bytes": idle_bytes,
            "most_bytes": max(rss for _, rss in live),
            "is_rss_of_live_blocks": all(slabs == rss for slabs, rss in live),
            "after_bytes": rss_of_pages(),
            "num_resident_slabs": section.num_resident_slabs,
        }


def main() -> None:
    driver = Driver(*sys.argv[1:])
    found: dict[str, Any] = {name: getattr(driver, name)() for name in scenarios(driver)}
    driver._compare_events()
    if driver._cache is not None:
        driver._follow_memory()
    found["memory"] = driver.found_memory
    found["tables"] = driver.tables
    found["pool"] = type(driver._scheduler.kv_cache_manager.block_pool).__name__
    groups = driver._scheduler.kv_cache_config.kv_cache_groups
    found["groups"] = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    found["num_drafted"] = driver._drafts()
    report(found)


if __name__ == "__main__":
    main()
