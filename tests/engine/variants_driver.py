"""Two engines of a model in this process, one after the other; what each answered, as JSON.

The KV cache of the first is fixed, that of the second elastic; both are sent to sleep, twice.
``python variants_driver.py PATH NAME STEPS``: a model by its name in the catalogue (the path is of
no use here), STEPS sync or async.  `test_elastic_variants` compares.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import psutil
from driving import greedy, report, tiny_engine

from xllm_plugin.cpu.weight_memory import weights_of, whole_pages
from xllm_plugin.errors import MisuseError
from xllm_plugin.models import prepare

PROMPTS = (
    "The sun rises in the",
    "Once upon a time there was a fox who",
    "One two three four five six seven eight nine ten eleven twelve " * 6,
    "def fibonacci(n):",
)
NATIVE_MODELS = frozenset({"tiny-llama"})


def of_the_model(worker: Any) -> dict[str, Any]:
    model = worker.model_runner.get_model()
    return {
        "is_native": any(type(m.forward).__name__ == "NativeModel" for m in model.modules()),
        "weight_bytes": sum(run.num_bytes for run in whole_pages(weights_of(model))),
        "is_elastic": worker.elastic_memory() is not None,
        "thread": threading.current_thread().name,
    }


def resident_bytes() -> int:
    gc.collect()
    found: int = psutil.Process().memory_info().rss
    return found


class Engine:
    """One engine; closed by whoever made it."""

    def __init__(self, name: str, *, is_elastic: bool, is_async: bool) -> None:
        self._llm = tiny_engine(
            str(prepare(name)),
            dtype="bfloat16",
            enforce_eager=name not in NATIVE_MODELS,
            num_gpu_blocks_override=65,
            enable_sleep_mode=True,
            async_scheduling=is_async,
            additional_config={"xllm": {"xtensor": {"enabled": is_elastic}}},
        )

    def answers(self) -> list[list[int]]:
        """Prompts longer than a step beside others that decode; then the longest one again."""
        beside = self._llm.generate(list(PROMPTS), greedy(max_tokens=60), use_tqdm=False)
        again = self._llm.generate([PROMPTS[2]] * 3, greedy(), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in [*beside, *again]]

    def sleep(self, level: int) -> dict[str, int]:
        """Memory of this process before, asleep, and when it has answered again."""
        found = {"before": resident_bytes()}
        self._llm.sleep(level=level)
        found["asleep"] = resident_bytes()
        self._llm.wake_up()
        return found

    def found(self) -> dict[str, Any]:
        (model,) = self._llm.collective_rpc(of_the_model)
        found: dict[str, Any] = {"model": model, "answers": self.answers(), "slept": {}}
        for level in (1, 2):
            try:
                memory = self.sleep(level)
            except MisuseError as error:
                found["slept"][level] = {"refused": str(error)}
                self._llm.wake_up()
                continue
            answers = self.answers()
            found["slept"][level] = memory | {"answers": answers, "after": resident_bytes()}
        return found

    def close(self) -> None:
        core: Any = self._llm.llm_engine.engine_core
        core.shutdown()


def main() -> None:
    name, steps = sys.argv[2:]
    found = {}
    for memory in ("fixed", "elastic"):
        engine = Engine(name, is_elastic=memory == "elastic", is_async=steps == "async")
        try:
            found[memory] = engine.found()
        finally:
            engine.close()
    report(found)


if __name__ == "__main__":
    main()
