"""One side of the step benchmark: an offline engine in this process, its methods timed.

``python driver.py`` reads one JSON object a line from standard input and answers each with one
line; `sides.py` sends them.  The first is ``{"do": "machine"}`` (no engine) or ``{"do": "start"}``.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm_plugin.bench.commands import beside
from xllm_plugin.bench.replies import reply, take_stdout
from xllm_plugin.testing.collect import completion_of

if TYPE_CHECKING:
    from benchmarks.step import parts
else:
    parts = beside(Path(__file__).resolve().parent, "parts")

KV_CACHE_BYTES = 2**30
"""Room for 64 sequences of 700 tokens of SmolLM2-135M (23 kB a token)."""
READ_BYTES = 2**30
MATMUL_SIZE = 4096
BEST_WITHIN_S = 3.0
"""A shared machine's memory is at its best now and then: one try of 20 ms says little."""
WARM_UP_PROMPT, WARM_UP_TOKENS = 16, 4


class Engine:
    """A vLLM engine that runs in this thread, one step a call."""

    def __init__(self, model: str, max_model_len: int, max_batch: int, max_tokens: int) -> None:
        import vllm

        self._vllm = vllm
        self.llm = vllm.LLM(
            model=model,
            max_model_len=max_model_len,
            max_num_seqs=max_batch,
            max_num_batched_tokens=max_tokens,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            distributed_executor_backend="uni",
            async_scheduling=False,  # parts of one step would lie beside those of another
            max_logprobs=20,
            seed=0,
        )
        self.timer = parts.PartTimer()
        self.steps: list[parts.Step] = []
        self._scheduled: tuple[int, ...] = ()
        core = self.llm.llm_engine.engine_core.engine_core
        self.block_pool = type(core.scheduler.kv_cache_manager.block_pool).__name__
        self._attach(core)

    def _attach(self, core: Any) -> None:
        runner = core.model_executor.driver_worker.worker.model_runner
        owners = {"scheduler": core.scheduler, "runner": runner, "model": runner.get_model()}
        for owner, methods in parts.METHODS.items():
            for method, part in methods.items():
                self.timer.attach(owners[owner], method, part)
        core.scheduler.schedule = self._noting(core.scheduler.schedule)
        self.timer.attach(core, "step_fn", parts.REST)
        core.step_fn = self._recording(core.step_fn)

    def _noting(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._scheduled = tuple(output.num_scheduled_tokens.values())
            return output

        return noting

    def _recording(self, step: Callable[[], Any]) -> Callable[[], Any]:
        def recording() -> Any:
            self.timer.take_ms()
            answer = step()
            self.steps.append(parts.Step(self._scheduled, self.timer.take_ms()))
            return answer

        return recording

    def run(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> list[Any]:
        """Answer all prompts, added before the first step; `steps` has the steps it took."""
        self.begin(prompts, max_tokens, **sampling)
        return list(self.llm.wait_for_completion(use_tqdm=False))

    def begin(self, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> None:
        """Add all prompts and take no step yet."""
        self.steps.clear()
        self.llm.enqueue(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **sampling
            ),
            use_tqdm=False,
        )

    def go_on(self, num_steps: int) -> bool:
        """Take so many steps, or those that are left; whether any is left then."""
        engine = self.llm.llm_engine
        for _ in range(num_steps):
            if not engine.has_unfinished_requests():
                break
            engine.step()
        return bool(engine.has_unfinished_requests())


def measure_machine() -> dict[str, float]:
    """The best rate of reading memory and of multiplying bf16 matrices, with all threads."""
    import torch

    # Adding floats is slower than reading them; integers are added as fast as they come.
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).bfloat16() for _ in range(2))
    return {
        "read_bytes_per_s": READ_BYTES / best_s(numbers.sum),
        "bf16_flop_per_s": 2 * MATMUL_SIZE**3 / best_s(lambda: left @ right),
    }


def best_s(call: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls made within `BEST_WITHIN_S`."""
    fastest_s, until_s = math.inf, time.perf_counter() + BEST_WITHIN_S
    while (started_s := time.perf_counter()) < until_s:
        call()
        fastest_s = min(fastest_s, time.perf_counter() - started_s)
    return fastest_s


def start(job: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """Start the engine and touch every shape once."""
    import torch
    from vllm.platforms import current_platform

    engine = Engine(job["model"], job["max_model_len"], job["max_batch"], job["max_tokens"])
    tokens, rng = job["tokens"], random.Random("warm-up")
    for batch in job["batches"]:
        engine.run([rng.choices(tokens, k=WARM_UP_PROMPT) for _ in range(batch)], WARM_UP_TOKENS)
    for length in job["prefills"]:
        engine.run([rng.choices(tokens, k=length)], 1)
    platform = type(current_platform).__module__
    return engine, {
        "platform": "xllm" if platform.startswith("xllm_plugin.") else "native",
        "num_threads": torch.get_num_threads(),
        "block_pool": engine.block_pool,
    }


def decode(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Steps in which every request of the batch makes one token."""
    engine.run(job["prompts"], job["max_tokens"])
    batch = len(job["prompts"])
    return {"steps": as_json(step for step in engine.steps if step.is_decode(batch))}


def begin(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Add requests whose steps are asked for by `go_on`."""
    engine.begin(job["prompts"], job["max_tokens"])
    return {}


def go_on(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """A few steps of what has begun, while another engine waits for its turn."""
    engine.steps.clear()
    has_more = engine.go_on(job["num_steps"])
    return {"steps": as_json(engine.steps), "has_more": has_more}


def prefill(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """For each prompt the one step that reads it."""
    found: list[parts.Step] = []
    for prompt in job["prompts"]:
        engine.run([prompt], 1)
        found += [step for step in engine.steps if step.is_prefill(len(prompt))]
    return {"steps": as_json(found)}


def answer_alone_and_together(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Completions with log-probs, prompt by prompt and then all in one batch."""
    asked = {"max_tokens": job["max_tokens"], "logprobs": job["logprobs"]}
    alone = [engine.run([prompt], **asked)[0] for prompt in job["prompts"]]
    together = engine.run(job["prompts"], **asked)
    return {"alone": completions(alone), "together": completions(together)}


def completions(answers: Sequence[Any]) -> list[dict[str, Any]]:
    """As `xllm_plugin.testing.equality.Completion.from_dict` reads them."""
    return [
        completion_of(str(number), answer.outputs[0]).to_dict()
        for number, answer in enumerate(answers)
    ]


def as_json(steps: Iterable[parts.Step]) -> list[dict[str, Any]]:
    """Steps for a line of JSON."""
    return [asdict(step) for step in steps]


ASKED = {
    "begin": begin,
    "decode": decode,
    "go_on": go_on,
    "outputs": answer_alone_and_together,
    "prefill": prefill,
}


def main() -> None:
    """Answer jobs until standard input ends."""
    replies = take_stdout()
    engine: Engine | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "machine":
            reply(replies, measure_machine())
        elif job["do"] == "start":
            engine, found = start(job)
            reply(replies, found)
        else:
            assert engine is not None
            reply(replies, ASKED[job["do"]](engine, job))


if __name__ == "__main__":
    main()
