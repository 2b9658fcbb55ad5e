"""Where does a step's time go?  See README.md beside this file."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import beside, conclude, log_folder, model_folder
from xllm_plugin.bench.options import (
    command_line,
    common_options,
    keep_logs_option,
    model_option,
)
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import ConfigError, InternalError

FOLDER = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from benchmarks.step import floor, parts, sides
else:
    parts, floor, sides = (beside(FOLDER, name) for name in ("parts", "floor", "sides"))

NAME = "step"
QUESTION = "Where does the time of one engine step go, and how far is it from the machine's floor?"

BATCHES, QUICK_BATCHES = "1,4,8,16,32,64", "1,8"
PREFILLS, QUICK_PREFILLS = "256,512,1024,2048", "256"
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 40
PREFILLS_PER_REPEAT = 5
MAX_TOKENS_PER_STEP = 2048
MAX_MODEL_LEN = 2560
"""The longest prompt and its output token, with room to spare."""


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step."""

    kind: Literal["decode", "prefill"]
    size: int
    """Requests in the batch, or tokens of the prompt."""

    def __str__(self) -> str:
        if self.kind == "decode":
            return f"decode, batch {self.size}"
        return f"prefill, {self.size} tokens"

    @property
    def prompt_tokens(self) -> int:
        """Length of each prompt."""
        return PROMPT_TOKENS if self.kind == "decode" else self.size

    @property
    def num_prompts(self) -> int:
        """Prompts of one repeat."""
        return self.size if self.kind == "decode" else PREFILLS_PER_REPEAT

    def job(self, tokens: Sequence[int], repeat: int) -> dict[str, Any]:
        """What a side is asked; other random tokens every time, so that no prompt is cached."""
        rng = random.Random(f"{self}, repeat {repeat}")
        prompts = [rng.choices(tokens, k=self.prompt_tokens) for _ in range(self.num_prompts)]
        return {"do": self.kind, "prompts": prompts, "max_tokens": OUTPUT_TOKENS}

    def floor(self, work: floor.Work, machine: floor.Machine) -> floor.Floor:
        """The least it can take; a decode step's context is that of the middle one."""
        if self.kind == "prefill":
            return work.prefill(self.size, machine)
        return work.decode(self.size, PROMPT_TOKENS + OUTPUT_TOKENS // 2, machine)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of both sides."""

    model: Path
    vocabulary: Vocabulary
    points: tuple[Point, ...]
    repeats: int
    log_folder: Path

    def start_job(self) -> dict[str, Any]:
        """The engine's settings, and the shapes to touch before any is timed."""
        batches = [point.size for point in self.points if point.kind == "decode"]
        return sides.start_job(
            self.model,
            self.vocabulary,
            batches=batches,
            prefills=[point.size for point in self.points if point.kind == "prefill"],
            max_model_len=MAX_MODEL_LEN,
            max_tokens=MAX_TOKENS_PER_STEP,
        )


@dataclass(slots=True)
class Found:
    """What came out, gathered over the repeats."""

    machines: list[floor.Machine] = field(default_factory=list)
    steps: dict[tuple[Point, sides.Side], list[dict[str, float]]] = field(default_factory=dict)
    """For each repeat, milliseconds of each part of a typical step."""
    num_threads: dict[sides.Side, int] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def whole_ms(self, point: Point, side: sides.Side) -> list[float]:
        """The whole step, repeat by repeat."""
        return [sum(step.values()) for step in self.steps[point, side]]


def whole_rows(found: Found, points: Sequence[Point], work: floor.Work) -> list[Row]:
    """Every kind of step: floor, both sides, and their ratio within a repeat."""
    rows = []
    for point in points:
        stock, xllm = (found.whole_ms(point, side) for side in sides.SIDES)
        bounds = [point.floor(work, machine).bound_ms for machine in found.machines]
        figures = (
            Figure.of("floor", "ms", bounds),
            Figure.of("stock-best", "ms", stock),
            Figure.of("xllm", "ms", xllm),
            Figure.ratio("xllm / stock-best", xllm, stock),
            Figure.ratio("xllm / floor", xllm, bounds),
        )
        rows.append(Row(table="The whole step", labels={"step": str(point)}, figures=figures))
    return rows


def part_rows(found: Found, points: Sequence[Point]) -> list[Row]:
    """Every kind of step on either side, part by part."""
    return [
        Row(
            table="Its parts, ms",
            labels={"step": str(point), "peer": side},
            figures=tuple(
                Figure.of(part, "", [step[part] for step in found.steps[point, side]])
                for part in parts.PARTS
            ),
        )
        for point in points
        for side in sides.SIDES
    ]


def floor_rows(found: Found, points: Sequence[Point], work: floor.Work) -> list[Row]:
    """What the floor is made of."""
    rows = []
    for point in points:
        floors = [point.floor(work, machine) for machine in found.machines]
        figures = (
            Figure.of("reading the weights", "ms", [one.weights_ms for one in floors]),
            Figure.of("reading keys and values", "ms", [one.kv_ms for one in floors]),
            Figure.of("arithmetic", "ms", [one.arithmetic_ms for one in floors]),
        )
        rows.append(Row(table="The floor", labels={"step": str(point)}, figures=figures))
    return rows


def machine_rows(machines: Sequence[floor.Machine]) -> list[Row]:
    """What the floor is computed from."""
    read = [machine.read_bytes_per_s / 1e9 for machine in machines]
    flop = [machine.bf16_flop_per_s / 1e9 for machine in machines]
    figures = (Figure.of("reading", "GB/s", read), Figure.of("bf16 matmul", "GFLOP/s", flop))
    return [Row(table="The machine at its best", labels={"with": "all cores"}, figures=figures)]


def notes(plan: Plan, work: floor.Work, found: Found) -> tuple[str, ...]:
    """How to read the figures."""
    threads = ", ".join(f"{side} {count}" for side, count in found.num_threads.items())
    return (
        (
            f"Model {plan.model.name} in bf16, threads: {threads}. decode: prompts of "
            f"{PROMPT_TOKENS} random tokens, {OUTPUT_TOKENS} output tokens; only steps in which "
            f"all requests decode count. prefill: {PREFILLS_PER_REPEAT} prompts a repeat, one step "
            "each."
        ),
        (
            "A repeat's figure is the mean over the middle half of its steps. Each repeat starts "
            "both engines anew; they take turns point by point, the other one first each time; "
            "ratios are taken within a repeat."
        ),
        (
            "A part is the time in its own methods without that in other parts' "
            "(`benchmarks/step/parts.py` lists them); 'rest' is what is left of the step, so the "
            "parts of a repeat add up to its whole."
        ),
        (
            f"floor: the longer of reading ({work.weight_bytes / 1e6:.0f} MB of weights once, and "
            "the keys and values that are attended to) at the speed at which torch sums 1 GiB of "
            "integers, and of the model's multiplications and additions at torch's best rate on a "
            "square bf16 matmul; the best within 3 s, all cores, before each repeat."
        ),
    )


NOT_SHOWN = (
    (
        "What happens outside of the engine's step: detokenising, HTTP, and the way between the "
        "API server's process and the engine's."
    ),
    "Asynchronous scheduling, which does parts of two steps at once: it is off on both sides.",
    "Steps that mix prompts and decoding, and long contexts.",
    "What the timers cost: about 20 clock readings a step, some microseconds.",
)


@click.command(NAME)
@common_options(NAME)
@model_option
@click.option("--batches", help=f"Requests that decode together.  [default: {BATCHES}]")
@click.option("--prefills", help=f"Tokens of a prompt.  [default: {PREFILLS}]")
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@keep_logs_option
def command(
    *,
    quick: bool,
    json_path: Path,
    model: str,
    batches: str | None,
    prefills: str | None,
    repeats: int | None,
    keep_logs: Path | None,
) -> None:
    """Where does a step's time go, and how far is it from the machine's floor?

    Times the parts of an offline engine's steps, stock vLLM's and xllm's in turn.  Takes about a
    quarter of an hour; with --quick a few minutes.
    """
    points = (
        *(Point("decode", size) for size in sizes(batches or _of(quick, BATCHES, QUICK_BATCHES))),
        *(Point("prefill", n) for n in sizes(prefills or _of(quick, PREFILLS, QUICK_PREFILLS))),
    )
    require_fit(points)
    folder = model_folder(model)
    work = floor.Work.of_model(folder)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    with log_folder(keep_logs) as logs:
        vocabulary = Vocabulary.of_model(folder)
        plan = Plan(folder, vocabulary, points, repeats or (1 if quick else 3), logs)
        found = measure(plan, console)
    result = run.finish(
        peers=[sides.peer(side) for side in sides.SIDES],
        rows=[
            *whole_rows(found, points, work),
            *part_rows(found, points),
            *floor_rows(found, points, work),
            *machine_rows(found.machines),
        ],
        checks=found.checks,
        notes=notes(plan, work, found),
        not_shown=NOT_SHOWN,
        details={f"{point}, {side}": steps_ms for (point, side), steps_ms in found.steps.items()},
    )
    conclude(result, json_path, console)


def _of(quick: bool, full: str, short: str) -> str:
    return short if quick else full


def sizes(text: str) -> tuple[int, ...]:
    """Read `1,4,8` in rising order.  Raises `ConfigError` for anything else."""
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    if not wanted or not all(part.isdecimal() and int(part) > 0 for part in wanted):
        raise ConfigError(f"sizes {text!r}: write whole numbers above 0, e.g. 1,4,8")
    return tuple(sorted(int(part) for part in wanted))


def require_fit(points: Sequence[Point]) -> None:
    """Raise `ConfigError` for what the engine's settings here have no room for."""
    longest = max((point.size for point in points if point.kind == "prefill"), default=0)
    if longest > MAX_TOKENS_PER_STEP:
        raise ConfigError(
            f"--prefills {longest}: a step takes at most {MAX_TOKENS_PER_STEP} tokens here"
        )
    largest = max((point.size for point in points if point.kind == "decode"), default=0)
    if largest > MAX_BATCH:
        raise ConfigError(f"--batches {largest}: at most {MAX_BATCH} requests decode together here")


MAX_BATCH: Final = 64
"""The cache of `driver.py` holds so many requests."""


def measure(plan: Plan, console: Console) -> Found:
    """Run all repeats, both engines alive in each."""
    found = Found()
    total = plan.repeats * (2 + len(plan.points)) * len(sides.SIDES)
    with Reporter(console, total, first="measuring the machine") as reporter:
        for repeat in range(plan.repeats):
            found.machines.append(measure_machine(plan.log_folder))
            measure_repeat(plan, repeat, found, reporter)
    return found


def measure_machine(log_folder: Path) -> floor.Machine:
    """The best rates of this machine, in a process of its own."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "XLLM_PLATFORM": "native"}
    with sides.Child("the machine's measurement", threads, log_folder / "machine.log") as child:
        return floor.Machine(**child.ask({"do": "machine"}))


def measure_repeat(plan: Plan, repeat: int, found: Found, reporter: Reporter) -> None:
    """Start both engines, compare their outputs the first time, and take turns."""
    order = sides.SIDES if repeat % 2 == 0 else sides.SIDES[::-1]
    with contextlib.ExitStack() as stack:
        children = {}
        facts = {}
        for side in order:
            reporter.peer(side, repeat, plan.repeats)
            reporter.doing("starting the engine")
            log = plan.log_folder / f"{side}.{repeat + 1}.log"
            child = stack.enter_context(sides.Child(side, sides.environment(side), log))
            facts[side] = child.ask(plan.start_job(), timeout_s=sides.START_TIMEOUT_S)
            children[side] = child
            reporter.done()
        sides.require_fair(facts)
        found.num_threads = {side: facts[side]["num_threads"] for side in sides.SIDES}
        if not found.checks:
            stock, xllm = (children[side] for side in sides.SIDES)
            found.checks = [sides.compare_outputs(stock, xllm, plan.vocabulary)]
        reporter.done(len(children))
        for number, point in enumerate(plan.points):
            for side in order if number % 2 == 0 else order[::-1]:
                reporter.peer(side, repeat, plan.repeats)
                reporter.doing(str(point))
                answer = children[side].ask(point.job(plan.vocabulary.ordinary(), repeat))
                step = typical_step(point, answer)
                found.steps.setdefault((point, side), []).append(step)
                reporter.line(f"{point}: {sum(step.values()):.2f} ms")
                reporter.done()


def typical_step(point: Point, answer: Mapping[str, Any]) -> dict[str, float]:
    """The parts of a typical one of the steps that a side took."""
    steps = [parts.Step(tuple(one["tokens"]), one["parts_ms"]) for one in answer["steps"]]
    if not steps:
        raise InternalError(f"the engine took no step that was only {point}; please report this")
    return dict(parts.typical(steps))
