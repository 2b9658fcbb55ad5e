"""The policy slo in vLLM's own schedulers, with a clock of ours and no model: nobody is lost.

Tokens are made up; what is real is `schedule`, `update_from_output`, the KV cache's books, and the
policy around them.  `SimulatedEngine` stands in for all of that where hours of traffic are wanted.
"""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from xllm_plugin import shims
from xllm_plugin.models import prepare
from xllm_plugin.scheduler.config import SchedulerConfig
from xllm_plugin.worker.messages import StepMessage, StepStamp

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

NUM_BLOCKS, BLOCK_TOKENS, MAX_SEQUENCES, MAX_TOKENS = 60, 16, 8, 128
CLASSES = ("online", "offline")


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restored: a configuration binds OpenMP and preloads libraries for processes to come."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def vllm() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    import vllm.config
    from vllm.engine import arg_utils
    from vllm.lora import request as lora
    from vllm.v1 import kv_cache_interface, outputs, request, structured_output
    from vllm.v1.core.sched import async_scheduler, scheduler

    from xllm_plugin.scheduler import slo

    return SimpleNamespace(
        set_current_vllm_config=vllm.config.set_current_vllm_config,
        EngineArgs=arg_utils.EngineArgs,
        LoRARequest=lora.LoRARequest,
        SamplingParams=vllm.SamplingParams,
        AsyncScheduler=async_scheduler.AsyncScheduler,
        Scheduler=scheduler.Scheduler,
        FullAttentionSpec=kv_cache_interface.FullAttentionSpec,
        KVCacheConfig=kv_cache_interface.KVCacheConfig,
        KVCacheGroupSpec=kv_cache_interface.KVCacheGroupSpec,
        ModelRunnerOutput=outputs.ModelRunnerOutput,
        Request=request.Request,
        RequestStatus=request.RequestStatus,
        StructuredOutputManager=structured_output.StructuredOutputManager,
        SloPolicy=slo.SloPolicy,
    )


class Engine:
    """vLLM's loop over a scheduler: `depth` steps may be under way when one more is scheduled."""

    def __init__(self, vllm: Any, *, depth: int, max_loras: int | None) -> None:
        self.vllm, self.depth, self.now_s = vllm, depth, 100.0
        self.scheduler = self._scheduler(max_loras)
        self.policy: Any = vllm.SloPolicy(
            self.scheduler,
            SchedulerConfig(policy="slo", max_wait_s=5.0),
            clock=lambda: self.now_s,
            wall_clock=lambda: 0.0,
        )
        self.open: deque[tuple[int, Any, set[str]]] = deque()
        self.num_steps = 0
        self.num_tokens: dict[str, int] = {}

    def _scheduler(self, max_loras: int | None) -> Any:
        vllm = self.vllm
        options: dict[str, Any] = {"enable_lora": True, "max_loras": max_loras} if max_loras else {}
        config = vllm.EngineArgs(
            model=str(prepare("tiny-llama")),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=MAX_TOKENS,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=False,
            async_scheduling=bool(self.depth),
            **options,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        spec = vllm.FullAttentionSpec(
            block_size=BLOCK_TOKENS,
            num_kv_heads=1,
            head_size=16,
            dtype=config.model_config.dtype,
        )
        groups = [vllm.KVCacheGroupSpec(["layer"], spec)]
        with vllm.set_current_vllm_config(config):
            return (vllm.AsyncScheduler if self.depth else vllm.Scheduler)(
                vllm_config=config,
                kv_cache_config=vllm.KVCacheConfig(NUM_BLOCKS, [], groups),
                structured_output_manager=vllm.StructuredOutputManager(config),
                block_size=BLOCK_TOKENS,
                log_stats=False,
            )

    def add(self, name: str, num_prompt: int, num_output: int, adapter: int, **args: Any) -> None:
        vllm = self.vllm
        request = vllm.Request(
            request_id=name,
            prompt_token_ids=list(range(num_prompt)),
            sampling_params=vllm.SamplingParams(
                max_tokens=num_output, ignore_eos=True, extra_args=args or None
            ),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=vllm.LoRARequest(f"a{adapter}", adapter, "nowhere") if adapter else None,
        )
        self.policy.add(request)
        self.scheduler.add_request(request)
        self.num_tokens[name] = 0

    def abort(self, name: str) -> None:
        finished = self.scheduler.finish_requests(name, self.vllm.RequestStatus.FINISHED_ABORTED)
        self.policy.forget(finished)

    def step(self) -> int:
        """Tokens that were scheduled; the oldest step ends if as many are open as may be."""
        with self.policy.planned():
            output = self.scheduler.schedule()
        num = int(output.total_num_scheduled_tokens)
        self.num_steps += num > 0
        self.policy.record_scheduled(output, self.num_steps if num else 0)
        if num:
            known = self.scheduler.requests
            loras = [known[name].lora_request for name in output.num_scheduled_tokens]
            assert all(loras) or not any(loras), "without an adapter, and with somebody's on a CPU"
            # A prompt that is not read to its end gets no token.
            sampling = {n for n in output.num_scheduled_tokens if not known[n].is_prefill_chunk}
            self.open.append((self.num_steps, output, sampling))
        if self.open and (len(self.open) > self.depth or not num):
            self._end(*self.open.popleft())
        return num

    def _end(self, number: int, output: Any, sampling: set[str]) -> None:
        self.now_s += (5 + 0.2 * output.total_num_scheduled_tokens) / 1e3
        names = list(output.num_scheduled_tokens)
        sampled = [[7] if name in sampling else [] for name in names]
        result = self.vllm.ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        outputs = self.scheduler.update_from_output(output, result)
        self.policy.record_step(StepMessage(number), outputs, StepStamp(number, 1.0))
        for client in outputs.values():
            for made in client.outputs:
                self.num_tokens[made.request_id] += len(made.new_token_ids)

    def drain(self, most_steps: int = 20_000) -> None:
        for _ in range(most_steps):
            if not (self.scheduler.has_unfinished_requests() or self.open):
                return
            self.step()
        raise AssertionError(f"somebody starves: {self.scheduler.get_request_counts()}")


@pytest.mark.parametrize("max_loras", [None, 1, 2])
@pytest.mark.parametrize("depth", [0, 1], ids=["in turn", "ahead"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes_everybody_gets_its_tokens(
    vllm: Any, depth: int, max_loras: int | None, seed: int
) -> None:
    engine, rng = Engine(vllm, depth=depth, max_loras=max_loras), random.Random(seed)
    asked: dict[str, int] = {}
    aborted = set()
    for number in range(60):
        name, num_output = f"r{number}", rng.randint(1, 40)
        promise = {
            "xllm_ttft_ms": rng.choice([20, 300, 1000]),
            "xllm_tpot_ms": rng.choice([5, 20, 50]),
            "xllm_class": rng.choice(CLASSES),
        }
        adapter = rng.randint(0, 3) if max_loras else 0
        engine.add(name, rng.randint(1, 300), num_output, adapter, **promise)
        asked[name] = num_output
        for _ in range(rng.choice([0, 0, 3, 10])):
            engine.step()
        if rng.random() < 0.1:
            gone = rng.choice([n for n in asked if n not in aborted])
            engine.abort(gone)
            aborted.add(gone)
    engine.drain()
    got = {name: num for name, num in engine.num_tokens.items() if name not in aborted}
    assert got == {name: num for name, num in asked.items() if name not in aborted}
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == NUM_BLOCKS - 1, "block 0 is nobody's"
    assert not engine.policy._requests
    assert not engine.policy._steps
    snapshot = engine.policy.snapshot()
    assert sum(snapshot.num_held.values()) > 0, "plans changed something"
