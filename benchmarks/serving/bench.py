"""How much more can be served at the same promise?  See README.md beside this file."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.markdown import Markdown

from xllm_plugin.bench import outputs, readme, schema
from xllm_plugin.bench.commands import model_folder
from xllm_plugin.bench.curve import AtBound
from xllm_plugin.bench.load import Load, parse_loads
from xllm_plugin.bench.options import command_line, common_options, peer_options
from xllm_plugin.bench.peers import PEER_NAMES, peer_servers
from xllm_plugin.bench.plots import CurvePoint, plot_latency_against_throughput
from xllm_plugin.bench.replay import (
    STOP_FACTOR,
    External,
    Measured,
    Plan,
    Target,
    answer_checks,
    replay,
)
from xllm_plugin.bench.schema import Figure, Result, Row
from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.bench.traces import Vocabulary, read_lengths
from xllm_plugin.errors import ConfigError

NAME = "serving"
DATA = Path(__file__).parent / "data"
TRACES = ("azure-conv", "azure-code", "sharegpt")
REFERENCE = "stock-best"

# The peers cross 50 ms at different loads, so the steps are finest where they do.
LOADS, QUICK_LOADS = "1,8,16,24,32,48,64", "1,8,24"


def bound_rows(measured: Sequence[Measured], tpot_ms: float) -> list[Row]:
    """The headline: best throughput within the bound, and its ratio to the reference peer."""
    reference = next((one for one in measured if one.name == REFERENCE), measured[0])
    base = [at.output_tok_s for at in reference.at_bound(tpot_ms)]
    rows = []
    for one in measured:
        found = one.at_bound(tpot_ms)
        speeds = [at.output_tok_s for at in found]
        figures = [Figure.of("output throughput", "tok/s", speeds)]
        if min(base) > 0:
            figures.append(Figure.ratio(f"times {reference.name}", speeds, base))
        figures.append(Figure.of("load there", _load_unit(one), [at.load for at in found]))
        figures.append(Figure.of("TTFT p90 there", "ms", [at.ttft_ms for at in found]))
        rows.append(
            Row(
                table=f"Highest output throughput with TPOT p90 at most {tpot_ms:g} ms",
                labels={"peer": one.name, "bound": _bound_label(found)},
                figures=tuple(figures),
            )
        )
    return rows


def _load_unit(one: Measured) -> str:
    is_closed = all(point.load.clients is not None for point in one.points())
    return "clients" if is_closed else "req/s"


def _bound_label(found: Sequence[AtBound]) -> str:
    if not all(at.is_met for at in found):
        return "broken at the lightest load"
    if not all(at.is_limit for at in found):
        return "not reached: at least this"
    return "reached"


def load_rows(measured: Sequence[Measured], loads: Sequence[Load]) -> list[Row]:
    """Every load of every peer."""
    rows = []
    for load in loads:
        for one in measured:
            points = one.at(load)
            if not points:
                continue
            figures = (
                Figure.of("output throughput", "tok/s", [p.output_tok_s for p in points]),
                Figure.of("TPOT p90", "ms", [p.tpot_p90_ms for p in points]),
                Figure.of("TTFT p50", "ms", [p.ttft_p50_ms for p in points]),
                Figure.of("TTFT p90", "ms", [p.ttft_p90_ms for p in points]),
                Figure.of("client CPU", "s", [p.client_cpu_s for p in points]),
            )
            labels = {"load": str(load), "peer": one.name}
            rows.append(Row(table="At every load", labels=labels, figures=figures))
    return rows


def latency_rows(measured: Sequence[Measured], loads: Sequence[Load]) -> list[Row]:
    """TPOT at the lightest load and TTFT at the heaviest, against the reference peer."""
    reference = next((one for one in measured if one.name == REFERENCE), measured[0])
    rows = []
    for one in measured:
        figures = [
            *_against("TPOT p50", "tpot_p50_ms", one, reference, loads[0]),
            *_against("TTFT p50", "ttft_p50_ms", one, reference, loads[-1]),
        ]
        rows.append(
            Row(
                table="Latency at the lightest and at the heaviest load",
                labels={"peer": one.name},
                figures=tuple(figures),
            )
        )
    return rows


def _against(name: str, field: str, one: Measured, reference: Measured, load: Load) -> list[Figure]:
    """A figure and its ratio to the reference's; none if a curve ended before this load."""
    values = [float(getattr(point, field)) for point in one.at(load)]
    bases = [float(getattr(point, field)) for point in reference.at(load)]
    if not values or len(values) != len(bases):
        return []
    return [
        Figure.of(f"{name}, {load}", "ms", values),
        Figure.ratio(f"{name}, times {reference.name}", values, bases),
    ]


def start_rows(measured: Sequence[Measured]) -> list[Row]:
    """Seconds from starting the process to a healthy server."""
    return [
        Row(
            table="Start",
            labels={"peer": one.name},
            figures=(Figure.of("ready after", "s", one.ready_s),),
        )
        for one in measured
        if one.ready_s
    ]


def curves(measured: Sequence[Measured], loads: Sequence[Load]) -> dict[str, list[CurvePoint]]:
    """Medians for the picture."""
    return {
        one.name: [
            CurvePoint(
                str(load),
                Figure.of("", "", [p.output_tok_s for p in points]).median,
                Figure.of("", "", [p.tpot_p90_ms for p in points]).median,
                Figure.of("", "", [p.ttft_p90_ms for p in points]).median,
            )
            for load in loads
            if (points := one.at(load))
        ]
        for one in measured
    }


def notes(plan: Plan, trace: str, model: str) -> tuple[str, ...]:
    """How to read the figures."""
    is_open = plan.loads[0].clients is None
    loop = (
        "open loop: Poisson arrivals, seeded"
        if is_open
        else "closed loop: a client sends its next request when the last is answered"
    )
    counts = ", ".join(f"{plan.num_requests(load)} at {load}" for load in plan.loads)
    return (
        (
            f"Model {model}; lengths of the {trace} trace, input cut at {plan.max_input} and "
            f"output at {plan.max_output} tokens; random token ids, `ignore_eos`; {loop}. "
            f"Requests: {counts}."
        ),
        (
            "The throughput at the bound is the best of the measured loads within it and of the "
            "crossings between neighbouring loads, interpolated linearly in TPOT; ratios are taken "
            "within a repeat. A peer's curve ends after the first load beyond "
            f"{STOP_FACTOR:g} times the bound."
        ),
        (
            "The load comes from vLLM's own benchmark client (`vllm.benchmarks.serve`), one "
            "process for all peers, on the server's cores, not pinned; its CPU time is in the "
            "table."
        ),
        (
            f"Outputs compared: {outputs.NUM_OUTPUT_PROMPTS} prompts of "
            f"{outputs.OUTPUT_PROMPT_TOKENS} random tokens, {outputs.OUTPUT_TOKENS} greedy tokens "
            "each, sent one at a time. A difference is a near-tie if it is no larger than the "
            "first peer's from itself when it gets all prompts at once."
        ),
    )


NOT_SHOWN = (
    (
        "Prompts share no prefix and hold random tokens: prefix caching and speculative decoding "
        "gain nothing here."
    ),
    "Server and client share the machine's cores.",
    "A small model on a CPU: what larger models and accelerators gain is another question.",
)


@click.command(NAME)
@common_options(NAME)
@click.option("--peers", default=",".join(PEER_NAMES), show_default=True, help="In this order.")
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="NAME=URL",
    help="Measure servers that run already instead of peers; repeat for each.",
)
@peer_options
@click.option("--trace", type=click.Choice(TRACES), default=TRACES[0], show_default=True)
@click.option(
    "--loads", help=f"Clients (1,8) or requests a second (0.5/s,1/s).  [default: {LOADS}]"
)
@click.option(
    "--requests-per-load",
    type=click.IntRange(min=1),
    help="[default: 6 + 2 a client, or 20 s worth of a rate]",
)
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--tpot-ms", type=float, default=50.0, show_default=True, help="Bound on TPOT p90.")
@click.option("--max-input", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--max-output", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def command(
    *,
    quick: bool,
    json_path: Path,
    peers: str,
    servers: tuple[str, ...],
    model: str,
    trace: str,
    loads: str | None,
    requests_per_load: int | None,
    repeats: int | None,
    tpot_ms: float,
    max_input: int,
    max_output: int,
    vllm_args: str,
    port: int | None,
    seed: int,
    keep_logs: Path | None,
) -> None:
    """How much more can be served at the same latency promise, against stock vLLM?

    Starts each peer in turn, replays a trace at rising load, and interpolates the output throughput
    at the bound on TPOT p90.  Writes FILE (JSON) and a picture beside it (PNG), and prints the
    tables.  Takes about half an hour; with --quick a few minutes.
    """
    folder = model_folder(model)
    plan = Plan(
        loads=parse_loads(loads or (QUICK_LOADS if quick else LOADS)),
        repeats=repeats or (1 if quick else 3),
        requests_per_load=requests_per_load,
        is_quick=quick,
        tpot_ms=tpot_ms,
        lengths=read_lengths(DATA / f"{trace}.jsonl"),
        vocabulary=Vocabulary.of_model(folder),
        max_input=max_input,
        max_output=max_output,
        seed=seed,
    )
    targets = choose_targets(servers, peers, str(folder), port, shlex.split(vllm_args))
    run = schema.begin(
        NAME,
        question=f"How much output does each peer serve with TPOT p90 at most {tpot_ms:g} ms?",
        command=command_line(),
    )
    console = Console()
    measured = replay(plan, targets, console, keep_logs)
    result = run.finish(
        peers=[target.record(str(folder)) for target in targets],
        rows=[
            *bound_rows(measured, tpot_ms),
            *latency_rows(measured, plan.loads),
            *load_rows(measured, plan.loads),
            *start_rows(measured),
        ],
        checks=answer_checks(measured),
        notes=notes(plan, trace, folder.name),
        not_shown=NOT_SHOWN,
        details={
            one.name: [[point.model_dump(mode="json") for point in r] for r in one.repeats]
            for one in measured
        },
    )
    finish(result, curves(measured, plan.loads), tpot_ms, json_path, console)


def choose_targets(
    servers: Sequence[str], peers: str, model: str, port: int | None, flags: Sequence[str]
) -> tuple[Target, ...]:
    """The servers given by URL, or else the peers to start."""
    if not servers:
        names = [name.strip() for name in peers.split(",") if name.strip()]
        return peer_servers(model, port=port or find_free_port(), flags=flags, names=names)
    pairs = [server.partition("=") for server in servers]
    bad = [server for server in servers if "=http" not in server]
    names = [name for name, _, _ in pairs]
    if bad or len(set(names)) != len(names):
        raise ConfigError(
            f"--server {', '.join(bad or names)}: write NAME=URL with different names, "
            "e.g. --server old=http://127.0.0.1:8000"
        )
    return tuple(External(name, url.rstrip("/")) for name, _, url in pairs)


def finish(
    result: Result,
    picture: dict[str, list[CurvePoint]],
    tpot_ms: float,
    json_path: Path,
    console: Console,
) -> None:
    """Write JSON, README and picture; print the tables; exit 1 if a check failed."""
    written = readme.publish(result, json_path)
    try:
        image = json_path.with_suffix(".png")
        plot_latency_against_throughput(
            picture, tpot_bound_ms=tpot_ms, title=result.question, path=image
        )
        written.append(image)
    except ImportError:
        console.print("no picture: matplotlib is missing (pip install 'xllm-plugin[bench]')")
    console.print(Markdown(readme.render(result)))
    console.print(f"written: {', '.join(map(str, written))}", highlight=False)
    if not result.passed:
        raise click.exceptions.Exit(1)
