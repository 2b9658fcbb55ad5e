"""What does elastic KV memory cost a server?  See README.md beside this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click
from msgspec import structs
from rich.console import Console

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.commands import conclude, log_folder, model_folder
from xllm_plugin.bench.engine_memory import snapshot_of
from xllm_plugin.bench.fleet import Fleet
from xllm_plugin.bench.load import Load, LoadClient, parse_loads
from xllm_plugin.bench.options import (
    command_line,
    common_options,
    keep_logs_option,
    model_option,
)
from xllm_plugin.bench.pairs import MIN_PAIRS, interval
from xllm_plugin.bench.peers import PeerServer, xllm_server
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.replay import Measured, Plan, answer_checks
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.servers import Server
from xllm_plugin.bench.traces import Vocabulary, read_lengths
from xllm_plugin.errors import InternalError
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemorySection

NAME = "xtensor_serving"
QUESTION = "What does elastic KV memory cost the throughput and the latency of a server?"
TRACE = Path(__file__).resolve().parent.parent / "serving" / "data" / "azure-conv.jsonl"

FIXED: Final = "xllm"
ELASTIC: Final = "xllm-elastic"
MODEL_NAME = "model"
KV_BYTES = 2**30
FLAGS: Final = (
    *("--served-model-name", MODEL_NAME),
    *("--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(KV_BYTES)),
)

LOADS, QUICK_LOADS = "8,16", "8"
PAIRS, QUICK_PAIRS = 12, 2
MAX_INPUT, MAX_OUTPUT = 1024, 128
WARM_UP_CLIENTS = 4
AT_LEAST: Final = 0.97
"""Served throughput over that of the fixed cache."""

FIGURES: Final = (
    ("output throughput", "tok/s", "output_tok_s"),
    ("TPOT p50", "ms", "tpot_p50_ms"),
    ("TPOT p95", "ms", "tpot_p95_ms"),
    ("TTFT p50", "ms", "ttft_p50_ms"),
)
"""Name, unit, and field of `LoadResult`."""
THROUGHPUT: Final = FIGURES[0]


def peers(model: str) -> tuple[PeerServer, PeerServer]:
    """Both servers, that with the fixed KV cache first; each has a port of its own."""
    return (
        xllm_server(model, FIXED, "vLLM with this plugin, a fixed KV cache", flags=FLAGS),
        xllm_server(
            model,
            ELASTIC,
            "the same, its KV cache elastic",
            flags=FLAGS,
            environment={"XLLM_XTENSOR__ENABLED": "1"},
        ),
    )


def kv_memory(server: Server) -> MemorySection | None:
    """What the server's engine says of an elastic KV cache, or None where it is fixed."""
    with server.client() as client:
        return snapshot_of(client).section(MEMORY_SECTION, MemorySection)


def since(before: MemorySection, after: MemorySection) -> MemorySection:
    """The later one, whose totals of steps and of their time count from the earlier one."""
    if before.pages is None or after.pages is None:
        return after
    totals = ("num_commits", "num_releases", "commit_s", "release_s")
    done = {name: getattr(after.pages, name) - getattr(before.pages, name) for name in totals}
    return structs.replace(after, pages=structs.replace(after.pages, **done))


@dataclass(frozen=True, slots=True)
class Session:
    """What a run holds open."""

    plan: Plan
    fleet: Fleet
    client: LoadClient
    reporter: Reporter

    def measure(self, peers: Sequence[PeerServer]) -> tuple[list[Measured], MemorySection]:
        """Start both servers, compare their outputs, then run all pairs.

        Returns:
            What each gave, and the elastic one's memory afterwards, with what it did in the turns.
        """
        measured = [Measured(peer) for peer in peers]
        for one, peer in zip(measured, peers, strict=True):
            self._prepare(one, peer, is_reference=one is measured[0])
        warmed_up = self._elastic(peers)
        turns = list(zip(measured, peers, strict=True))
        for pair in range(self.plan.repeats):
            for one in measured:
                one.repeats.append([])
            for load in self.plan.loads:
                for one, peer in turns if pair % 2 == 0 else turns[::-1]:
                    self._run(one, peer, load, pair)
        return measured, since(warmed_up, self._elastic(peers))

    def _elastic(self, peers: Sequence[PeerServer]) -> MemorySection:
        elastic = kv_memory(self.fleet.server(peers[-1]))
        assert elastic is not None
        return elastic

    def _prepare(self, one: Measured, peer: PeerServer, *, is_reference: bool) -> None:
        """Start a server, see that its memory is what was asked for, collect outputs, warm up.

        Raises:
            InternalError: its KV cache is the other one's.
        """
        self.reporter.peer(one.name, 0, self.plan.repeats)
        server = self.fleet.server(peer)
        if (kv_memory(server) is not None) is not (one.name == ELASTIC):
            raise InternalError(f"the KV cache of {one.name} is that of the other; report this")
        self.reporter.doing("collecting outputs to compare")
        prompts = self.plan.output_requests()
        one.outputs = outputs.collect(server.url, MODEL_NAME, prompts)
        if is_reference:
            together = outputs.collect(server.url, MODEL_NAME, prompts, at_once=len(prompts))
            one.noise = outputs.self_noise(one.outputs, together)
        self.reporter.doing("warming up")
        self.client.measure(
            server.url,
            MODEL_NAME,
            Load(clients=WARM_UP_CLIENTS),
            self.plan.warm_up(),
            on_wait=server.check_alive,
        )
        self.reporter.done()

    def _run(self, one: Measured, peer: PeerServer, load: Load, pair: int) -> None:
        """One turn: both of a pair get the same requests, and no two pairs the same tokens."""
        self.reporter.peer(one.name, pair, self.plan.repeats)
        self.reporter.doing(str(load))
        server = self.fleet.server(peer)
        requests = replace(self.plan, seed=pair).requests(load)
        point = self.client.measure(
            server.url, MODEL_NAME, load, requests, on_wait=server.check_alive
        )
        one.repeats[-1].append(point)
        self.reporter.point(point)
        self.reporter.done()


def values(one: Measured, load: Load, field: str) -> list[float]:
    """A figure of one load, pair by pair."""
    return [float(getattr(point, field)) for point in one.at(load)]


def ratios(measured: Sequence[Measured], load: Load, field: str) -> list[float]:
    """Elastic over fixed, pair by pair."""
    fixed, elastic = (values(one, load, field) for one in measured)
    return [b / a for a, b in zip(fixed, elastic, strict=True)]


def rows(measured: Sequence[Measured], loads: Sequence[Load], memory: MemorySection) -> list[Row]:
    """A table a figure, a line a load; and what the elastic cache did meanwhile."""
    found = []
    for name, unit, field in FIGURES:
        for load in loads:
            quotients = ratios(measured, load, field)
            figures = [Figure.of(one.name, unit, values(one, load, field)) for one in measured]
            figures.append(Figure.of(f"{ELASTIC} / {FIXED}", "", quotients))
            if len(quotients) >= MIN_PAIRS:
                low, high = interval(quotients)
                figures.append(Figure.of("95 % interval from", "", [low]))
                figures.append(Figure.of("95 % interval to", "", [high]))
            labels = {"load": str(load)}
            found.append(Row(table=f"Served: {name}", labels=labels, figures=tuple(figures)))
    return [*found, memory_row(measured, memory)]


def memory_row(measured: Sequence[Measured], memory: MemorySection) -> Row:
    """How often steps of the turns took memory or gave it back, and for how long they waited."""
    figures = [Figure.of("resident at the end", "MiB", [memory.resident_bytes / 2**20])]
    if (pages := memory.pages) is not None:
        waited_ms = 1e3 * (pages.commit_s + pages.release_s)
        served_ms = 1e3 * sum(point.duration_s for point in measured[-1].points())
        figures += [
            Figure.of("steps that were given memory", "", [pages.num_commits]),
            Figure.of("steps that gave memory back", "", [pages.num_releases]),
            Figure.of("they waited for it, all together", "ms", [waited_ms]),
            Figure.of("of the time under load", "%", [100 * waited_ms / served_ms]),
        ]
    return Row(
        table="The elastic KV cache meanwhile",
        labels={"server": ELASTIC},
        figures=tuple(figures),
    )


def checks(
    measured: Sequence[Measured],
    loads: Sequence[Load],
    memory: MemorySection,
    *,
    is_quick: bool,
) -> list[Check]:
    """Outputs are equal, memory came as it was used, and throughput is kept.

    A quick run is too short for the last.
    """
    num_commits = 0 if memory.pages is None else memory.pages.num_commits
    found = [
        *answer_checks(measured),
        Check(
            name="the elastic cache took its memory while it served",
            passed=num_commits > 0,
            detail=f"in {num_commits} steps",
        ),
    ]
    for load in () if is_quick else loads:
        ratio = Figure.of("", "", ratios(measured, load, THROUGHPUT[2])).median
        found.append(
            Check(
                name=f"{load}: at least {AT_LEAST:g} of the fixed cache's throughput",
                passed=ratio >= AT_LEAST,
                detail=f"{ratio:.3f} times, by the median",
            )
        )
    return found


def notes(plan: Plan, model: str) -> tuple[str, ...]:
    """How to read the figures."""
    counts = ", ".join(f"{plan.num_requests(load)} at {load}" for load in plan.loads)
    return (
        (
            f"Model {model}; lengths of {TRACE.stem}, input cut at {plan.max_input} and output at "
            f"{plan.max_output} tokens; random token ids, `ignore_eos`; closed loop: a client "
            f"sends its next request when the last is answered. Requests of a turn: {counts}."
        ),
        (
            f"{plan.repeats} pairs of turns; both servers live all the time, one runs and the "
            "other is stopped (SIGSTOP), the other one first in each pair. Both of a pair get the "
            "same requests; no two pairs have the same tokens, so nothing is found in the prefix "
            "cache. Ratios are taken within a pair."
        ),
        (
            "The interval holds the median of the ratios with 95 % confidence and assumes nothing "
            "of their distribution: it is taken from the ordered ratios."
        ),
        (
            f"Settings of the elastic cache are the defaults, at most {KV_BYTES / 2**30:g} GiB: "
            "memory is taken as the prefix cache fills, then blocks that are evicted are used "
            "again. What nobody has used for five minutes would be given back, which the turns "
            "leave no time for; what it costs to take it anew is in benchmarks/xtensor_step (all "
            "steps of a run)."
        ),
    )


NOT_SHOWN = (
    "A budget that is short, and servers that share one: see benchmarks/xtensor_share.",
    "Prompts that share a prefix.",
    "Server and client share the machine's cores.",
)


@click.command(NAME)
@common_options(NAME)
@model_option
@keep_logs_option
@click.option("--loads", help=f"Clients, as 8,16.  [default: {LOADS}]")
@click.option("--pairs", type=click.IntRange(min=MIN_PAIRS), help=f"[default: {PAIRS}]")
def command(
    *,
    quick: bool,
    json_path: Path,
    model: str,
    keep_logs: Path | None,
    loads: str | None,
    pairs: int | None,
) -> None:
    """What does elastic KV memory cost a server?

    Two servers of the same model, one with xtensor.enabled, in turn under the requests of the
    serving benchmark; about 4 GiB.  Takes about ten minutes on two cores; with --quick two.
    """
    folder = model_folder(model)
    plan = Plan(
        loads=parse_loads(loads or (QUICK_LOADS if quick else LOADS)),
        repeats=pairs or (QUICK_PAIRS if quick else PAIRS),
        requests_per_load=None,
        is_quick=quick,
        tpot_ms=float("inf"),
        lengths=read_lengths(TRACE),
        vocabulary=Vocabulary.of_model(folder),
        max_input=MAX_INPUT,
        max_output=MAX_OUTPUT,
        seed=0,
    )
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    both = peers(str(folder))
    total = len(both) * (1 + plan.repeats * len(plan.loads))
    with (
        log_folder(keep_logs) as logs,
        Reporter(console, total) as reporter,
        LoadClient(logs / "client.log") as client,
        Fleet(logs, reporter.waiting) as fleet,
    ):
        measured, memory = Session(plan, fleet, client, reporter).measure(both)
    result = run.finish(
        peers=[peer.record(str(folder)) for peer in both],
        rows=rows(measured, plan.loads, memory),
        checks=checks(measured, plan.loads, memory, is_quick=quick),
        notes=notes(plan, folder.name),
        not_shown=NOT_SHOWN,
        details={
            one.name: [[point.model_dump(mode="json") for point in r] for r in one.repeats]
            for one in measured
        },
    )
    conclude(result, json_path, console)
