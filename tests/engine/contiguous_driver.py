"""One engine of native layers that is scheduled ahead; what it answered before and after sleep.

``python contiguous_driver.py MODEL XTENSOR``: settings of its KV memory, as JSON; the answer too.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from driving import greedy, report, tiny_engine
from elastic_driver import rss_of_pages

PREFIX = "One two three four five six seven eight nine ten eleven twelve " * 15
PROMPTS = [
    "The sun rises in the",
    f"{PREFIX} and then",
    f"{PREFIX} and so",
    f"{PREFIX} and",
    "def fibonacci(n):",
]


def num_replaced(model: Any) -> int:
    """Modules that run something else than their class's `forward`."""
    return sum("forward" in vars(module) for module in model.modules())


class Engine:
    """The engine, a chunk of a prompt at a time."""

    def __init__(self, path: str, xtensor: dict[str, Any]) -> None:
        self._llm = tiny_engine(
            path,
            dtype="bfloat16",
            enforce_eager=False,
            num_gpu_blocks_override=65,
            enable_sleep_mode=True,
            async_scheduling=True,
            additional_config={"xllm": {"xtensor": xtensor}},
        )
        core: Any = self._llm.llm_engine.engine_core
        self._core = core.engine_core

    def answers(self) -> list[list[int]]:
        """All at once, then again with what the prefix cache has."""
        outputs = [
            output
            for _ in range(2)
            for output in self._llm.generate(PROMPTS, greedy(max_tokens=40), use_tqdm=False)
        ]
        self.num_cached = sum(output.num_cached_tokens for output in outputs)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def found(self) -> dict[str, Any]:
        pool = self._core.scheduler.kv_cache_manager.block_pool
        found: dict[str, Any] = {"pool": type(pool).__name__, "answers": self.answers()}
        found["num_cached"] = self.num_cached
        found["num_native"] = self._llm.apply_model(num_replaced)[0]
        found["awake_bytes"] = rss_of_pages()
        self._llm.sleep(level=1)
        found["asleep_bytes"] = rss_of_pages()
        self._llm.wake_up()
        return found | {"after_sleep": self.answers()}


def main() -> None:
    report(Engine(sys.argv[1], json.loads(sys.argv[2])).found())


if __name__ == "__main__":
    main()
