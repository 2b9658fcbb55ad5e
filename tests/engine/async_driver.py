"""One tiny engine in this process, every kind of request, what it answered as JSON.

``python async_driver.py MODEL MODE`` with MODE sync or async; `test_async_scheduling` compares.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from driving import greedy, report, scenarios, tiny_engine
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

PROMPTS = (
    "The sun rises in the",
    "Once upon a time there was a fox who",
    "One two three four five six seven eight nine ten eleven twelve " * 6,
    "def fibonacci(n):",
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "is_red": {"type": "boolean"}},
    "required": ["name", "is_red"],
    "additionalProperties": False,
}


def told(outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """What a client would see of each request, in order."""
    return [
        {
            "token_ids": list(sample.token_ids),
            "text": sample.text,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "logprobs": chosen(sample.logprobs, sample.token_ids),
            "prompt_logprobs": len(output.prompt_logprobs or ()),
        }
        for output in outputs
        for sample in output.outputs
    ]


def chosen(logprobs: Any, token_ids: Sequence[int]) -> list[float] | None:
    if logprobs is None:
        return None
    return [step[token].logprob for step, token in zip(logprobs, token_ids, strict=True)]


class Driver:
    """The scenarios; every method that does not start with an underscore is one."""

    def __init__(self, model: str, *, is_async: bool) -> None:
        self._llm = tiny_engine(model, async_scheduling=is_async)
        self._core: Any = self._llm.llm_engine.engine_core.engine_core

    def _generate(self, prompts: Sequence[str], params: Any) -> list[dict[str, Any]]:
        return told(self._llm.generate(list(prompts), params, use_tqdm=False))

    def sampling(self) -> list[dict[str, Any]]:
        """Together: greedy, seeded, several samples, penalties, log-probs, a single token."""
        params = [
            greedy(),
            SamplingParams(temperature=1.0, seed=7, max_tokens=24, n=3, logprobs=2),
            greedy(logprobs=3, prompt_logprobs=2),
            greedy(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
            greedy(max_tokens=1),
            SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=40, min_tokens=8),
            greedy(bad_words=["the"], max_tokens=16),
        ]
        return self._generate([PROMPTS[i % len(PROMPTS)] for i in range(len(params))], params)

    def stop_strings(self) -> list[dict[str, Any]]:
        """The text that a request would write is cut in its middle, and by a token."""
        (free,) = self._llm.generate([PROMPTS[1]], greedy(), use_tqdm=False)
        text, token_ids = free.outputs[0].text, free.outputs[0].token_ids
        middle = text[len(text) // 2 : len(text) // 2 + 3]
        params = [
            greedy(stop=[middle]),
            greedy(stop=[middle], include_stop_str_in_output=True),
            greedy(stop_token_ids=[token_ids[10]]),
            greedy(),
        ]
        return self._generate([PROMPTS[1]] * 4, params)

    def structured_output(self) -> list[dict[str, Any]]:
        """Beside requests that may say anything; they end at different steps."""
        params = [
            greedy(structured_outputs=StructuredOutputsParams(json=SCHEMA), max_tokens=60),
            greedy(structured_outputs=StructuredOutputsParams(choice=["red", "green"])),
            greedy(structured_outputs=StructuredOutputsParams(regex="[0-9]{5}-[a-f]{9}")),
            greedy(max_tokens=7),
            greedy(structured_outputs=StructuredOutputsParams(regex="[0-9]{30}"), max_tokens=3),
            greedy(structured_outputs=StructuredOutputsParams(json=SCHEMA), max_tokens=60),
        ]
        for param in params:
            param.ignore_eos = False
        prompts = [PROMPTS[0]] * 4 + [PROMPTS[2], PROMPTS[3]]
        return self._generate(prompts, params)

    def prefix_caching(self) -> dict[str, Any]:
        """The same long prompt again finds its blocks."""
        prompt = PROMPTS[2] + "and then"
        first = self._llm.generate([prompt], greedy(), use_tqdm=False)
        again = self._llm.generate([prompt] * 3, greedy(), use_tqdm=False)
        cached = [output.num_cached_tokens for output in again]
        return {"answers": told([*first, *again]), "cached": cached}

    def preemption(self) -> list[dict[str, Any]]:
        """More tokens than the cache holds."""
        before = self._core.scheduler._telemetry.num_preemptions
        params = [
            greedy(max_tokens=200),
            SamplingParams(temperature=1.0, seed=11, max_tokens=200, ignore_eos=True),
        ] * 4
        found = self._generate([f"{i} {PROMPTS[i % 2]}" for i in range(8)], params)
        assert self._core.scheduler._telemetry.num_preemptions > before, "nothing was preempted"
        return found

    def abort(self) -> list[dict[str, Any]]:
        """Two of four requests are aborted while a step is in flight."""
        engine = self._llm.llm_engine
        for i in range(4):
            engine.add_request(f"abort-{i}", PROMPTS[i], greedy(max_tokens=30))
        finished = []
        for step in range(1000):
            if not engine.has_unfinished_requests():
                break
            finished += [output for output in engine.step() if output.finished]
            if step == 9:
                engine.abort_request(["abort-1", "abort-2"])
        finished.sort(key=lambda output: output.request_id)
        return told(finished)

    def leftovers(self) -> dict[str, Any]:
        """After all that nothing is held, and the books agree with the clients."""
        scheduler = self._core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        load = scheduler._telemetry._load_now()
        return {
            "num_blocks_held": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "num_requests": len(scheduler.requests),
            "num_running": load.num_running,
            "is_idle": scheduler._telemetry._is_idle(),
            "is_step_timed": 0 < load.last_step_ms < 60_000 and load.smoothed_step_ms > 0,
        }


def of_the_worker(worker: Any) -> dict[str, Any]:
    del worker
    return {"thread": threading.current_thread().name, "num_threads": torch.get_num_threads()}


def fail_next_step(worker: Any) -> None:
    def fail(scheduler_output: Any) -> None:
        raise ArithmeticError("the kernel failed")

    worker.execute_model = fail


def main() -> None:
    model, mode = sys.argv[1:]
    num_threads = torch.get_num_threads()
    driver = Driver(model, is_async=mode == "async")
    found: dict[str, Any] = {name: getattr(driver, name)() for name in scenarios(driver)}
    core = driver._core
    found["mode"] = {
        "executor": type(core.model_executor).__name__,
        "scheduler": type(core.scheduler).__name__,
        "batch_queue_size": core.batch_queue_size,
        "runner_is_async": core.model_executor.collective_rpc(
            lambda worker: worker.model_runner.use_async_scheduling
        )[0],
        "worker": core.model_executor.collective_rpc(of_the_worker)[0],
        "engine_num_threads": torch.get_num_threads(),
        "program_num_threads": num_threads,
    }
    core.model_executor.collective_rpc(fail_next_step)
    try:
        driver.sampling()
    except ArithmeticError as error:
        found["failure"] = str(error)
    driver._llm.llm_engine.engine_core.shutdown()
    found["threads_after"] = {
        "num_threads": torch.get_num_threads(),
        "names": sorted(thread.name for thread in threading.enumerate()),
    }
    report(found)


if __name__ == "__main__":
    main()
