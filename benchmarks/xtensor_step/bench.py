"""What does elastic KV memory cost a step?  See README.md beside this file."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from xllm_plugin.bench.pairs import MIN_PAIRS, symmetric_interval
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import InternalError

STEP_FOLDER = Path(__file__).resolve().parents[1] / "step"

if TYPE_CHECKING:
    from benchmarks.step import parts, sides
else:
    parts, sides = (beside(STEP_FOLDER, name) for name in ("parts", "sides"))

NAME = "xtensor_step"
QUESTION = "What does elastic KV memory cost a step?"

Memory = Literal["fixed", "elastic", "contiguous"]
MEMORIES: Final[tuple[Memory, ...]] = ("fixed", "elastic", "contiguous")
POOLS: Final[Mapping[Memory, str]] = {
    "fixed": "BlockPool",
    "elastic": "ElasticBlockPool",
    "contiguous": "ContiguousBlockPool",
}
SETTINGS: Final[Mapping[Memory, Mapping[str, str]]] = {
    "fixed": {"XLLM_XTENSOR__ENABLED": "0"},
    "elastic": {"XLLM_XTENSOR__ENABLED": "1"},
    "contiguous": {"XLLM_XTENSOR__ENABLED": "1", "XLLM_XTENSOR__FORM": "contiguous"},
}

BATCHES, QUICK_BATCHES = (1, 8, 32), (1, 8)
STARTS, QUICK_STARTS = 20, 1
"""Two engines that are alike differ by 1 to 2 %, from start to end: by where their memory lies."""
CONTIGUOUS_STARTS = 2
"""Beside those: what no check is about has fewer."""
ROUNDS = 4
PAUSE_S = 0.01
"""Before a turn: OpenMP's threads spin on for some milliseconds after a step, in others' way."""
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 60
MAX_TOKENS_PER_STEP = 2048
MAX_MODEL_LEN = 512
WITHIN: Final = (0.98, 1.02)
"""Where the interval of the ratio has to lie."""


@dataclass(slots=True)
class Times:
    """Milliseconds of one batch size on the engines of one start, one entry a round, by memory."""

    step_ms: dict[Memory, list[float]] = field(default_factory=dict)
    run_ms: dict[Memory, list[float]] = field(default_factory=dict)

    def record(self, memory: Memory, batch: int, steps: Sequence[parts.Step]) -> None:
        """Take in one run: a typical step of it, and all its steps together."""
        decodes = [step for step in steps if step.is_decode(batch)]
        if not decodes:
            raise InternalError("no step had the whole batch decoding; please report this")
        self.step_ms.setdefault(memory, []).append(sum(parts.typical(decodes).values()))
        self.run_ms.setdefault(memory, []).append(sum(step.whole_ms for step in steps))


Kind = Literal["step_ms", "run_ms"]
TimesByBatch = Mapping[int, Sequence[Times]]
"""By batch size: the times of each start."""


def ratios(starts: Sequence[Times], kind: Kind, memory: Memory) -> list[float]:
    """A memory's times over those of the fixed one: of each start the median of its rounds."""
    return [
        statistics.median(
            b / a
            for a, b in zip(
                getattr(times, kind)["fixed"], getattr(times, kind)[memory], strict=True
            )
        )
        for times in starts
        if memory in getattr(times, kind)
    ]


def ratio_interval(quotients: Sequence[float]) -> tuple[float, float]:
    """Where the true ratio lies."""
    low, high = symmetric_interval([math.log(one) for one in quotients])
    return math.exp(low), math.exp(high)


def rows(found: TimesByBatch) -> list[Row]:
    """Each batch size: the times, and their ratios to the fixed one's with their interval."""
    made = []
    kinds: Mapping[str, Kind] = {
        "A step in which all decode": "step_ms",
        "All steps of a run": "run_ms",
    }
    for table, kind in kinds.items():
        for batch, starts in found.items():
            for memory in MEMORIES:
                times_ms = [ms for times in starts for ms in getattr(times, kind).get(memory, ())]
                figures = [Figure.of("time", "ms", times_ms)]
                if memory != "fixed":
                    figures += compared(ratios(starts, kind, memory))
                labels = {"requests": str(batch), "memory": memory}
                made.append(Row(table=table, labels=labels, figures=tuple(figures)))
    return made


def compared(quotients: Sequence[float]) -> list[Figure]:
    """The ratios, and their interval if there are enough of them."""
    figures = [Figure.of("ratio to fixed, by start", "", quotients)]
    if len(quotients) >= MIN_PAIRS:
        low, high = ratio_interval(quotients)
        figures.append(Figure.of("95 % interval from", "", [low]))
        figures.append(Figure.of("95 % interval to", "", [high]))
    return figures


def checks(found: TimesByBatch, *, is_quick: bool) -> list[Check]:
    """The interval of a step's ratio lies within the bounds; a quick run is too short to say.

    Only for the default form: what `contiguous` costs is told, not promised.
    """
    if is_quick:
        return []
    made = []
    for batch, starts in found.items():
        low, high = ratio_interval(ratios(starts, "step_ms", "elastic"))
        made.append(
            Check(
                name=f"elastic, a step of {batch}: {WITHIN[0]:g} to {WITHIN[1]:g} times",
                passed=WITHIN[0] <= low and high <= WITHIN[1],
                detail=f"{low:.3f} to {high:.3f}",
            )
        )
    return made


def environment(memory: Memory) -> dict[str, str]:
    """What a side's process has beyond this one's cleaned environment."""
    return {**sides.environment("xllm"), **SETTINGS[memory]}


def peer(memory: Memory) -> schema.Peer:
    """One side as a result tells it."""
    return schema.Peer(
        name=memory,
        what=f"one offline engine of this plugin, its KV cache {memory}",
        command=("python", "benchmarks/step/driver.py"),
        environment=environment(memory),
    )


def run_job(tokens: Sequence[int], batch: int, number: int) -> dict[str, Any]:
    """One run; all of a round get the same prompts, and no two rounds do."""
    rng = random.Random(f"{batch} requests, round {number}")
    prompts = [rng.choices(tokens, k=PROMPT_TOKENS) for _ in range(batch)]
    return {"do": "begin", "prompts": prompts, "max_tokens": OUTPUT_TOKENS}


def take_turns(
    children: Mapping[Memory, sides.Child],
    job: Mapping[str, Any],
    order: Sequence[Memory],
    sleep: Callable[[float], None] = time.sleep,
) -> dict[Memory, list[parts.Step]]:
    """The same requests on all engines, a step here and a step there; the steps of each."""
    steps: dict[Memory, list[parts.Step]] = {memory: [] for memory in order}
    for memory in order:
        children[memory].ask(job)
    going = list(order)
    while going:
        for memory in tuple(going):
            sleep(PAUSE_S)
            # One step, so that what else the machine does meets both sides of a round alike.
            answer = children[memory].ask({"do": "go_on", "num_steps": 1})
            steps[memory] += [
                parts.Step(tuple(one["tokens"]), one["parts_ms"]) for one in answer["steps"]
            ]
            if not answer["has_more"]:
                going.remove(memory)
    return steps


def in_turn(memory: Memory, number: int) -> tuple[Memory, Memory]:
    """A memory and the fixed one: each comes first every other time."""
    return (memory, "fixed") if number % 2 else ("fixed", memory)


def memories_of(num_starts: int) -> list[Memory]:
    """What each start is about, beside the fixed memory; `contiguous` comes last."""
    about: list[Memory] = ["elastic"] * num_starts
    about += ["contiguous"] * min(CONTIGUOUS_STARTS, num_starts)
    return about


def measure(
    children: Mapping[Memory, sides.Child],
    tokens: Sequence[int],
    batches: Sequence[int],
    rounds: range,
    reporter: Reporter,
) -> dict[int, Times]:
    """Run the rounds of one start; each goes through its memories the other way round."""
    found = {batch: Times() for batch in batches}
    memory = next(memory for memory in children if memory != "fixed")
    for number in rounds:
        order = in_turn(memory, number)
        for batch, times in found.items():
            reporter.doing(f"{batch} requests")
            taken = take_turns(children, run_job(tokens, batch, number), order)
            for side, steps in taken.items():
                times.record(side, batch, steps)
            reporter.done()
    return found


def notes(model: Path, num_starts: int) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"Model {model.name} in bf16; prompts of {PROMPT_TOKENS} random tokens, "
            f"{OUTPUT_TOKENS} output tokens. {num_starts} starts of a fixed and an elastic engine, "
            f"{min(CONTIGUOUS_STARTS, num_starts)} of a fixed and a contiguous one, of {ROUNDS} "
            "rounds each, the same prompts for both engines of a round; they take turns of one "
            f"step, {1e3 * PAUSE_S:g} ms after the other's, in the other order in each round. "
            "Ratios are taken within a round; of a start counts the median."
        ),
        (
            "A step in which all decode: the mean over the middle half of a run's steps. All steps "
            "of a run: their sum, prompts included; there memory is committed."
        ),
        (
            "The interval holds the true ratio with 95 % confidence, by the signed-rank test over "
            "the starts: it takes for granted that the luck of a start is as good for either side."
        ),
    )


NOT_SHOWN = (
    "What happens outside of the engine's step.",
    "A budget that is short, so that slabs come and go while requests run.",
    "Asynchronous scheduling.",
)


@click.command(NAME)
@common_options(NAME)
@model_option
@click.option("--starts", type=click.IntRange(min=MIN_PAIRS), help=f"[default: {STARTS}]")
@keep_logs_option
def command(
    *, quick: bool, json_path: Path, model: str, starts: int | None, keep_logs: Path | None
) -> None:
    """What does elastic KV memory cost a step?

    Times the steps of two offline engines in turn, one of them without xtensor.enabled, the other
    with it or with xtensor.form=contiguous.  Takes about 45 minutes; with --quick two.
    """
    batches = QUICK_BATCHES if quick else BATCHES
    num_starts = starts or (QUICK_STARTS if quick else STARTS)
    folder = model_folder(model)
    vocabulary = Vocabulary.of_model(folder)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    found: dict[int, list[Times]] = {batch: [] for batch in batches}
    about = memories_of(num_starts)
    total = len(about) * (2 + ROUNDS * len(batches)) + 2
    equal: dict[Memory, Check] = {}
    job = sides.start_job(
        folder,
        vocabulary,
        batches=batches,
        max_model_len=MAX_MODEL_LEN,
        max_tokens=MAX_TOKENS_PER_STEP,
    )
    with (
        log_folder(keep_logs) as logs,
        Reporter(console, total, first="starting the engines") as reporter,
    ):
        for number, memory in enumerate(about):
            reporter.peer(memory, number, len(about))
            with started(job, in_turn(memory, number), logs / str(number), reporter) as children:
                if memory not in equal:
                    equal[memory] = sides.compare_outputs(
                        children["fixed"], children[memory], vocabulary
                    )
                    reporter.done()
                rounds = range(number * ROUNDS, (number + 1) * ROUNDS)
                times = measure(children, vocabulary.ordinary(), batches, rounds, reporter)
            for batch in batches:
                found[batch].append(times[batch])
    result = run.finish(
        peers=[peer(memory) for memory in MEMORIES],
        rows=rows(found),
        checks=[*equal.values(), *checks(found, is_quick=quick)],
        notes=notes(folder, num_starts),
        not_shown=NOT_SHOWN,
        details={
            f"{batch} requests": [
                {"step_ms": times.step_ms, "run_ms": times.run_ms} for times in starts_of
            ]
            for batch, starts_of in found.items()
        },
    )
    conclude(result, json_path, console)


@contextlib.contextmanager
def started(
    job: Mapping[str, Any], order: Sequence[Memory], logs: Path, reporter: Reporter
) -> Iterator[dict[Memory, sides.Child]]:
    """Engines of these memories, started side by side, for the length of a `with` block."""
    with contextlib.ExitStack() as stack:
        children: dict[Memory, sides.Child] = {}
        for memory in order:
            log = logs / f"{memory}.log"
            children[memory] = stack.enter_context(sides.Child(memory, environment(memory), log))
            children[memory].send(job)
        for memory, child in children.items():
            require(memory, child.receive(sides.START_TIMEOUT_S, to="start"))
            reporter.done()
        yield children


def require(memory: Memory, facts: Mapping[str, Any]) -> None:
    """Raise `InternalError` unless the engine's KV cache is what was asked for."""
    if facts["block_pool"] != POOLS[memory]:
        raise InternalError(
            f"asked for {memory} KV memory, and the engine has a {facts['block_pool']}; please "
            "report this"
        )
