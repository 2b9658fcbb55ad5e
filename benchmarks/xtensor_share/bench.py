"""Two models on one machine: one budget of KV memory, or half each?  See README.md beside this."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import click
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude, log_folder, model_folder
from xllm_plugin.bench.curve import percentile
from xllm_plugin.bench.engine_memory import Sampler, kv_bytes_per_token, resident, snapshot_of
from xllm_plugin.bench.open_loop import Sending, evenly, send
from xllm_plugin.bench.options import (
    command_line,
    common_options,
    keep_logs_option,
    model_option,
)
from xllm_plugin.bench.peers import PeerServer, xllm_server
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.promises import Outcome, whole_check
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.servers import Server
from xllm_plugin.bench.traces import Lengths, Vocabulary, synthesise
from xllm_plugin.errors import NotNowError
from xllm_plugin.xtensor.leases import pool_path

NAME = "xtensor_share"
QUESTION = (
    "How many requests of two models' bursts are served without preemption from one budget of KV "
    "memory, and from half of it each?"
)

Side = Literal["shared", "split"]
SIDES: Final[tuple[Side, ...]] = ("shared", "split")
MODELS: Final = ("first", "second")

PROMPT_TOKENS, OUTPUT_TOKENS = 100, 284
MAX_MODEL_LEN = PROMPT_TOKENS + OUTPUT_TOKENS
BUDGET_REQUESTS = 20
"""So many requests of full length fill the budget."""
BURSTS, QUICK_BURSTS = (8, 16), (16,)
"""Requests of a burst."""
ROUNDS, QUICK_ROUNDS = 2, 1
"""Bursts of each size that each model gets in a repeat."""
REPEATS, QUICK_REPEATS = 2, 1
SPREAD_S = 2.0
"""The requests of a burst arrive within this time."""
GIVE_UP_S = 300.0
SAMPLE_EVERY_S = 0.2
AT_LEAST: Final = 1.5
"""How many times the requests that half the budget serves without preemption."""
OTHER_SHARED_BYTES = 2**20
"""Shared memory of an engine that is not its KV cache."""

REQUESTS = "vllm:request_num_preemptions"
PREEMPTIONS = "vllm:num_preemptions_total"
# vLLM's own first bucket holds requests that were preempted once as well.
BUCKETS: Final = {"request_num_preemptions": [0.5, 1, 2, 3, 4, 5, 10, 20]}


@dataclass(frozen=True, slots=True)
class Counted:
    """What a server has counted since it started; the requests are those that are answered."""

    requests: int
    not_preempted: int
    preemptions: int

    @classmethod
    def of_metrics(cls, text: str) -> Counted:
        """Read `/metrics`.  Raises `NotNowError` if it is not that of these servers."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                bound = sample.labels.get("le", "")
                if not bound or float(bound) == BUCKETS["request_num_preemptions"][0]:
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        names = (f"{REQUESTS}_count", f"{REQUESTS}_bucket", PREEMPTIONS)
        if missing := [name for name in names if name not in found]:
            raise NotNowError(f"/metrics lacks {', '.join(missing)}; is this vLLM 0.32?")
        return cls(*(round(found[name]) for name in names))

    def since(self, before: Counted) -> Counted:
        """What has come since then."""
        return Counted(
            self.requests - before.requests,
            self.not_preempted - before.not_preempted,
            self.preemptions - before.preemptions,
        )


@dataclass(frozen=True, slots=True)
class Burst:
    """What became of one burst."""

    outcomes: tuple[Outcome, ...]
    counted: Counted

    @property
    def num_whole(self) -> int:
        """Requests that were answered with all their tokens."""
        return sum(outcome.is_whole for outcome in self.outcomes)

    @property
    def num_undisturbed(self) -> int:
        """Those that were never preempted; the counts hold the client's own small requests too."""
        return self.num_whole - (self.counted.requests - self.counted.not_preempted)

    @property
    def duration_s(self) -> float:
        """From the first request to the last token."""
        return max(outcome.last_s or 0.0 for outcome in self.outcomes)

    @property
    def ttft_p90_ms(self) -> float:
        """Of the requests that got a token."""
        return percentile([o.ttft_ms for o in self.outcomes if o.ttft_ms is not None], 90)


Found = dict[Side, dict[int, list[Burst]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What both sides are asked."""

    model: Path
    vocabulary: Vocabulary
    budget_bytes: int
    sizes: tuple[int, ...]
    rounds: int
    repeats: int
    logs: Path

    def burst(self, size: int, name: str) -> tuple[Sending, ...]:
        """The requests of a burst; no two bursts have the same prompts, and both sides do."""
        lengths = Lengths(PROMPT_TOKENS, OUTPUT_TOKENS)
        requests = synthesise((lengths,), self.vocabulary, count=size, seed=name)
        return evenly(requests, over_s=SPREAD_S, give_up_s=GIVE_UP_S)


def peers(side: Side, model: str, budget_bytes: int, pool: str) -> dict[str, PeerServer]:
    """The two servers of a side, by the name of what they serve."""
    is_shared = side == "shared"
    flags = (
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--kv-cache-memory-bytes", str(budget_bytes if is_shared else budget_bytes // 2)),
        *("--custom-histogram-buckets", json.dumps(BUCKETS)),
    )
    pooled = {
        "XLLM_XTENSOR__ENABLED": "1",
        "XLLM_XTENSOR__POOL": pool,
        "XLLM_XTENSOR__POOL_BYTES": str(budget_bytes),
    }
    return {
        name: xllm_server(
            model,
            f"{side}, {name} model",
            "elastic KV memory out of one pool" if is_shared else "a fixed KV cache, half",
            flags=(*flags, "--served-model-name", name),
            environment=pooled if is_shared else None,
        )
        for name in MODELS
    }


def counted(server: Server) -> Counted:
    """What a server counts now."""
    with server.client() as client:
        return Counted.of_metrics(client.get("/metrics").raise_for_status().text)


def run_burst(server: Server, name: str, sendings: Sequence[Sending]) -> Burst:
    """Send a burst, and wait until it is answered."""
    before = counted(server)
    sent = send(server.url, name, sendings, window_s=SPREAD_S, check_alive=server.check_alive)
    return Burst(sent.outcomes, counted(server).since(before))


@contextlib.contextmanager
def running(plan: Plan, side: Side, repeat: int, reporter: Reporter) -> Iterator[dict[str, Server]]:
    """Both servers of a side, warm."""
    pool = f"bench-{os.getpid()}-{repeat}"
    try:
        with contextlib.ExitStack() as stack:
            servers = {}
            for name, peer in peers(side, str(plan.model), plan.budget_bytes, pool).items():
                log = plan.logs / f"{side}.{name}.{repeat + 1}.log"
                server = stack.enter_context(peer.server(log, on_wait=reporter.waiting))
                run_burst(server, name, plan.burst(2, f"warm-up of {name}"))
                servers[name] = server
            yield servers
    finally:
        pool_path(pool).unlink(missing_ok=True)


def engine_pid(server: Server) -> int:
    """The process that holds the server's KV cache."""
    with server.client() as client:
        return snapshot_of(client).engine.pid


def measure(plan: Plan, reporter: Reporter) -> tuple[Found, list[int]]:
    """All repeats, the other side first in each; and what a pool's members together had resident.

    Two servers live at a time.
    """
    found: Found = {side: {size: [] for size in plan.sizes} for side in SIDES}
    pooled_bytes: list[int] = []
    for repeat in range(plan.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            reporter.peer(side, repeat, plan.repeats)
            with running(plan, side, repeat, reporter) as servers:
                pids = [engine_pid(server) for server in servers.values()]

                def kv_bytes(pids: Sequence[int] = pids) -> int:
                    return sum(resident(pid).shared_bytes for pid in pids)

                with Sampler(kv_bytes, every_s=SAMPLE_EVERY_S) as sampler:
                    alternate(plan, found[side], servers, repeat, reporter)
                if side == "shared":
                    pooled_bytes += sampler.samples
    return found, pooled_bytes


def alternate(
    plan: Plan,
    found: Mapping[int, list[Burst]],
    servers: Mapping[str, Server],
    repeat: int,
    reporter: Reporter,
) -> None:
    """One model's burst after the other's, each when the one before is answered."""
    for size, bursts in found.items():
        for round_ in range(plan.rounds):
            for name, server in servers.items():
                reporter.doing(f"{size} requests for the {name} model")
                sendings = plan.burst(size, f"{name}, {size}, {repeat}, {round_}")
                burst = run_burst(server, name, sendings)
                reporter.line(
                    f"{burst.num_undisturbed} of {size} without preemption, "
                    f"{burst.duration_s:.1f} s"
                )
                bursts.append(burst)
                reporter.done()


def rows(found: Found, sizes: Sequence[int]) -> list[Row]:
    """A table a size, a line a side."""
    return [
        Row(
            table=f"Bursts of {size} requests",
            labels={"KV memory": side},
            figures=(
                Figure.of("without preemption", "", [b.num_undisturbed for b in bursts]),
                Figure.of("preemptions", "", [b.counted.preemptions for b in bursts]),
                Figure.of("burst answered in", "s", [b.duration_s for b in bursts]),
                Figure.of("TTFT p90", "ms", [b.ttft_p90_ms for b in bursts]),
            ),
        )
        for size in sizes
        for side, bursts in ((side, found[side][size]) for side in SIDES)
    ]


def checks(plan: Plan, found: Found, pooled_bytes: Sequence[int]) -> list[Check]:
    """Everything is answered, the pool is never overdrawn, and sharing serves more."""
    every = [burst for by_size in found.values() for bursts in by_size.values() for burst in bursts]
    most = max(pooled_bytes)
    largest = max(plan.sizes)
    shared, split = (sum(b.num_undisturbed for b in found[side][largest]) for side in SIDES)
    return [
        whole_check([outcome for burst in every for outcome in burst.outcomes]),
        Check(
            name="both engines of a pool together stay within its budget",
            passed=most <= plan.budget_bytes + len(MODELS) * OTHER_SHARED_BYTES,
            detail=(
                f"{most / 2**20:.1f} MiB of shared memory resident at most, budget "
                f"{plan.budget_bytes / 2**20:.1f} MiB, sampled every {SAMPLE_EVERY_S * 1e3:g} ms"
            ),
        ),
        Check(
            name=f"bursts of {largest}: shared serves {AT_LEAST:g} times as many undisturbed",
            passed=shared > 0 and shared >= AT_LEAST * split,
            detail=f"{shared} and {split}" + (f", {shared / split:.2f} times" if split else ""),
        ),
    ]


def notes(plan: Plan) -> tuple[str, ...]:
    """How to read the figures."""
    num_bursts = plan.repeats * plan.rounds * len(MODELS)
    return (
        (
            f"Both models are {plan.model.name}. Budget {plan.budget_bytes / 2**20:.1f} MiB, which "
            f"{BUDGET_REQUESTS} requests of {MAX_MODEL_LEN} tokens fill; split, each server has "
            "half of it as a fixed cache."
        ),
        (
            f"{num_bursts} bursts of each size and side, half to each model, in turn: a burst "
            f"begins when the other model's is answered. Its requests arrive within {SPREAD_S:g} "
            f"s; each has {PROMPT_TOKENS} random tokens and takes {OUTPUT_TOKENS}."
        ),
        (
            "without preemption: answered, and never preempted, by vLLM's histogram "
            f"{REQUESTS} with a bucket for none. A preempted request is answered as well, later: "
            "its tokens are computed again."
        ),
    )


NOT_SHOWN = (
    (
        "Bursts that come together: then each model has half. And bursts that half the budget "
        "holds: the smaller size shows that nothing is won there."
    ),
    "Models of different sizes, and more than two.",
    (
        "A split with elastic memory or another scheduler. One that admits no more than fits to "
        "the end would preempt nobody and let requests wait instead."
    ),
)


@click.command(NAME)
@common_options(NAME)
@model_option
@keep_logs_option
@click.option("--repeats", type=click.IntRange(min=1), help=f"[default: {REPEATS}]")
def command(
    *, quick: bool, json_path: Path, model: str, keep_logs: Path | None, repeats: int | None
) -> None:
    """Two models, alternating bursts: one budget of KV memory, or half of it each?

    Two servers at a time, about 3 GiB.  Takes about seven minutes on two cores; with --quick two.
    """
    folder = model_folder(model)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    with log_folder(keep_logs) as logs:
        plan = Plan(
            model=folder,
            vocabulary=Vocabulary.of_model(folder),
            budget_bytes=BUDGET_REQUESTS * MAX_MODEL_LEN * kv_bytes_per_token(folder),
            sizes=QUICK_BURSTS if quick else BURSTS,
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            repeats=repeats or (QUICK_REPEATS if quick else REPEATS),
            logs=logs,
        )
        total = plan.repeats * len(SIDES) * len(plan.sizes) * plan.rounds * len(MODELS)
        with Reporter(console, total, first="starting the servers") as reporter:
            found, pooled_bytes = measure(plan, reporter)
    servers = [
        peer
        for side in SIDES
        for peer in peers(side, str(folder), plan.budget_bytes, "bench").values()
    ]
    result = run.finish(
        peers=[server.record(str(folder)) for server in servers],
        rows=rows(found, plan.sizes),
        checks=checks(plan, found, pooled_bytes),
        notes=notes(plan),
        not_shown=NOT_SHOWN,
        details={
            side: {
                str(size): [
                    {
                        "without_preemption": burst.num_undisturbed,
                        "preemptions": burst.counted.preemptions,
                        "duration_s": burst.duration_s,
                        "ttft_p90_ms": burst.ttft_p90_ms,
                    }
                    for burst in bursts
                ]
                for size, bursts in by_size.items()
            }
            for side, by_size in found.items()
        },
    )
    conclude(result, json_path, console)
