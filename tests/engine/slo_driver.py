"""One tiny engine in this process: each scenario in vLLM's own order, then under the policy slo.

``python slo_driver.py MODEL MODE`` with MODE sync or async; `test_slo` compares.  The policy has a
counter for a clock and a fixed step-time model, so that it plans the same at any speed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from driving import greedy, report, scenarios, tiny_engine
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from xllm_plugin.scheduler.predictor import StepModel

LONG = "one two three four five six seven eight nine ten eleven twelve "
ONLINE = {"xllm_ttft_ms": 300, "xllm_tpot_ms": 40}
TIGHT = {"xllm_ttft_ms": 100, "xllm_tpot_ms": 12}
LOOSE = {"xllm_ttft_ms": 5000, "xllm_tpot_ms": 500, "xllm_priority": 1}
OFFLINE = {"xllm_class": "offline"}
CLASSES = (ONLINE, OFFLINE, TIGHT, LOOSE)


def promised(promise: dict[str, Any], **changes: Any) -> SamplingParams:
    # All samples of a request come in its last output, whichever ends first.
    values = {"output_kind": RequestOutputKind.FINAL_ONLY, "max_tokens": 16, **changes}
    return greedy(extra_args=dict(promise), **values)


# Without a channel nobody asks the policy for its report, which reads the clock.
SETTINGS = {"scheduler": {"policy": "slo"}, "channel": {"enabled": False}}


class Driver:
    """The scenarios; every method that does not start with an underscore is one."""

    def __init__(self, model: str, **changes: Any) -> None:
        settings = {"xllm": SETTINGS}
        options = {"max_num_batched_tokens": 128, "additional_config": settings, **changes}
        self._llm = tiny_engine(model, **options)
        self.scheduler: Any = self._llm.llm_engine.engine_core.engine_core.scheduler
        self.policy = self.scheduler._slo
        ticks = itertools.count()
        self.policy._clock = lambda: next(ticks) * 0.002
        self.policy._wall_clock = lambda: 0.0
        # 2 ms, 1 ms a row and 0.2 ms a token.
        work = msgspec.structs.replace(
            self.policy.model().work, overhead_ms=64, weight_ms=2, token_ms=0.2
        )
        fixed = StepModel(work=work, factors=(0, 0, 1, 0, 0, 1, 1, 0), error=0.05, num_samples=100)
        self.policy._learner.observe = lambda step, duration_ms: None
        self.policy._learner.model = fixed

    def _run(
        self,
        prompts: Sequence[Any],
        params: Sequence[SamplingParams],
        between: Callable[[int], None] = lambda step: None,
        each_step: int = 2,
        adapters: Sequence[Any] = (),
    ) -> list[Any]:
        """Add some requests at each step, as traffic comes, and drain; tokens in order."""
        engine = self._llm.llm_engine
        asked = list(zip(prompts, params, adapters or [None] * len(prompts), strict=True))
        finished: dict[str, Any] = {}
        for step in range(5000):
            for i in range(step * each_step, min(len(asked), (step + 1) * each_step)):
                prompt, wanted, adapter = asked[i]
                engine.add_request(f"{i:03}", prompt, wanted, lora_request=adapter)
            between(step)
            if step * each_step >= len(asked) and not engine.has_unfinished_requests():
                break
            for output in engine.step():
                if output.finished:
                    assert output.request_id not in finished, "a request ended twice"
                    finished[output.request_id] = [list(s.token_ids) for s in output.outputs]
        return [[name, finished[name]] for name in sorted(finished)]

    def mixed(self) -> list[Any]:
        """Four classes, prompts from one word to several chunks, more than fit the batch."""
        prompts = [f"{i} " + LONG * (i % 5) for i in range(24)]
        return self._run(prompts, [promised(CLASSES[i % 4]) for i in range(24)])

    def sampling(self) -> list[Any]:
        """Seeds, several samples, penalties: state that a held request must keep."""
        params = []
        for promise in CLASSES * 2:
            params += [
                promised(promise, temperature=1.0, seed=7, n=2),
                promised(promise, repetition_penalty=1.3, presence_penalty=0.5),
            ]
        return self._run([f"{i} {LONG}" for i in range(16)], params)

    def structured_output(self) -> list[Any]:
        """Beside requests that may say anything."""
        shape = StructuredOutputsParams(regex="[0-9]{5}-[a-f]{9}")
        params = [
            promised(CLASSES[i % 4], **({"structured_outputs": shape} if i % 2 else {}))
            for i in range(12)
        ]
        return self._run([f"{i} {LONG}" for i in range(12)], params)

    def prefix_caching(self) -> list[Any]:
        """One long beginning, shared by requests of all classes."""
        prompts = [LONG * 4 + f"and then {i}" for i in range(12)]
        return self._run(prompts, [promised(CLASSES[i % 4]) for i in range(12)], each_step=1)

    def preemption(self) -> list[Any]:
        """More tokens than the cache holds, of both classes."""
        params = [promised((OFFLINE, ONLINE)[i // 4 % 2], max_tokens=130) for i in range(12)]
        return self._run([f"{i} {LONG}" for i in range(12)], params, each_step=1)

    def aborts(self) -> list[Any]:
        """Running, held and waiting requests are aborted."""

        def between(step: int) -> None:
            if step in {9, 14, 19}:
                self._llm.llm_engine.abort_request([f"{i:03}" for i in range(step, 24, 7)])

        prompts = [f"{i} " + LONG * (i % 4) for i in range(24)]
        return self._run(prompts, [promised(CLASSES[i % 4]) for i in range(24)], between)

    def wrong_promise(self) -> list[Any]:
        """What an API server would refuse gets the default promise here."""
        return self._run(["a", "b"], [promised({"xllm_ttft_ms": "soon"}), promised(ONLINE)])


def leftovers(driver: Driver) -> dict[str, int]:
    pool = driver.scheduler.kv_cache_manager.block_pool
    return {
        "num_blocks_held": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "num_requests": len(driver.scheduler.requests),
        "num_tracked": len(driver.policy._requests),
        "num_steps_open": len(driver.policy._steps),
    }


def compare(driver: Driver) -> None:
    """Run every scenario of the driver's class on both sides, and print what was found."""
    found: dict[str, Any] = {"scheduler": type(driver.scheduler).__name__}
    for name in scenarios(driver):
        found[name] = {}
        for side, policy in (("theirs", None), ("ours", driver.policy)):
            driver.scheduler._slo = policy
            driver.scheduler.reset_prefix_cache()
            before = driver.policy.snapshot()
            found[name][side] = getattr(driver, name)()
            after = driver.policy.snapshot()
        found[name]["counts"] = {
            "held": sum(after.num_held.values()) - sum(before.num_held.values()),
            "preempted": after.num_preempted - before.num_preempted,
            "planned": after.num_planned - before.num_planned,
            "offline_tokens": after.offline_tokens - before.offline_tokens,
            "invalid": after.num_invalid - before.num_invalid,
            "bounds": {k: n - before.bounds[k] for k, n in after.bounds.items()},
        }
        found[name]["leftovers"] = leftovers(driver)
    found["snapshot"] = msgspec.to_builtins(driver.policy.snapshot())
    found["report"] = msgspec.to_builtins(driver.policy.report())
    found["limits"] = [
        driver.scheduler.max_num_active_reqs,
        driver.scheduler.max_num_scheduled_tokens,
        driver.scheduler.scheduler_config.long_prefill_token_threshold,
    ]
    driver._llm.llm_engine.engine_core.shutdown()
    report(found)


def main() -> None:
    model, mode = sys.argv[1:]
    compare(Driver(model, async_scheduling=mode == "async"))


if __name__ == "__main__":
    main()
