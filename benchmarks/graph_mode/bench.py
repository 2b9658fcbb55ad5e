"""What is each graph mode worth, and what does it cost?  See README.md beside this file."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.commands import beside, conclude, log_folder, model_folder
from xllm_plugin.bench.options import (
    command_line,
    common_options,
    keep_logs_option,
    model_option,
)
from xllm_plugin.bench.peers import COMMON_ENVIRONMENT
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.cpu.graphs.compiler import PATIENCE_S
from xllm_plugin.errors import ConfigError

FOLDER = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from benchmarks.step import sides
else:
    sides = beside(FOLDER.parent / "step", "sides")

NAME = "graph_mode"
QUESTION = "What is each graph mode worth for a step, and what does it cost to have it?"

DECODES, QUICK_DECODES = (1, 8, 32), (1,)
PREFILLS, QUICK_PREFILLS = (256, 1024), (256,)
BUCKETS, QUICK_BUCKETS = (1, 8), ()
PROMPT_TOKENS, OUTPUT_TOKENS, PREFILLS_PER_REPEAT = 128, 24, 4
MEANWHILE_S: Final = 20.0
MIB: Final = 2**20

GRAPHS: Final = {"XLLM_GRAPH__NATIVE_LAYERS": "0"}
"""The engine with the background graph, also where native layers are possible."""


@dataclass(frozen=True, slots=True)
class Point:
    """One kind of step: requests that decode together, or tokens of one prompt."""

    kind: str
    size: int

    def __str__(self) -> str:
        what = f"batch {self.size}" if self.kind == "decode" else f"{self.size} tokens"
        return f"{self.kind}, {what}"

    @property
    def num_tokens(self) -> int:
        """In the batch of one such step."""
        return self.size

    def job(self, tokens: Sequence[int], repeat: int, forms: Sequence[str]) -> dict[str, Any]:
        """What an engine is asked; other random tokens each time, so that no prompt is cached."""
        rng = random.Random(f"{self}, repeat {repeat}, {forms}")
        count = self.size if self.kind == "decode" else PREFILLS_PER_REPEAT
        length = PROMPT_TOKENS if self.kind == "decode" else self.size
        prompts = [rng.choices(tokens, k=length) for _ in range(count)]
        job = {"do": "work", "kind": self.kind, "prompts": prompts, "max_tokens": OUTPUT_TOKENS}
        return job | {"forms": list(forms)}


@dataclass(slots=True)
class Found:
    """What came out."""

    ms: dict[tuple[Point, str], list[float]] = field(default_factory=dict)
    """Of a typical step, for each repeat."""
    costs: dict[str, dict[str, Any]] = field(default_factory=dict)
    meanwhile: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked."""

    model: Path
    vocabulary: Vocabulary
    points: tuple[Point, ...]
    buckets: tuple[int, ...]
    repeats: int
    folder: Path

    def start_job(self) -> dict[str, Any]:
        """The engine's settings, and the shapes to touch before any is timed."""
        sizes = {kind: [p.size for p in self.points if p.kind == kind] for kind in KINDS}
        return sides.start_job(
            self.model,
            self.vocabulary,
            batches=sizes["decode"],
            prefills=sizes["prefill"],
            max_model_len=2048,
            max_tokens=2048,
        )

    def engine(self, name: str, settings: Mapping[str, str]) -> Any:
        """An engine of its own process, with a cache that nothing was compiled into."""
        environment = {
            **COMMON_ENVIRONMENT,
            "XLLM_PLATFORM": "xllm",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "XLLM_CACHE_DIR": str(self.folder / "cache"),
        }
        return sides.Child(
            name,
            {**environment, **settings},
            self.folder / f"{name}.log",
            command=(sys.executable, str(FOLDER / "driver.py")),
        )


KINDS = ("decode", "prefill")


def measure(plan: Plan, console: Console) -> Found:
    """Compile, then let every form run every point in turns."""
    found = Found()
    total = 5 + len(plan.buckets) + plan.repeats * len(plan.points)
    with (
        Reporter(console, total, first="starting the engines") as reporter,
        plan.engine("graphs", GRAPHS) as graphs,
    ):
        graphs.ask(plan.start_job(), timeout_s=sides.START_TIMEOUT_S)
        compile_graphs(plan, graphs, found, reporter)
        with plan.engine("native", {}) as native:
            native.ask(plan.start_job(), timeout_s=sides.START_TIMEOUT_S)
            reporter.done()
            found.checks = compare(plan, graphs, native)
            reporter.done()
            for repeat in range(plan.repeats):
                for point in plan.points:
                    reporter.doing(f"{point}, repeat {repeat + 1}")
                    take_turns(plan, point, repeat, (graphs, native), found)
                    reporter.done()
    return found


def compile_graphs(plan: Plan, graphs: Any, found: Found, reporter: Reporter) -> None:
    """The dynamic graph while one request decodes, then undisturbed; then one for each bucket."""
    tokens = plan.vocabulary.ordinary()
    job = {"do": "meanwhile", "tokens": tokens, "seconds": MEANWHILE_S}
    reporter.doing("one client while the graph is compiled")
    seconds = {"first minute": PATIENCE_S, "after it": MEANWHILE_S}
    for when, limit_s in seconds.items():
        answer = graphs.ask(job | {"seconds": limit_s, "is_compiling": True})
        if answer["ms"]:
            found.meanwhile[f"while it compiles, {when}"] = answer
    reporter.done()
    reporter.doing("compiling")
    found.costs["dynamic"] = graphs.ask({"do": "wait"}, timeout_s=sides.START_TIMEOUT_S)
    reporter.done()
    found.meanwhile["afterwards"] = graphs.ask(job | {"is_compiling": False})
    reporter.done()
    for bucket in plan.buckets:
        reporter.doing(f"compiling for {bucket} tokens")
        asked = {"do": "compile", "num_tokens": bucket}
        found.costs[f"bucket {bucket}"] = graphs.ask(asked, timeout_s=sides.START_TIMEOUT_S)
        reporter.done()


def take_turns(
    plan: Plan, point: Point, repeat: int, engines: tuple[Any, Any], found: Found
) -> None:
    """Every form runs one point, the other way round in every second repeat."""
    graphs, native = engines
    forms = ["eager", "dynamic"]
    if point.num_tokens in plan.buckets and point.kind == "decode":
        forms.append(str(point.num_tokens))
    order = [(graphs, form) for form in forms] + [(native, "native")]
    for engine, form in order if repeat % 2 == 0 else order[::-1]:
        job = point.job(plan.vocabulary.ordinary(), repeat, [form])
        name = "bucket" if form.isdecimal() else form
        found.ms.setdefault((point, name), []).append(engine.ask(job)["ms"][form])


def compare(plan: Plan, graphs: Any, native: Any) -> list[Check]:
    """The dynamic graph's and the native layers' outputs against eager's, before a time counts."""
    job = sides.outputs_job(plan.vocabulary)
    answers = graphs.ask(job | {"forms": ["eager", "dynamic"]})
    answers["native"] = native.ask(job | {"forms": ["native"]})["native"]
    read = {name: sides.completions(found) for name, found in answers.items()}
    noise = outputs.self_noise(read["eager"], read["together"])
    return [
        outputs.compare(form, "eager", read["eager"], read[form], noise)
        for form in ("dynamic", "native")
    ]


def step_rows(found: Found, points: Sequence[Point]) -> list[Row]:
    """Every kind of step in every form, and against eager within a repeat."""
    rows = []
    for point in points:
        eager = found.ms[point, "eager"]
        forms = {
            form: found.ms[point, form]
            for form in ("dynamic", "bucket", "native")
            if (point, form) in found.ms
        }
        figures = [Figure.of("eager", "ms", eager)]
        figures += [Figure.of(form, "ms", ms) for form, ms in forms.items()]
        figures += [Figure.ratio(f"{form} / eager", ms, eager) for form, ms in forms.items()]
        rows.append(Row(table="A step", labels={"step": str(point)}, figures=tuple(figures)))
    return rows


def cost_rows(found: Found) -> list[Row]:
    """What a graph takes to make, and to have."""
    return [
        Row(
            table="A compiled graph",
            labels={"graph": graph},
            figures=(
                Figure.of("processor time", "s", [cost["cpu_s"]]),
                Figure.of("wall clock", "s", [cost["wall_s"]]),
                Figure.of("child's memory", "MiB", [cost["peak_bytes"] / MIB]),
                Figure.of("on disk", "MiB", [cost["disk_bytes"] / MIB]),
                Figure.of("read back", "s", [cost["read_s"]]),
            ),
        )
        for graph, cost in found.costs.items()
    ]


def meanwhile_rows(found: Found) -> list[Row]:
    """One client's steps beside the compilation."""
    return [
        Row(
            table="One client, eager",
            labels={"when": when},
            figures=(
                Figure.of("step", "ms", answer["ms"]),
                Figure.of("child's share of a core", "", [answer["child_cores"]]),
            ),
        )
        for when, answer in found.meanwhile.items()
    ]


def notes(plan: Plan) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"Model {plan.model.name} in bf16. decode: prompts of {PROMPT_TOKENS} tokens, "
            f"{OUTPUT_TOKENS} output tokens. prefill: {PREFILLS_PER_REPEAT} prompts a repeat. A "
            "repeat's figure is the mean over the middle half of its steps."
        ),
        (
            "eager, dynamic and bucket are one engine whose model is switched between them; native "
            "is a second engine. They take turns point by point."
        ),
        (
            "dynamic: the graph that the engine's own child process compiles in the background, "
            "for all batch sizes. bucket: the same compiled for exactly the step's tokens."
        ),
        (
            "One client, eager: windows of steps of constant decoding; min and max are of the "
            f"windows. The child is idle-priority for {PATIENCE_S:g} s and nice 10 then, for "
            f"{MEANWHILE_S:g} s of it here; it goes on undisturbed afterwards, and its wall clock "
            "has all of that."
        ),
    )


NOT_SHOWN = (
    "Models without native layers, which are those that the graph is for: one model has all forms.",
    "Graphs of accelerators: the policy that chooses among them has its tests alone so far.",
    "Several clients beside the compilation; the child runs only where no other process would.",
)


@click.command(NAME)
@common_options(NAME)
@model_option
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@keep_logs_option
def command(
    *, quick: bool, json_path: Path, model: str, repeats: int | None, keep_logs: Path | None
) -> None:
    """What is each graph mode worth for a step, and what does it cost to have it?

    Takes about ten minutes on two cores; with --quick about four.
    """
    folder = model_folder(model)
    require_native(folder)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    points = (
        *(Point("decode", size) for size in (QUICK_DECODES if quick else DECODES)),
        *(Point("prefill", size) for size in (QUICK_PREFILLS if quick else PREFILLS)),
    )
    with log_folder(keep_logs) as place:
        plan = Plan(
            folder,
            Vocabulary.of_model(folder),
            points,
            QUICK_BUCKETS if quick else BUCKETS,
            repeats or (1 if quick else 3),
            place,
        )
        found = measure(plan, console)
    result = run.finish(
        peers=[
            Peer(name="graphs", what="xllm with the background graph", environment=dict(GRAPHS)),
            Peer(name="native", what="xllm with native layers, as it comes"),
        ],
        rows=[*step_rows(found, points), *cost_rows(found), *meanwhile_rows(found)],
        checks=found.checks,
        notes=notes(plan),
        not_shown=NOT_SHOWN,
        details={f"{point}, {form}": ms for (point, form), ms in found.ms.items()},
    )
    conclude(result, json_path, console)


def require_native(folder: Path) -> None:
    """Raise `ConfigError` for a model that has no native layers to compare with."""
    from xllm_plugin.cpu.native.choice import ARCHITECTURES

    text = (folder / "config.json").read_text("utf-8")
    if not any(f'"{name}"' in text for name in ARCHITECTURES):
        raise ConfigError(
            f"--model {folder}: its config.json names none of {', '.join(sorted(ARCHITECTURES))}, "
            "which have native layers to compare with; try --model smollm2"
        )
