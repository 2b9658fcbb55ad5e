"""What can planning gain, on a simulated engine?  See README.md beside this file."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.commands import conclude, names_in, require_known
from xllm_plugin.bench.ladder import Ladder
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.promises import Promise, parse_promises
from xllm_plugin.bench.schema import Figure, Peer, Row
from xllm_plugin.bench.traces import Lengths, read_lengths
from xllm_plugin.bench.traffic import GIVE_UP_MARGIN_S
from xllm_plugin.bench.traffic_options import MAX_INPUT, MAX_OUTPUT, SHORTEN
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

NAME = "slo_simulated"
QUESTION = (
    "How many requests a second keep their promise on a simulated engine, under the planner and "
    "under vLLM's own orders?"
)
DATA = Path(__file__).parents[1] / "serving" / "data"
WINDOW_S = 16.0
SLOW_STEPS = 1 / 30
WITH_PROMPTS = 0.5
HIGHEST_RATE = 64.0
GOAL = 0.9
DEFAULT_TTFT_MS = SchedulerConfig().ttft_ms  # as served: no side of the benchmark sets another
PROMISES, QUICK_PROMISES = "1000/50,500/35,4000/100", "1000/50"
SEEDS, QUICK_SEEDS = 6, 1
# SmolLM2-135M in bfloat16, as the scheduler's prior has it.
WORK = Work.of(
    ModelShape(
        weight_bytes=270e6, flops_per_token=270e6, kv_bytes_per_token=23040, flops_per_pair=69120
    ),
    DeviceSpeed(bytes_per_s=20e9, flops_per_s=3e11),
)


@dataclass(frozen=True, slots=True)
class Side:
    """A scheduler: what it is, how it plans, and vLLM's ``max_num_batched_tokens``."""

    what: str
    policy: Policy
    max_tokens: int = 2048


PLANNER = "slo"
SIDES = {
    "fcfs": Side("vLLM's order, first come first served", plan_fcfs),
    "fcfs-256": Side("the same, at most 256 tokens a step", plan_fcfs, 256),
    "fcfs-64": Side("the same, at most 64", plan_fcfs, 64),
    "priority": Side("vLLM's order by priority, shortest prompt first", plan_shortest_first),
    PLANNER: Side("the planner of `scheduler.policy=slo`, told the promise", make_plan),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all sides have in common.

    Attributes:
        seeds: trials at each rate.
        noise: of a step's time, relative.
        runs_ahead: asynchronous scheduling.
    """

    seeds: int
    noise: float
    runs_ahead: bool = False


def step_ms(step: StepShape) -> float:
    """Two cores that also run the API server and the client: 3,900 steps of a `step_trace`.

    Fitted to slo_goodput's traffic at 1000/50; four in five steps took 0.82 to 1.14 times this.
    """
    return 13.6 + 0.65 * step.num_tokens + 0.18 * step.num_sequences + 1.5e-4 * step.prefill_pairs


def noisy(seed: str, noise: float) -> Callable[[StepShape], float]:
    """The device with neighbours: single steps scatter, one in 30 is slow, and the pace drifts."""
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
    """The benchmark's traffic: bursts, and lengths of both traces in turn, shortened alike."""
    rng = random.Random(f"lengths:{seed}")
    for number, due_s in enumerate(Bursts().arrivals(rate, WINDOW_S, seed)):
        recorded = rng.choice(traces()[number % 2])
        lengths = recorded.shortened(SHORTEN).clipped(MAX_INPUT, MAX_OUTPUT)
        yield SimulatedRequest(
            f"r{number}",
            due_s,
            lengths.input_tokens,
            lengths.output_tokens,
            promise.ttft_ms,
            promise.tpot_ms,
        )


def trial(
    side: Side, rate: float, seed: int, promise: Promise, setting: Setting
) -> list[SimulatedRequest]:
    """What became of one trial's requests; who has lost its promise is ended as there."""
    asked = sorted(requests(rate, seed, promise), key=lambda r: r.arrival_s)
    limits = Limits(
        max_sequences=128,
        max_tokens=side.max_tokens,
        max_step_ms=max_step_ms(DEFAULT_TTFT_MS, [promise.ttft_ms], runs_ahead=setting.runs_ahead),
    )
    engine = SimulatedEngine(
        noisy(str(seed), setting.noise),
        WORK,
        limits,
        policy=side.policy,
        runs_ahead=setting.runs_ahead,
    )
    engine.learner = copy.deepcopy(taught(setting.noise))
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


def attainment(name: str, rate: float, promise: Promise, setting: Setting) -> float:
    """Share of the requests of some trials that kept the promise."""
    found = [
        request.kept_promise
        for seed in range(setting.seeds)
        for request in trial(SIDES[name], rate, seed, promise, setting)
    ]
    return sum(found) / len(found)


def goodput(name: str, promise: Promise, setting: Setting) -> float:
    """The highest rate, in requests a second, at which the goal is met; interpolated."""
    ladder = Ladder.between(0.5, HIGHEST_RATE, 1.12)
    found = ladder.search(
        lambda rung: attainment(name, ladder.value(rung), promise, setting),
        goal=GOAL,
        start=ladder.nearest(3.0),
        most=9,
    )
    assert found is not None
    return ladder.crossing(found, GOAL).value


def goodputs(
    names: tuple[str, ...],
    promises: tuple[Promise, ...],
    setting: Setting,
    reporter: Reporter,
) -> dict[Promise, dict[str, float]]:
    """What each side sustains, by promise."""
    found: dict[Promise, dict[str, float]] = {}
    for promise in promises:
        found[promise] = {}
        for name in names:
            reporter.doing(f"{promise} ms, {name}")
            found[promise][name] = goodput(name, promise, setting)
            reporter.done()
    return found


def rows(found: Mapping[Promise, Mapping[str, float]]) -> list[Row]:
    """A line a promise."""
    made = []
    for promise, values in found.items():
        figures = [Figure.of(name, "req/s", [value]) for name, value in values.items()]
        best = max((value for name, value in values.items() if name != PLANNER), default=0.0)
        if PLANNER in values and best > 0:
            figures.append(Figure.of("times the best static", "", [values[PLANNER] / best]))
        title = f"Highest request rate at which {GOAL:.0%} keep the promise"
        made.append(Row(table=title, labels={"promise, ms": str(promise)}, figures=tuple(figures)))
    return made


def notes(setting: Setting) -> tuple[str, ...]:
    """How to read the figures."""
    scheduling = "asynchronous" if setting.runs_ahead else "synchronous"
    return (
        (
            f"Trials of {WINDOW_S:g} s, {Bursts()}; each rate with {setting.seeds} seeds, the same "
            f"for all sides. Steps scatter by {setting.noise:.0%}; one in {1 / SLOW_STEPS:.0f} is "
            f"slow, and the pace drifts. Scheduling is {scheduling}."
        ),
        (
            "Between two rates of a ladder of ratio 1.12 the crossing is interpolated; none above "
            f"{HIGHEST_RATE:g} is tried. 'times the best static': of the sides but 'slo', chosen "
            "anew for each promise, after the fact."
        ),
    )


NOT_SHOWN = (
    "A server, network or client, and what planning costs the engine's thread.",
    "Another machine: the law of a step's time is fitted to two cores.",
)


@click.command(NAME)
@common_options(NAME, quick="One promise, one seed: does it work, not how fast.")
@click.option("--sides", default=",".join(SIDES), show_default=True, help="In this order.")
@click.option("--promises", help=f"TTFT/TPOT in milliseconds.  [default: {PROMISES}]")
@click.option(
    "--seeds", type=click.IntRange(min=1), help=f"Trials at each rate.  [default: {SEEDS}]"
)
@click.option(
    "--noise",
    type=click.FloatRange(min=0),
    default=0.08,
    show_default=True,
    help="Of a step's time, relative.",
)
@click.option("--runs-ahead", is_flag=True, help="Asynchronous scheduling.")
def command(
    *,
    quick: bool,
    json_path: Path,
    sides: str,
    promises: str | None,
    seeds: int | None,
    noise: float,
    runs_ahead: bool,
) -> None:
    """What can planning gain, on a simulated engine?

    Searches the highest rate at which 90 % keep a promise, for the planner and for vLLM's own
    orders, without a model.  Takes some minutes; with --quick seconds.
    """
    names = names_in(sides)
    require_known("sides", names, SIDES)
    judged = parse_promises(promises or (QUICK_PROMISES if quick else PROMISES))
    setting = Setting(seeds or (QUICK_SEEDS if quick else SEEDS), noise, runs_ahead)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    with Reporter(console, len(names) * len(judged), first="simulating") as reporter:
        found = goodputs(names, judged, setting, reporter)
    result = run.finish(
        peers=[Peer(name=name, what=SIDES[name].what) for name in names],
        rows=rows(found),
        notes=notes(setting),
        not_shown=NOT_SHOWN,
    )
    conclude(result, json_path, console)
