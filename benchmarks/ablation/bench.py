"""What is each part of the engine worth?  See README.md beside this file."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import (
    conclude,
    log_folder,
    model_folder,
    names_in,
    require_known,
)
from xllm_plugin.bench.load import parse_loads
from xllm_plugin.bench.options import command_line, common_options, peer_options
from xllm_plugin.bench.peers import PeerServer, peer_servers
from xllm_plugin.bench.replay import Measured, Plan, answer_checks, replay
from xllm_plugin.bench.schema import Figure, Row
from xllm_plugin.bench.servers import find_free_port
from xllm_plugin.bench.traces import Vocabulary, read_lengths
from xllm_plugin.errors import NotNowError

NAME = "ablation"
QUESTION = "What does the server lose, or gain, when one part is switched?"
TRACE = Path(__file__).resolve().parent.parent / "serving" / "data" / "azure-conv.jsonl"
LOADS: Final = "1,8"
BASE: Final = "as it comes"
COMPILE_TIMEOUT_S: Final = 600.0

COMPILED_MARKS: Final = ("compiled in ", "runs as one compiled graph")
"""What the log says when the background graph is there: made by this start, or read."""


@dataclass(frozen=True, slots=True)
class Change:
    """One switch, as a user would set it."""

    what: str
    environment: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    is_compiled: bool = False
    """Whether a graph has to be compiled before it is timed."""


CHANGES: Final[dict[str, Change]] = {
    BASE: Change("nothing changed"),
    "attention by vLLM": Change(
        "native code for all but attention: two calls a layer", (("XLLM_GRAPH__MODE", "partial"),)
    ),
    "compiled": Change(
        "no native layers: the graph that the background compilation made",
        (("XLLM_GRAPH__NATIVE_LAYERS", "0"),),
        is_compiled=True,
    ),
    "eager": Change(
        "neither native layers nor a compiled graph",
        (("XLLM_GRAPH__NATIVE_LAYERS", "0"),),
        ("--enforce-eager",),
    ),
    "graph mode off": Change(
        "vLLM's own compilation, before it serves", (("XLLM_GRAPH__MODE", "off"),)
    ),
    "engine not forked": Change("a new interpreter for the engine", (("XLLM_ENGINE__FORK", "0"),)),
    "rank in its own process": Change(
        "one process more, as vLLM has it", flags=("--distributed-executor-backend", "mp")
    ),
    "async scheduling": Change("steps scheduled ahead", flags=("--async-scheduling",)),
}
QUICK_CHANGES = (BASE, "attention by vLLM")


def changed_peers(
    names: Sequence[str], model: str, *, port: int, flags: Sequence[str]
) -> tuple[PeerServer, ...]:
    """The server as it comes, first, then with each of `names` changed.

    Raises `ConfigError` for a name that is not of `CHANGES`.
    """
    names = tuple(dict.fromkeys((BASE, *names)))
    require_known("changes", names, CHANGES)
    (base,) = peer_servers(model, port=port, flags=flags, names=("xllm",))
    return tuple(
        base.changed(
            name,
            CHANGES[name].what,
            flags=CHANGES[name].flags,
            environment=dict(CHANGES[name].environment),
        )
        for name in names
    )


def compile_first(peer: PeerServer, log: Path, console: Console) -> None:
    """Let a server compile its graph into the user's cache, so that timed starts read it.

    Raises:
        NotNowError: no graph after `COMPILE_TIMEOUT_S`.
    """
    console.print(f"{peer.name}: compiling once, one or two minutes", highlight=False)
    with peer.server(log) as server:
        until_s = time.monotonic() + COMPILE_TIMEOUT_S
        while not any(mark in log.read_text(errors="replace") for mark in COMPILED_MARKS):
            server.check_alive()
            if time.monotonic() > until_s:
                raise NotNowError(f"{peer.name}: no graph after {COMPILE_TIMEOUT_S:g} s; see {log}")
            time.sleep(1.0)


def rows(measured: Sequence[Measured], plan: Plan) -> list[Row]:
    """Start, one client and the heaviest load of every change; ratios within a repeat."""
    base = measured[0]
    light, heavy = plan.loads[0], plan.loads[-1]
    found = []
    for one in measured:
        tpot, base_tpot = ([p.tpot_p50_ms for p in peer.at(light)] for peer in (one, base))
        speed, base_speed = ([p.output_tok_s for p in peer.at(heavy)] for peer in (one, base))
        ttft = [point.ttft_p50_ms for point in one.at(heavy)]
        figures = (
            Figure.of("ready after", "s", one.ready_s),
            Figure.of(f"TPOT p50, {light}", "ms", tpot),
            Figure.ratio("TPOT ratio", tpot, base_tpot),
            Figure.of(f"output throughput, {heavy}", "tok/s", speed),
            Figure.ratio("throughput ratio", speed, base_speed),
            Figure.of(f"TTFT p50, {heavy}", "ms", ttft),
        )
        found.append(Row(table="One part changed", labels={"change": one.name}, figures=figures))
    return found


def notes(plan: Plan, model: str) -> tuple[str, ...]:
    """How to read the figures."""
    counts = ", ".join(f"{plan.num_requests(load)} at {load}" for load in plan.loads)
    return (
        (
            f"Model {model}; lengths of the azure-conv trace, input cut at {plan.max_input} and "
            f"output at {plan.max_output} tokens; random token ids; closed loop. Requests: "
            f"{counts}. Ratios are to the server as it comes, within a repeat."
        ),
        (
            "compiled: its graph was compiled before the first timed start and is read by each. "
            "graph mode off: vLLM compiles at each start, which is in its `ready after`."
        ),
    )


NOT_SHOWN = (
    "Parts together: each is switched alone, and two that do the same work are not additive.",
    "Longer runs: a difference of a few per cent is within the spread of these repeats.",
)


@click.command(NAME)
@common_options(NAME)
@click.option(
    "--changes", help=f"In this order, beside '{BASE}'.  [default: all: {', '.join(CHANGES)}]"
)
@peer_options
@click.option(
    "--loads", default=LOADS, show_default=True, help="Clients; the first and the last count."
)
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
def command(
    *,
    quick: bool,
    json_path: Path,
    changes: str | None,
    model: str,
    loads: str,
    repeats: int | None,
    vllm_args: str,
    port: int | None,
    keep_logs: Path | None,
) -> None:
    """What does the server lose, or gain, when one part is switched?

    Starts xllm as it comes and with one switch changed, in turns, under the requests of the serving
    benchmark.  Takes about 25 minutes on two cores; with --quick two.
    """
    names = (
        names_in(changes) if changes is not None else (QUICK_CHANGES if quick else tuple(CHANGES))
    )
    changed_peers(names, "-", port=0, flags=())  # a wrong name ends before a model is built
    folder = model_folder(model)
    flags = shlex.split(vllm_args)
    peers = changed_peers(names, str(folder), port=port or find_free_port(), flags=flags)
    plan = Plan(
        loads=parse_loads(loads),
        repeats=repeats or (1 if quick else 3),
        requests_per_load=None,
        is_quick=quick,
        tpot_ms=float("inf"),
        lengths=read_lengths(TRACE),
        vocabulary=Vocabulary.of_model(folder),
        max_input=1024,
        max_output=128,
        seed=0,
    )
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    with log_folder(keep_logs) as logs:
        for peer in peers:
            if CHANGES[peer.name].is_compiled:
                compile_first(peer, logs / f"{peer.name}.compile.log", console)
        measured = replay(plan, peers, console, logs)
    result = run.finish(
        peers=[peer.record(str(folder)) for peer in peers],
        rows=rows(measured, plan),
        checks=answer_checks(measured),
        notes=notes(plan, folder.name),
        not_shown=NOT_SHOWN,
        details={
            one.name: [[point.model_dump(mode="json") for point in r] for r in one.repeats]
            for one in measured
        },
    )
    conclude(result, json_path, console)
