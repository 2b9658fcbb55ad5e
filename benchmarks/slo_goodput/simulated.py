"""Goodput on a simulated engine: the planner against vLLM's own orders, at recorded lengths.

``python benchmarks/slo_goodput/simulated.py`` prints the highest rate at which 90 % keep a promise,
for each side and promise, in minutes, without a model.  Arrivals and lengths are those of the
benchmark; the device is a law fitted to what `benchmarks/step` measured.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.bench.promises import Promise, parse_promises
from xllm_plugin.bench.traces import Lengths, read_lengths
from xllm_plugin.scheduler.config import SchedulerConfig
from xllm_plugin.scheduler.plan import Limits, make_plan
from xllm_plugin.scheduler.predictor import (
    DeviceSpeed,
    ModelShape,
    StepShape,
    StepTimeLearner,
    Work,
)
from xllm_plugin.scheduler.step_limit import max_step_ms
from xllm_plugin.testing.simulator import (
    Policy,
    SimulatedEngine,
    SimulatedRequest,
    plan_fcfs,
    plan_shortest_first,
)

DATA = Path(__file__).parents[1] / "serving" / "data"
SHORTEN, MAX_INPUT, MAX_OUTPUT = 8.0, 1536, 256
WINDOW_S, GIVE_UP_MARGIN_S = 16.0, 0.5
SLOW_STEPS = 0.02
WITH_PROMPTS = 0.5
GOAL = 0.9
DEFAULT_TTFT_MS = SchedulerConfig().ttft_ms  # as served: no side of the benchmark sets another
PROMISES = "1000/50,500/35,4000/100"
# SmolLM2-135M in bfloat16, as the scheduler's prior has it.
WORK = Work.of(
    ModelShape(
        weight_bytes=270e6, flops_per_token=270e6, kv_bytes_per_token=23040, flops_per_pair=69120
    ),
    DeviceSpeed(bytes_per_s=20e9, flops_per_s=3e11),
)


@dataclass(frozen=True, slots=True)
class Side:
    """A scheduler: how it plans, and vLLM's ``max_num_batched_tokens``."""

    policy: Policy
    max_tokens: int = 2048


SIDES = {
    "fcfs": Side(plan_fcfs),
    "fcfs-256": Side(plan_fcfs, 256),
    "fcfs-64": Side(plan_fcfs, 64),
    "priority": Side(plan_shortest_first),
    "slo": Side(make_plan),
}


def step_ms(step: StepShape) -> float:
    """Two cores, native layers: within 10 % of every step in `benchmarks/step/README.md`."""
    return (
        10.5
        + 0.58 * step.num_tokens
        + 0.35 * step.num_sequences
        + 7e-4 * step.context_tokens
        + 1.68e-4 * step.prefill_pairs
    )


def noisy(seed: str, noise: float) -> Callable[[StepShape], float]:
    """The device with neighbours: single steps scatter, one in 50 is slow, and the pace drifts."""
    rng = random.Random(f"noise:{seed}")
    pace = [0.0]

    def duration_ms(step: StepShape) -> float:
        pace[0] = 0.98 * pace[0] + rng.gauss(0, noise / 5)
        slow = rng.uniform(1.5, 3) if noise and rng.random() < SLOW_STEPS else 1.0
        return step_ms(step) * math.exp(pace[0] + rng.gauss(0, noise)) * slow

    return duration_ms


@functools.cache
def taught(noise: float) -> StepTimeLearner:
    """A learner that has served the warm-up."""
    learner, rng, device = StepTimeLearner(WORK), random.Random(0), noisy("warm-up", noise)
    for _ in range(300):
        rows = rng.choice((0, 1, 4, 8, 16))
        step = StepShape().with_decodes(rows, rows * rng.randint(50, 400))
        if not rows or rng.random() < WITH_PROMPTS:
            step = step.with_prefill(rng.randint(16, 600), rng.choice((0, 0, 256)))
        learner.observe(step, device(step))
    return learner


@functools.cache
def traces() -> tuple[tuple[Lengths, ...], ...]:
    """Recorded lengths of conversations and of code."""
    return tuple(read_lengths(DATA / f"azure-{name}.jsonl") for name in ("conv", "code"))


def requests(rate: float, seed: int, promise: Promise) -> Iterator[SimulatedRequest]:
    """The benchmark's traffic: bursts, and lengths of both traces in turn, divided by 8."""
    rng = random.Random(f"lengths:{seed}")
    for number, due_s in enumerate(Bursts().arrivals(rate, WINDOW_S, seed)):
        recorded = rng.choice(traces()[number % 2])
        lengths = Lengths(
            round(recorded.input_tokens / SHORTEN), round(recorded.output_tokens / SHORTEN)
        ).clipped(MAX_INPUT, MAX_OUTPUT)
        yield SimulatedRequest(
            f"r{number}",
            due_s,
            lengths.input_tokens,
            lengths.output_tokens,
            promise.ttft_ms,
            promise.tpot_ms,
        )


def trial(
    side: Side, rate: float, seed: int, promise: Promise, noise: float, *, runs_ahead: bool = False
) -> list[SimulatedRequest]:
    """What became of one trial's requests; who has lost its promise is ended as there."""
    asked = sorted(requests(rate, seed, promise), key=lambda r: r.arrival_s)
    limits = Limits(
        max_sequences=128,
        max_tokens=side.max_tokens,
        max_step_ms=max_step_ms(DEFAULT_TTFT_MS, [promise.ttft_ms], runs_ahead=runs_ahead),
    )
    engine = SimulatedEngine(
        noisy(str(seed), noise), WORK, limits, policy=side.policy, runs_ahead=runs_ahead
    )
    engine.learner = copy.deepcopy(taught(noise))
    left = asked[::-1]
    while left or engine.running or engine.waiting:
        while left and left[-1].arrival_s <= engine.now_s:
            engine.add(left.pop())
        if engine.now_s >= WINDOW_S:
            for request in [*engine.running, *engine.waiting]:
                latest_s = request.arrival_s + promise.latest_end_s(request.output_tokens)
                if engine.now_s > latest_s + GIVE_UP_MARGIN_S:
                    engine.abort(request)
        is_idle = not (engine.step() or engine.running or engine.waiting)
        if is_idle and left:
            engine.now_s = max(engine.now_s, left[-1].arrival_s)
    return asked


def attainment(
    name: str, rate: float, promise: Promise, *, seeds: int, noise: float, runs_ahead: bool = False
) -> float:
    """Share of the requests of some trials that kept the promise."""
    found = [
        request.kept_promise
        for seed in range(seeds)
        for request in trial(SIDES[name], rate, seed, promise, noise, runs_ahead=runs_ahead)
    ]
    return sum(found) / len(found)


def goodput(
    name: str, promise: Promise, *, seeds: int, noise: float, runs_ahead: bool = False
) -> float:
    """The highest rate, in requests a second, at which the goal is met; interpolated."""
    ladder = Ladder.between(0.5, 32.0, 1.12)
    found = ladder.search(
        lambda rung: attainment(
            name, ladder.value(rung), promise, seeds=seeds, noise=noise, runs_ahead=runs_ahead
        ),
        goal=GOAL,
        start=ladder.nearest(3.0),
        most=9,
    )
    assert found is not None
    return ladder.crossing(found, GOAL).value


def main() -> None:
    """Search all sides and promises that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--promises", default=PROMISES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.06, help="of a step, relative")
    parser.add_argument("--runs-ahead", action="store_true", help="asynchronous scheduling")
    asked = parser.parse_args()
    for promise in parse_promises(asked.promises):
        found = {
            name: goodput(
                name, promise, seeds=asked.seeds, noise=asked.noise, runs_ahead=asked.runs_ahead
            )
            for name in asked.sides.split(",")
        }
        best = max((value for name, value in found.items() if name != "slo"), default=math.nan)
        told = "  ".join(f"{name} {value:.2f}" for name, value in found.items())
        ratio = found["slo"] / best if "slo" in found and best > 0 else math.nan
        click.echo(f"{promise}: {told}  slo / best static {ratio:.2f}")


if __name__ == "__main__":
    main()
