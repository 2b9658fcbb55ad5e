"""What does elastic KV memory cost a step?  See README.md beside this file."""

from __future__ import annotations

import contextlib
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
from xllm_plugin.bench.pairs import MIN_PAIRS, interval
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

Memory = Literal["fixed", "elastic"]
MEMORIES: Final[tuple[Memory, ...]] = ("fixed", "elastic")
POOLS: Final[Mapping[Memory, str]] = {"fixed": "BlockPool", "elastic": "ElasticBlockPool"}

BATCHES, QUICK_BATCHES = (1, 8, 32), (1, 8)
PAIRS, QUICK_PAIRS = 24, 8
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 40
MAX_TOKENS_PER_STEP = 2048
MAX_MODEL_LEN = 512
WITHIN: Final = (0.98, 1.02)
"""Where the interval of the ratio has to lie."""


@dataclass(slots=True)
class Times:
    """Milliseconds of one batch size, one entry a pair, by memory."""

    step_ms: dict[Memory, list[float]] = field(default_factory=lambda: {m: [] for m in MEMORIES})
    run_ms: dict[Memory, list[float]] = field(default_factory=lambda: {m: [] for m in MEMORIES})

    def record(self, memory: Memory, answer: Mapping[str, Any]) -> None:
        """Take in one run: a typical step of it, and all its steps together."""
        steps = [parts.Step(tuple(one["tokens"]), one["parts_ms"]) for one in answer["steps"]]
        if not steps:
            raise InternalError("no step had the whole batch decoding; please report this")
        self.step_ms[memory].append(sum(parts.typical(steps).values()))
        self.run_ms[memory].append(answer["all_ms"])


def ratios(times: Mapping[Memory, Sequence[float]]) -> list[float]:
    """Elastic over fixed, pair by pair."""
    return [b / a for a, b in zip(times["fixed"], times["elastic"], strict=True)]


def rows(found: Mapping[int, Times]) -> list[Row]:
    """Each batch size: both times, their ratio, and where its median lies."""
    made = []
    for table, kind in (
        ("A step in which all decode", "step_ms"),
        ("All steps of a run", "run_ms"),
    ):
        for batch, times in found.items():
            by_memory: Mapping[Memory, list[float]] = getattr(times, kind)
            quotients = ratios(by_memory)
            low, high = interval(quotients)
            made.append(
                Row(
                    table=table,
                    labels={"requests": str(batch)},
                    figures=(
                        Figure.of("fixed", "ms", by_memory["fixed"]),
                        Figure.of("elastic", "ms", by_memory["elastic"]),
                        Figure.of("elastic / fixed", "", quotients),
                        Figure.of("95 % interval from", "", [low]),
                        Figure.of("95 % interval to", "", [high]),
                    ),
                )
            )
    return made


def checks(found: Mapping[int, Times], *, is_quick: bool) -> list[Check]:
    """The interval of a step's ratio lies within the bounds; a quick run is too short to say."""
    if is_quick:
        return []
    made = []
    for batch, times in found.items():
        low, high = interval(ratios(times.step_ms))
        made.append(
            Check(
                name=f"a step of {batch}: {WITHIN[0]:g} to {WITHIN[1]:g} times",
                passed=WITHIN[0] <= low and high <= WITHIN[1],
                detail=f"{low:.3f} to {high:.3f}",
            )
        )
    return made


def environment(memory: Memory) -> dict[str, str]:
    """What a side's process has beyond this one's cleaned environment."""
    return {**sides.environment("xllm"), "XLLM_XTENSOR__ENABLED": str(int(memory == "elastic"))}


def peer(memory: Memory) -> schema.Peer:
    """One side as a result tells it."""
    return schema.Peer(
        name=memory,
        what=f"one offline engine of this plugin, its KV cache {memory}",
        command=("python", "benchmarks/step/driver.py"),
        environment=environment(memory),
    )


def run_job(tokens: Sequence[int], batch: int, pair: int) -> dict[str, Any]:
    """One run; both of a pair get the same prompts, and no two pairs do."""
    rng = random.Random(f"{batch} requests, pair {pair}")
    prompts = [rng.choices(tokens, k=PROMPT_TOKENS) for _ in range(batch)]
    return {"do": "decode", "prompts": prompts, "max_tokens": OUTPUT_TOKENS}


def measure(
    children: Mapping[Memory, sides.Child],
    tokens: Sequence[int],
    batches: Sequence[int],
    num_pairs: int,
    reporter: Reporter,
) -> dict[int, Times]:
    """Run all pairs; each begins with the other memory than the one before."""
    found = {batch: Times() for batch in batches}
    for pair in range(num_pairs):
        order = MEMORIES if pair % 2 == 0 else MEMORIES[::-1]
        for batch, times in found.items():
            for memory in order:
                reporter.peer(memory, pair, num_pairs)
                reporter.doing(f"{batch} requests")
                times.record(memory, children[memory].ask(run_job(tokens, batch, pair)))
                reporter.done()
    return found


def notes(model: Path, num_pairs: int) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"Model {model.name} in bf16; prompts of {PROMPT_TOKENS} random tokens, "
            f"{OUTPUT_TOKENS} output tokens. {num_pairs} pairs of runs, the same prompts for both "
            "of a pair; both engines live all the time and take turns, the other one first in "
            "each pair. Ratios are taken within a pair."
        ),
        (
            "A step in which all decode: the mean over the middle half of a run's steps. All steps "
            "of a run: their sum, prompts included; there memory is committed."
        ),
        (
            "The interval holds the median of the ratios with 95 % confidence and assumes nothing "
            "of their distribution: it is taken from the ordered ratios."
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
@click.option("--pairs", type=click.IntRange(min=MIN_PAIRS), help=f"[default: {PAIRS}]")
@keep_logs_option
def command(
    *, quick: bool, json_path: Path, model: str, pairs: int | None, keep_logs: Path | None
) -> None:
    """What does elastic KV memory cost a step?

    Times the steps of two offline engines, one with xtensor.enabled, in turn.  Takes about ten
    minutes; with --quick two.
    """
    batches = QUICK_BATCHES if quick else BATCHES
    num_pairs = pairs or (QUICK_PAIRS if quick else PAIRS)
    folder = model_folder(model)
    vocabulary = Vocabulary.of_model(folder)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    total = 2 * len(MEMORIES) + num_pairs * len(batches) * len(MEMORIES)
    with (
        log_folder(keep_logs) as logs,
        contextlib.ExitStack() as stack,
        Reporter(console, total, first="starting the engines") as reporter,
    ):
        children = {}
        job = sides.start_job(
            folder,
            vocabulary,
            batches=batches,
            max_model_len=MAX_MODEL_LEN,
            max_tokens=MAX_TOKENS_PER_STEP,
        )
        for memory in MEMORIES:
            log = logs / f"{memory}.log"
            child = stack.enter_context(sides.Child(memory, environment(memory), log))
            facts = child.ask(job, timeout_s=sides.START_TIMEOUT_S)
            require(memory, facts)
            children[memory] = child
            reporter.done()
        equal = sides.compare_outputs(children["fixed"], children["elastic"], vocabulary)
        reporter.done(len(children))
        found = measure(children, vocabulary.ordinary(), batches, num_pairs, reporter)
    result = run.finish(
        peers=[peer(memory) for memory in MEMORIES],
        rows=rows(found),
        checks=[equal, *checks(found, is_quick=quick)],
        notes=notes(folder, num_pairs),
        not_shown=NOT_SHOWN,
        details={
            f"{batch} requests": {"step_ms": times.step_ms, "run_ms": times.run_ms}
            for batch, times in found.items()
        },
    )
    conclude(result, json_path, console)


def require(memory: Memory, facts: Mapping[str, Any]) -> None:
    """Raise `InternalError` unless the engine's KV cache is what was asked for."""
    if facts["block_pool"] != POOLS[memory]:
        raise InternalError(
            f"asked for {memory} KV memory, and the engine has a {facts['block_pool']}; please "
            "report this"
        )
