"""The policy around a stand-in for vLLM's scheduler: plans come into force, and are taken back."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from xllm_plugin import shims
from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler.config import SchedulerConfig
from xllm_plugin.scheduler.predictor import StepModel, Work
from xllm_plugin.scheduler.trace import read_trace
from xllm_plugin.worker.messages import StepMessage, StepStamp
from xllm_plugin.worker.resumed import RESUMED_ARG

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

WORK = Work(weight_ms=10, token_ms=0.2, kv_token_ms=0, pair_ms=0, overhead_ms=64)
# 10 ms, 1 ms a row and 0.2 ms a token.
MODEL = StepModel(work=WORK, factors=(0, 0, 1, 0, 0, 1, 1, 0), error=0.0, num_samples=100)


@pytest.fixture(scope="module")
def vllm() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from vllm.v1.core.sched import interface, request_queue

    from xllm_plugin.scheduler import prior, slo

    return SimpleNamespace(interface=interface, queue=request_queue, slo=slo, prior=prior)


class Asked(SimpleNamespace):
    """Goes into sets, as vLLM's request does."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def request(name: str, prompt: int = 100, computed: int = 0, output: int = 0, **args: Any) -> Any:
    """As vLLM's, as far as the policy reads it."""
    return Asked(
        request_id=name,
        arrival_time=1000.0,
        priority=0,
        sampling_params=SimpleNamespace(extra_args=args),
        num_computed_tokens=computed,
        num_tokens=prompt + output,
        num_tokens_with_spec=prompt + output,
        num_output_tokens=output,
        num_output_placeholders=0,
        spec_token_ids=[],
        is_finished=lambda: False,
        lora_request=None,
        num_prompt_tokens=prompt,
        max_tokens=16,
    )


class Scheduler:
    """Holds what the policy reads and sets; `seen` is what `schedule` would have met."""

    def __init__(self, vllm: Any) -> None:
        parallel = SimpleNamespace(data_parallel_index=2)
        device = SimpleNamespace(device_type="cuda")
        self.vllm_config = SimpleNamespace(parallel_config=parallel, device_config=device)
        self.need_mamba_block_aligned_split = False
        self.cache_config = SimpleNamespace(enable_prefix_caching=False)
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[None])
        self.scheduler_config = SimpleNamespace(
            long_prefill_token_threshold=0, async_scheduling=False
        )
        pool = SimpleNamespace(num_gpu_blocks=1000, get_num_free_blocks=lambda: 900)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.block_size = 16
        self.max_num_active_reqs = 6
        self.max_num_scheduled_tokens = 512
        self.adaptive_long_prefill_threshold = True
        self.num_spec_tokens = 0
        self.num_waiting_for_streaming_input = 0
        self.requires_kv_delivery = False
        self.lora_config: Any = None
        self.pause_state = vllm.interface.PauseState.UNPAUSED
        self.prev_step_scheduled_req_ids: set[str] = set()
        self.kv_holding_waiting: list[Any] = []
        self.waiting = vllm.queue.FCFSRequestQueue()
        self.running: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.preempted: list[str] = []
        self.seen: dict[str, Any] = {}

    def has_unfinished_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def _request_blocks_can_be_freed(self, request: Any) -> bool:
        return not request.num_output_placeholders

    def _preempt_request(self, request: Any, now_s: float, *, drop_stale_output: bool) -> None:
        del now_s, drop_stale_output
        self.preempted.append(request.request_id)
        self.waiting.prepend_request(request)

    def look(self) -> None:
        """What stands there while vLLM schedules."""
        self.seen = {
            "running": [r.request_id for r in self.running],
            "waiting": [r.request_id for r in self.waiting],
            "joining": self.max_num_active_reqs - len(self.running),
            "tokens": self.max_num_scheduled_tokens,
            "chunk": self.scheduler_config.long_prefill_token_threshold,
        }

    def limits(self) -> tuple[Any, ...]:
        return (
            self.max_num_active_reqs,
            self.max_num_scheduled_tokens,
            self.adaptive_long_prefill_threshold,
            self.scheduler_config.long_prefill_token_threshold,
        )


class Rig:
    """A policy with a clock of ours over a stand-in scheduler."""

    def __init__(self, vllm: Any, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        monkeypatch.setattr(vllm.slo, "prior_work", lambda vllm_config: WORK)
        self.scheduler = Scheduler(vllm)
        self.now_s = 50.0
        self.policy = vllm.slo.SloPolicy(
            self.scheduler,
            SchedulerConfig(policy="slo", **config),
            clock=lambda: self.now_s,
            wall_clock=lambda: 1000.0,
        )
        self.policy._learner.model = MODEL

    def run(self, made: Any, first_token_s: float | None = None) -> Any:
        """Let a request run, its first token out at `first_token_s`."""
        self.policy.add(made)
        self.scheduler.requests[made.request_id] = made
        self.scheduler.running.append(made)
        tracked = self.policy._requests[made.request_id]
        tracked.first_token_s, tracked.num_tokens = first_token_s, made.num_output_tokens
        return made

    def wait(self, made: Any) -> Any:
        self.policy.add(made)
        self.scheduler.requests[made.request_id] = made
        self.scheduler.waiting.add_request(made)
        return made

    def plan(self) -> dict[str, Any]:
        with self.policy.planned():
            self.scheduler.look()
        return self.scheduler.seen


@pytest.fixture
def rig(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(vllm, monkeypatch)


def decoding(name: str, **args: Any) -> Any:
    return request(name, prompt=100, computed=100, output=1, **args)


def test_a_plan_is_in_force_while_vllm_schedules_and_no_longer(rig: Rig) -> None:
    rig.run(decoding("d"), first_token_s=50.04)  # due in 90 ms
    rig.wait(request("w", prompt=400))
    before = rig.scheduler.limits()
    # 88.2 ms less 10, two rows and one token; then 0.2 ms a token.
    assert rig.plan() == {
        "running": ["d"],
        "waiting": ["w"],
        "joining": 1,
        "tokens": 380,
        "chunk": 379,
    }
    assert rig.scheduler.limits() == before


def test_limits_return_and_held_requests_too_when_vllm_fails(rig: Rig) -> None:
    rig.run(decoding("d"), first_token_s=49.0)
    rig.run(decoding("o", xllm_class="offline"), first_token_s=50.0)
    rig.policy._learner.model = msgspec.structs.replace(MODEL, error=0.9)  # nothing is merged
    before = rig.scheduler.limits()

    def fail() -> None:
        with rig.policy.planned():
            assert [r.request_id for r in rig.scheduler.running] == ["d"]
            assert rig.scheduler.max_num_active_reqs <= before[0] - 1, "a held one counts"
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert [r.request_id for r in rig.scheduler.running] == ["d", "o"]
    assert rig.scheduler.limits() == before


def test_who_is_most_urgent_is_put_first(rig: Rig) -> None:
    for name, ttft_ms in (("slow", 9000), ("soon", 300), ("next", 500)):
        rig.wait(request(name, xllm_ttft_ms=ttft_ms))
    seen = rig.plan()
    assert seen["waiting"] == ["soon", "next", "slow"]
    assert seen["joining"] == 3
    rig.wait(request("urgent", xllm_ttft_ms=200, xllm_priority=-1))
    assert rig.plan()["waiting"][0] == "urgent"


def test_a_continued_stream_is_as_urgent_as_a_new_one(rig: Rig) -> None:
    """What it came with was sent from elsewhere: its next token is its first here."""
    rig.wait(request("new", xllm_ttft_ms=300))
    rig.wait(request("old", output=90, xllm_ttft_ms=200, **{RESUMED_ARG: [1] * 90}))
    assert rig.plan()["waiting"] == ["old", "new"]


def with_adapter(made: Any, number: int) -> Any:
    made.lora_request = SimpleNamespace(lora_int_id=number)
    return made


def test_a_step_has_the_adapters_that_it_has_room_for(rig: Rig) -> None:
    rig.scheduler.lora_config = SimpleNamespace(max_loras=1)
    rig.run(with_adapter(decoding("a"), 1), first_token_s=50.2)
    rig.run(with_adapter(decoding("b"), 2), first_token_s=50.0)
    rig.run(decoding("none"), first_token_s=50.1)
    rig.run(with_adapter(decoding("b2"), 2), first_token_s=50.3)
    rig.wait(with_adapter(request("w", prompt=10), 1))
    seen = rig.plan()
    assert (seen["running"], seen["joining"]) == (["b", "none", "b2"], 0)
    assert sorted(r.request_id for r in rig.scheduler.running) == ["a", "b", "b2", "none"]
    assert rig.policy.snapshot().num_held == {"online": 1, "offline": 0}
    rig.scheduler.requests["b"].num_output_tokens = 9  # it is ahead now
    rig.scheduler.requests["b2"].num_output_tokens = 9
    assert rig.plan()["running"] == ["none", "a"]


def test_on_a_cpu_requests_without_an_adapter_run_apart(rig: Rig) -> None:
    """vLLM's CPU operators would compute them with somebody's adapter."""
    rig.scheduler.lora_config = SimpleNamespace(max_loras=2)
    rig.policy._is_base_apart = True
    rig.run(with_adapter(decoding("a"), 1), first_token_s=50.0)
    rig.run(decoding("none"), first_token_s=50.1)
    rig.wait(request("w", prompt=10))
    seen = rig.plan()
    assert (seen["running"], seen["joining"]) == (["a"], 0)
    rig.scheduler.requests["a"].num_output_tokens = 9
    seen = rig.plan()
    assert (seen["running"], seen["joining"]) == (["none"], 1)


def test_on_a_cpu_they_run_apart_too_where_nothing_is_planned(rig: Rig, vllm: Any) -> None:
    rig.scheduler.lora_config = SimpleNamespace(max_loras=2)
    rig.policy._is_base_apart = True
    rig.scheduler.pause_state = vllm.interface.PauseState.PAUSED_NEW
    assert rig.plan()["joining"] == 1
    rig.run(with_adapter(decoding("a"), 1), first_token_s=50.0)
    rig.now_s += 0.1
    rig.run(decoding("none"), first_token_s=50.1)
    seen = rig.plan()
    assert (seen["running"], seen["joining"]) == (["a"], 0)


def test_adapters_are_counted_too_where_nothing_is_planned(rig: Rig, vllm: Any) -> None:
    rig.scheduler.lora_config = SimpleNamespace(max_loras=1)
    for number in (1, 2):
        rig.run(with_adapter(decoding(f"d{number}"), number), first_token_s=50.0)
    rig.scheduler.pause_state = vllm.interface.PauseState.PAUSED_NEW
    before = rig.scheduler.limits()
    seen = rig.plan()
    assert seen["running"] == ["d1"]
    assert seen["joining"] == 6 - 2, "a held one counts"
    assert [r.request_id for r in rig.scheduler.running] == ["d1", "d2"]
    assert rig.scheduler.limits() == before


def test_who_has_no_room_beside_a_held_one_waits_for_it(rig: Rig) -> None:
    """Else a prompt without blocks would take the step from who has them, again and again."""
    rig.scheduler.lora_config = SimpleNamespace(max_loras=1)
    rig.run(with_adapter(decoding("d"), 1), first_token_s=50.0)
    rig.wait(with_adapter(request("w", xllm_ttft_ms=40), 2))
    assert rig.plan()["running"] == []
    nothing = SimpleNamespace(num_scheduled_tokens={}, scheduled_encoder_inputs={})
    rig.policy.record_scheduled(nothing, 0)
    assert rig.plan()["running"] == ["d"]


def test_those_held_for_their_adapter_give_up_blocks_before_the_most_urgent(rig: Rig) -> None:
    """vLLM takes blocks from those that run alone: here from who runs."""
    rig.scheduler.lora_config = SimpleNamespace(max_loras=1)
    free = SimpleNamespace(num_gpu_blocks=1000, get_num_free_blocks=lambda: 0)
    rig.scheduler.kv_cache_manager.block_pool = free
    urgent = with_adapter(request("a", prompt=112, computed=112, output=1), 1)  # 7 full blocks
    rig.run(urgent, first_token_s=49.96)
    for number in range(3):
        made = with_adapter(request(f"b{number}", prompt=112, computed=112, output=1), 2)
        rig.run(made, first_token_s=50.0 + number / 100)
    assert rig.plan()["running"] == ["a"]
    assert rig.scheduler.preempted == ["b2"]
    assert [r.request_id for r in rig.scheduler.running] == ["a", "b0", "b1"]


def test_the_overdue_have_their_turn_whatever_their_adapter(rig: Rig) -> None:
    rig.scheduler.lora_config = SimpleNamespace(max_loras=1)
    rig.policy._admitted_since_overdue = 3
    rig.wait(with_adapter(request("old", xllm_ttft_ms=9000), 2))
    rig.now_s += 40.0
    for number in range(2):
        rig.wait(with_adapter(request(f"new{number}", xllm_ttft_ms=500), 1))
    seen = rig.plan()
    assert (seen["waiting"][0], seen["joining"]) == ("old", 1)
    nothing = SimpleNamespace(num_scheduled_tokens={}, scheduled_encoder_inputs={})
    rig.policy.record_scheduled(nothing, 0)
    rig.run(with_adapter(decoding("d"), 1), first_token_s=90.0)
    rig.plan()
    assert rig.policy._plan.admit == ("new0",)
    assert rig.policy._plan.turn is None, "it had no room, and its turn is still to come"


def test_a_step_scheduled_ahead_is_planned_for_when_it_begins(rig: Rig) -> None:
    rig.run(request("p", prompt=300))
    rig.scheduler.requests["p"].num_computed_tokens = 300
    output = SimpleNamespace(num_scheduled_tokens={"p": 300}, scheduled_encoder_inputs={})
    rig.policy._began_s = rig.now_s
    rig.policy.record_scheduled(output, 1)  # 71 ms
    rig.now_s += 0.001
    rig.run(decoding("d"), first_token_s=50.021)  # due at 50.071, as this step begins
    rig.wait(request("w", prompt=400))
    assert rig.plan()["joining"] == 0, "nothing fits before that"


def test_who_ends_with_the_step_under_way_binds_nobody(rig: Rig) -> None:
    ending = rig.run(decoding("d"), first_token_s=49.99)
    ending.num_output_placeholders, ending.num_computed_tokens = 1, 101
    ending.max_tokens = 2
    rig.wait(request("w", prompt=400))
    assert rig.plan()["tokens"] == 400
    ending.max_tokens = 3
    assert rig.plan()["tokens"] < 400


def test_who_ends_with_the_step_under_way_still_has_its_place(rig: Rig) -> None:
    for number in range(6):  # as many as there may be
        ending = rig.run(decoding(f"d{number}"), first_token_s=50.0)
    ending.num_output_placeholders, ending.num_computed_tokens = 1, 101
    ending.max_tokens = 2
    rig.wait(request("w", prompt=10))
    assert rig.plan()["joining"] == 0
    assert rig.policy._plan.admit == ()
    rig.scheduler.running.remove(ending)
    assert rig.plan()["joining"] == 1


def test_steps_get_shorter_for_requests_that_ask_for_less(rig: Rig) -> None:
    def limit() -> float:
        return float(rig.policy._limits.max_step_ms)

    assert limit() == 500.0
    rig.wait(request("slow", xllm_ttft_ms=9000))
    assert limit() == 500.0
    rig.wait(request("fast", xllm_ttft_ms=500))
    assert limit() == 250.0
    rig.wait(request("greedy", xllm_ttft_ms=1))
    assert limit() == 125.0, "but not as short as anybody may ask"
    for number in range(32):
        rig.wait(request(f"{number}"))
    assert limit() == 500.0
    rig.scheduler.scheduler_config.async_scheduling = True
    rig.wait(request("last"))
    assert limit() == 250.0, "it may wait for two steps"


def test_who_got_its_first_token_too_late_has_lost_its_promise(rig: Rig) -> None:
    rig.run(request("late", xllm_ttft_ms=100))
    rig.run(request("fine", xllm_ttft_ms=300))
    step(rig, 1, {"late": 100, "fine": 100}, 200.0)
    for made in rig.scheduler.running:
        made.num_tokens_with_spec, made.num_output_tokens = 101, 1
    late, fine = rig.policy._view(rig.now_s).running
    assert (late.is_lost, fine.is_lost) == (True, False)
    assert late.last_token_s == rig.now_s
    rig.scheduler.running.clear()  # both are preempted
    for request_id in ("late", "fine"):
        rig.scheduler.waiting.add_request(rig.scheduler.requests[request_id])
    preempted = {w.request_id: w.is_lost for w in rig.policy._view(rig.now_s).waiting}
    assert preempted == {"late": True, "fine": False}


def test_a_paused_engine_is_left_alone(rig: Rig, vllm: Any) -> None:
    rig.wait(request("w"))
    rig.scheduler.pause_state = vllm.interface.PauseState.PAUSED_NEW
    assert rig.plan()["tokens"] == 512
    assert rig.policy.snapshot().num_planned == 0


def test_an_engine_that_does_not_move_is_given_back_to_vllm(rig: Rig) -> None:
    rig.wait(request("w"))
    nothing = SimpleNamespace(num_scheduled_tokens={}, scheduled_encoder_inputs={})
    for _ in range(3):
        rig.plan()
        rig.policy.record_scheduled(nothing, 0)
    rig.plan()
    assert rig.policy.snapshot().num_planned == 3
    rig.plan()
    assert rig.policy.snapshot().num_planned == 4, "for one step"


def step(rig: Rig, number: int, scheduled: dict[str, int], duration_ms: float) -> None:
    """One step of `scheduled` tokens, of which every request gets one."""
    for name, num in scheduled.items():
        rig.scheduler.requests[name].num_computed_tokens += num
    output = SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_encoder_inputs={})
    rig.policy._began_s = rig.now_s
    rig.policy.record_scheduled(output, number)
    rig.now_s += duration_ms / 1e3
    outputs = [
        SimpleNamespace(request_id=name, new_token_ids=[7], finish_reason=None)
        for name in scheduled
    ]
    rig.policy.record_step(
        StepMessage(number), {0: SimpleNamespace(outputs=outputs)}, StepStamp(number, 1.0)
    )


def finish(rig: Rig, name: str) -> None:
    done = SimpleNamespace(request_id=name, new_token_ids=[], finish_reason="length")
    rig.policy.record_step(None, {0: SimpleNamespace(outputs=[done])}, None)


def test_steps_are_learned_with_all_that_a_request_waits_for(rig: Rig) -> None:
    rig.run(request("p", prompt=300))
    step(rig, 1, {"p": 300}, 80.0)
    snapshot = rig.policy.snapshot()
    assert snapshot.measured_ms == pytest.approx(80.0), "not the worker's 1 ms alone"
    assert snapshot.predicted_ms == pytest.approx(10 + 1 + 60)
    assert rig.policy.model().num_samples == 101


def test_slack_and_kept_promises_are_counted(rig: Rig) -> None:
    rig.run(request("a", xllm_tenant="t"))
    step(rig, 1, {"a": 100}, 200.0)
    for number in (2, 3, 4):
        step(rig, number, {"a": 1}, 60.0)
    del rig.scheduler.requests["a"]
    finish(rig, "a")
    snapshot = rig.policy.snapshot()
    assert sum(snapshot.slack_counts) == 4
    # 800 ms before its TTFT; then 10, 20 and 30 ms late.
    assert snapshot.slack_sum_ms == pytest.approx(800 - 10 - 20 - 30)
    (group,) = snapshot.attainment
    assert (group.tenant, group.num_finished, group.num_kept) == ("t", 1, 0)
    assert (group.num_ttft_missed, group.num_tpot_missed) == (0, 1)
    assert not rig.policy._requests


def test_offline_tokens_are_counted_and_have_no_slack(rig: Rig) -> None:
    rig.run(request("o", xllm_class="offline"))
    step(rig, 1, {"o": 100}, 200.0)
    snapshot = rig.policy.snapshot()
    assert snapshot.offline_tokens == 100
    assert sum(snapshot.slack_counts) == 0


def test_a_streaming_session_is_kept_from_turn_to_turn(rig: Rig) -> None:
    session = rig.run(request("s"))
    step(rig, 1, {"s": 100}, 20.0)
    finish(rig, "s")  # its turn; vLLM still knows it
    rig.now_s += 100.0
    rig.policy.add(session)
    tracked = rig.policy._requests["s"]
    assert (tracked.arrival_s, tracked.first_token_s) == (rig.now_s, None)
    rig.policy.forget([session])
    assert not rig.policy._requests


def test_a_cached_prefix_is_not_counted_as_work(rig: Rig) -> None:
    rig.scheduler.cache_config.enable_prefix_caching = True
    rig.scheduler.kv_cache_manager.get_computed_blocks = lambda request: (None, 64, 0)
    rig.wait(request("w", prompt=100))
    (view,) = rig.policy._view(rig.now_s).waiting
    assert (view.todo_tokens, view.computed_tokens) == (36, 64)


def test_a_promise_that_cannot_be_read_does_not_end_the_engine(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.wait(request("w", xllm_ttft_ms="soon"))
    assert "xllm_ttft_ms is 'soon'" in caplog.text
    assert rig.policy.snapshot().num_invalid == 1


def test_the_report_is_of_the_requests_it_was_told_of(rig: Rig) -> None:
    running = rig.run(decoding("d"), first_token_s=50.0)  # due in 50 ms
    running.num_computed_tokens += 1  # in a step that is under way
    rig.run(decoding("o", xllm_class="offline"), first_token_s=50.0)
    rig.wait(request("w", xllm_ttft_ms=200))
    rig.scheduler.running.append(decoding("stranger"))
    rig.scheduler.waiting.add_request(request("another"))
    report = rig.policy.report()
    assert (report.online.num_running, report.online.num_waiting) == (1, 1)
    assert (report.offline.num_running, report.offline.num_waiting) == (1, 0)
    assert report.online.least_slack_ms == pytest.approx(50)
    rig.now_s += 0.1
    report = rig.policy.report()
    assert (report.online.num_late, report.offline.num_late) == (1, 0)
    assert report.online.least_slack_ms == pytest.approx(-50)


def test_chunks_that_have_to_end_at_blocks_are_refused(rig: Rig, vllm: Any) -> None:
    rig.scheduler.need_mamba_block_aligned_split = True
    with pytest.raises(ConfigError, match="mamba-cache-mode"):
        vllm.slo.SloPolicy(rig.scheduler, SchedulerConfig(policy="slo"))


def test_time_between_steps_counts_while_somebody_waits_for_it(rig: Rig) -> None:
    rig.run(request("p", prompt=300))
    step(rig, 1, {"p": 300}, 80.0)
    rig.now_s += 0.005
    step(rig, 2, {"p": 1}, 20.0)
    assert rig.policy.snapshot().measured_ms == pytest.approx(105.0)
    rig.scheduler.running.clear()
    step(rig, 3, {"p": 1}, 10.0)
    rig.now_s += 60.0
    step(rig, 4, {"p": 1}, 10.0)
    assert rig.policy.snapshot().measured_ms == pytest.approx(125.0), "an idle minute does not"


def test_a_pause_is_no_step_s_time(rig: Rig) -> None:
    rig.run(request("p", prompt=300))
    step(rig, 1, {"p": 300}, 80.0)
    rig.policy.interrupt()
    rig.now_s += 600.0
    step(rig, 2, {"p": 1}, 20.0)
    assert rig.policy.snapshot().measured_ms == pytest.approx(100.0)


def test_the_queue_is_followed(rig: Rig) -> None:
    made = [rig.wait(request(name, prompt=100)) for name in "abc"]

    def seen() -> dict[str, int]:
        return {w.request_id: w.todo_tokens for w in rig.policy._view(rig.now_s).waiting}

    assert seen() == {"a": 100, "b": 100, "c": 100}
    rig.scheduler.waiting.remove_requests([made[1]])
    rig.wait(request("d", prompt=7))
    rig.scheduler.waiting.prepend_request(rig.scheduler.waiting.pop_request())
    assert seen() == {"a": 100, "c": 100, "d": 7}
    made[2].num_tokens += 1  # preempted, and a step in flight brings its token
    output = SimpleNamespace(request_id="c", new_token_ids=[7], finish_reason=None)
    rig.policy.record_step(None, {0: SimpleNamespace(outputs=[output])}, None)
    assert seen() == {"a": 100, "c": 101, "d": 7}
    rig.scheduler.waiting.remove_requests(made)
    rig.policy.forget(made)
    assert seen() == {"d": 7}


def test_a_prompt_of_one_token_has_room_for_drafts(rig: Rig) -> None:
    rig.scheduler.num_spec_tokens = 3
    rig.wait(request("w", prompt=1))
    assert rig.plan()["tokens"] == 4
    rig.wait(request("x", prompt=100))
    assert rig.plan()["tokens"] == 104


def test_steps_are_traced(vllm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    rig = Rig(vllm, monkeypatch, step_trace=path)
    rig.run(request("p", prompt=300))
    rig.run(decoding("o", xllm_class="offline"), first_token_s=50.0)
    rig.wait(request("w", prompt=400))
    rig.plan()
    step(rig, 1, {"p": 300}, 80.0)
    rig.policy.close()
    (traced,) = read_trace(path)
    assert (traced.step, traced.rank, traced.began_s) == (1, 2, 50.0)
    assert traced.shape.prefill_tokens == 300
    assert traced.measured_ms == pytest.approx(80.0)
    assert traced.worker_ms == 1.0
    assert traced.error == 0.0, "before it was learned"
    assert (traced.num_running, traced.num_waiting) == (2, 1)
