"""Does a user's lm-eval score change when the plugin is on?  See README.md beside this file."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import beside, conclude, log_folder, model_folder
from xllm_plugin.bench.options import command_line, common_options, model_option
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from benchmarks.accuracy import compare, sides
else:
    compare, sides = beside(FOLDER, "compare"), beside(FOLDER, "sides")

NAME = "accuracy"
QUESTION = "Does an lm-eval score change when the plugin is on?"
MAX_LIMIT, DEFAULT_LIMIT, QUICK_LIMIT = 400, 100, 20
SHARES = {"xl_arc_easy": 1, "xl_lambada": 1, "xl_hellaswag": 2, "xl_gsm8k": 5}
"""By what `--limit` is divided: a long or a generated item costs that much more than the others."""

KINDS_NOTE = (
    "identical: lm-eval got the same log-likelihoods to the last bit, or the same text; rounding: "
    "the numbers moved no further than stock's own do, the answer is the same; "
    "near-tie: the answer changed where rounding decides; unexplained: anything else, a failure."
)
ROWS_NOTE = (
    "Every row of the second table is compared with native's first run. 'native again' is how "
    "repeatable stock is; 'native, batch N' is how far it is from itself when batches differ, and "
    "the yardstick for xllm's row. With --compile xllm runs as it comes, with kernels of its own; "
    "then 'native, eager' (against compiled) is a yardstick too, and the wider one counts. "
    "'differing tokens' counts positions of the given texts, and generated texts, at which another "
    "token is the likeliest."
)
GSM8K_NOTE = (
    "SmolLM2-135M answers almost no GSM8K problem: with it that task compares greedy texts, and "
    "its score says nothing."
)
NOT_SHOWN = (
    (
        "How good the model is: the tasks are cut and this benchmark's own, close to the upstream "
        "ones but not the same; do not compare the scores with published ones."
    ),
    (
        "Many requests at once: on the server they run one at a time, because batches under "
        "concurrent requests are not the same from run to run. The equality benchmark has those."
    ),
    (
        "Sampling (all of it is greedy), chat templates, images, other models and accelerators; "
        "and vLLM's compiled graphs, unless the command says --compile."
    ),
)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Both sides of one task on one path, compared."""

    path: str
    task: str
    native_scores: Mapping[str, float]
    xllm_scores: Mapping[str, float]
    outcomes: Mapping[str, compare.Outcome]  # of "native again", "native, batch N" and "xllm"

    @property
    def xllm(self) -> compare.Outcome:
        """The comparison that counts."""
        return self.outcomes["xllm"]


@click.command(NAME)
@common_options(NAME, quick=f"{QUICK_LIMIT} items per task.")
@model_option
@click.option(
    "--path",
    "paths",
    multiple=True,
    type=click.Choice(sides.PATHS),
    help="How lm-eval reaches vLLM; repeatable.  [default: both]",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=click.Choice(list(SHARES)),
    help="Repeatable.  [default: all]",
)
@click.option(
    "--limit",
    type=click.IntRange(1, MAX_LIMIT),
    help=f"Items per task (half of xl_hellaswag, a fifth of xl_gsm8k).  [default: {DEFAULT_LIMIT}]",
)
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option(
    "--eager/--compile", default=True, show_default=True, help="Without or with vLLM's compiler."
)
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep answers and logs in this folder.",
)
def command(
    *,
    quick: bool,
    json_path: Path,
    model: str,
    paths: Sequence[str],
    tasks: Sequence[str],
    limit: int | None,
    dtype: str,
    eager: bool,
    keep: Path | None,
) -> None:
    """Compare lm-eval's scores and answers with the plugin on and off.

    Ends with exit code 1 when an item differs and nothing explains it.
    """
    limits = limits_for(tasks, limit or (QUICK_LIMIT if quick else DEFAULT_LIMIT))
    _require_lm_eval()
    running = schema.begin(NAME, question=QUESTION, command=command_line())
    with log_folder(keep) as folder:
        plan = sides.Plan(model_folder(model), limits, dtype, eager, folder)
        chosen = [path for path in sides.PATHS if not paths or path in paths]
        results = run_all(plan, chosen)
    result = running.finish(
        peers=[sides.peer(plan, path, side) for path in chosen for side in sides.PLATFORMS],
        rows=[*score_rows(results), *item_rows(results)],
        checks=list(checks(results)),
        notes=(KINDS_NOTE, ROWS_NOTE, GSM8K_NOTE),
        not_shown=NOT_SHOWN,
        details=details(results),
    )
    conclude(result, json_path, Console())


def limits_for(tasks: Sequence[str], limit: int) -> dict[str, int]:
    """Items of each chosen task (of all, if none is), at least one."""
    return {
        task: max(1, limit // share) for task, share in SHARES.items() if not tasks or task in tasks
    }


def run_all(plan: sides.Plan, paths: Sequence[sides.Way]) -> list[TaskResult]:
    """Run every side of every path, one engine at a time, and compare."""
    engines = [(plan, side) for side in sides.PLATFORMS]
    if not plan.eager:
        engines.append((plan.other_form(), "native"))
    total = sum(
        len(asked.passes(path, side)) * len(plan.limits)
        for path in paths
        for asked, side in engines
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results: list[TaskResult] = []
    with Progress(*columns) as progress:
        bar = progress.add_task("starting", total=total)
        for path in paths:
            found = []
            for asked, side in engines:
                where = asked.title(path, side)
                progress.update(bar, description=f"{where}: starting")

                def on_step(what: str, where: str = where) -> None:
                    progress.update(bar, advance=1, description=f"{where}: {what}")

                found.append(sides.run(asked, path, side, on_step))
            results += compare_path(path, *found)
    return results


def compare_path(
    path: sides.Way,
    native: sides.Passes,
    xllm: sides.Passes,
    native_eager: sides.Passes | None = None,
) -> list[TaskResult]:
    """Compare what the engines of one path found, task by task."""
    results = []
    batch = sides.PASSES[path]["other"]
    for task, main in native["main"].items():
        reference = compare.read_items(main["items"])
        other = compare.read_items(native["other"][task]["items"])
        noise = compare.Noise.measure(reference, other)
        candidates = {
            "native again": compare.read_items(native["repeat"][task]["items"]),
            f"native, batch {batch}": other,
        }
        if native_eager is not None:
            candidates["native, eager"] = compare.read_items(native_eager["main"][task]["items"])
            in_form = compare.Noise.measure(reference, candidates["native, eager"])
            noise = compare.Noise.wider(noise, in_form)
        candidates["xllm"] = compare.read_items(xllm["main"][task]["items"])
        outcomes = {
            name: compare.compare(reference, items, noise) for name, items in candidates.items()
        }
        results.append(
            TaskResult(path, task, main["scores"], xllm["main"][task]["scores"], outcomes)
        )
    return results


def score_rows(results: Sequence[TaskResult]) -> Iterator[Row]:
    """lm-eval's scores side by side."""
    for result in results:
        for metric, native in result.native_scores.items():
            xllm = result.xllm_scores[metric]
            labels = {"path": result.path, "task": result.task, "metric": metric}
            figures = {"native": native, "xllm": xllm, "change": xllm - native}
            yield Row(table="Scores", labels=labels, figures=_figures(figures))


def item_rows(results: Sequence[TaskResult]) -> Iterator[Row]:
    """How many items of each kind, for xllm and for stock against itself."""
    for result in results:
        for name, outcome in result.outcomes.items():
            labels = {"path": result.path, "task": result.task, "compared with native": name}
            figures: dict[str, float] = {"items": len(outcome.findings)}
            figures |= {kind.value: outcome.count(kind) for kind in compare.Kind}
            figures |= {"differing tokens": outcome.tokens.spread.num_differing}
            rows = _figures(figures)
            if result.task != "xl_gsm8k":
                rows += (Figure.of("largest move", "nats", [outcome.max_move]),)
            yield Row(table="Items", labels=labels, figures=rows)


def checks(results: Sequence[TaskResult]) -> Iterator[Check]:
    """One per path and task: nothing is unexplained."""
    for result in results:
        problems = result.xllm.problems
        yield Check(
            name=f"{result.path}, {result.task}: no difference without an explanation",
            passed=not problems,
            detail="; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else ""),  # noqa: PLR2004 - a cell's worth
        )


def details(results: Sequence[TaskResult]) -> dict[str, Any]:
    """Every item that is not identical, and the judgement on the tokens."""
    return {
        f"{result.path} {result.task}": {
            name: {
                "items": [
                    {"id": finding.id, "kind": finding.kind.value, "why": finding.why}
                    for finding in outcome.findings
                    if finding.kind is not compare.Kind.IDENTICAL
                ],
                "tokens": outcome.tokens.summary().splitlines(),
            }
            for name, outcome in result.outcomes.items()
        }
        for result in results
    }


def _figures(values: Mapping[str, float]) -> tuple[Figure, ...]:
    return tuple(Figure.of(name, "", [value]) for name, value in values.items())


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-eval is not installed; this benchmark needs 0.4.13: pip install 'xllm-plugin[eval]'"
        )
