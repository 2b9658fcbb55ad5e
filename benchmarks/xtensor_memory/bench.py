"""Does a server's memory follow what it keeps?  See README.md beside this file."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import httpx
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.commands import beside, conclude, log_folder, model_folder
from xllm_plugin.bench.engine_memory import Sampler, memory_of, resident, snapshot_of
from xllm_plugin.bench.open_loop import Sending, Sent, evenly, send
from xllm_plugin.bench.options import (
    command_line,
    common_options,
    keep_logs_option,
    model_option,
)
from xllm_plugin.bench.peers import PeerServer, xllm_server
from xllm_plugin.bench.plots import plot_over_time
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.promises import whole_check
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.servers import Server
from xllm_plugin.bench.traces import Lengths, Vocabulary, read_lengths, synthesise
from xllm_plugin.models.cache import ModelCache

FOLDER = Path(__file__).resolve().parent
TRACE = FOLDER.parent / "serving" / "data" / "azure-conv.jsonl"

if TYPE_CHECKING:
    from benchmarks.xtensor_memory import set_up, sleeping
else:
    set_up, sleeping = (beside(FOLDER, name) for name in ("set_up", "sleeping"))

NAME = "xtensor_memory"
QUESTION = (
    "Does an elastic server's memory follow what it keeps, and how fast does it sleep and wake?"
)

SERVED = "model"
COMPRESSION: Final = 20
"""An hour in three minutes: the two settings that are times are shorter by as much."""
CACHE_IDLE_S, KEEP_IDLE_S = 60.0 / COMPRESSION, 10.0 / COMPRESSION
PREMAP_SLABS = 1
WINDOW_S, QUICK_WINDOW_S = 3600.0 / COMPRESSION, 30.0
BURSTS = Bursts(cycle_s=30.0, length_s=6.0, factor=10.0)
REQUESTS_PER_S = 0.7
MAX_INPUT, MAX_OUTPUT = 1024, 128
WARM_UP_REQUESTS = 8
SLEEPS, QUICK_SLEEPS = 5, 2
SET_UPS, QUICK_SET_UPS = 5, 2
KV_BYTES = 2**30
GIVE_UP_S = 600.0
SAMPLE_EVERY_S = 0.25
KEEPER_S = 1.0
"""How often the page keeper looks at what nobody uses."""
LAG_S = 0.5
"""Time between two samples, with room."""
KEEPS_S = CACHE_IDLE_S + KEEPER_S + LAG_S
"""How long blocks of a request that has ended are live, for the prefix cache may find them."""
RESERVE_S = KEEP_IDLE_S + KEEPER_S + LAG_S
IDLE_S = CACHE_IDLE_S + KEEP_IDLE_S + 5.0
IDLE_WITHIN: Final = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment.

    Attributes:
        at_s: seconds from the first sample.
        told: number of the engine's picture; it makes one when a step ends, ten a second at most.
        live_bytes: of blocks that requests hold or the prefix cache may find, and of vLLM's null
            block, by the engine.
        slab_bytes: the unit in which memory comes and goes.
        num_dropped_slabs: that were cached and have not been used for long, total.
        num_requests: that run, or wait and may have a slab when the step ends.
        kv_bytes: resident pages of the KV cache, by the kernel.
        all_bytes: the engine's resident memory, by the kernel.
    """

    at_s: float
    told: int
    live_bytes: int
    slab_bytes: int
    num_dropped_slabs: int
    num_requests: int
    kv_bytes: int
    all_bytes: int


class Observer:
    """Looks at a server's engine."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._started_s = time.monotonic()
        self._pid = snapshot_of(client).engine.pid

    def sample(self) -> Sample:
        """What it is like now."""
        # In this order, the step that has taken memory has not been told of, or just was.
        found = resident(self._pid)
        seen = snapshot_of(self._client)
        memory = memory_of(seen)
        return Sample(
            at_s=time.monotonic() - self._started_s,
            told=seen.sequence,
            live_bytes=memory.kept_bytes,
            slab_bytes=memory.slab_bytes,
            num_dropped_slabs=memory.num_dropped_slabs,
            num_requests=seen.load.num_running + seen.load.num_waiting,
            kv_bytes=found.shared_bytes,
            all_bytes=found.all_bytes,
        )


@dataclass(frozen=True, slots=True)
class Hour:
    """What was seen, and what became of the requests.

    Attributes:
        ready: when the server was.
        start: idle, after a first batch of requests has warmed it up.
        samples: while requests came.
        end: idle again.
        sent: the requests.
    """

    ready: Sample
    start: Sample
    samples: list[Sample]
    end: Sample
    sent: Sent


def allowed_bytes(samples: Sequence[Sample], at: int) -> int:
    """What may be resident at a sample: live KV, a slab a request, and the reserve.

    The reserve is what was live until `RESERVE_S` before, for what is given back stays a while for
    whoever needs it next, and the slab mapped ahead.  Of a request that has ended the cache may
    keep the last slab, part of which is nobody's, for another `KEEPS_S`.  What a step takes is
    resident when it runs and told of when it ends, so what is told next counts as well.  What the
    cache has dropped since the sample before was live until then, beside what was taken meanwhile.
    """
    now = samples[at]
    told_next = (n for n in range(at, len(samples)) if samples[n].told > now.told)
    known = samples[: next(told_next, at) + 1]
    first = next(n for n, one in enumerate(known) if one.at_s >= now.at_s - RESERVE_S)
    recent, before = known[first:], known[max(0, first - 1)]
    live = max(
        two.live_bytes + (two.num_dropped_slabs - one.num_dropped_slabs) * two.slab_bytes
        for one, two in pairwise([before, *recent])
    )
    kept_since_s = now.at_s - RESERVE_S - KEEPS_S
    num_kept = max(one.num_requests for one in known if one.at_s >= kept_since_s)
    slabs = num_kept + PREMAP_SLABS
    return live + slabs * now.slab_bytes


def other_bytes(samples: Sequence[Sample]) -> int:
    """Shared memory of the engine that is none of the KV cache's, which comes in whole slabs."""
    return min(sample.kv_bytes % sample.slab_bytes for sample in samples)


def excess_bytes(samples: Sequence[Sample]) -> int:
    """The most by which resident KV was beyond what is allowed; negative if it never was."""
    beyond = (one.kv_bytes - allowed_bytes(samples, at) for at, one in enumerate(samples))
    return max(beyond) - other_bytes(samples)


def peer(model: str) -> PeerServer:
    """The server."""
    return xllm_server(
        model,
        "xllm",
        "elastic KV memory, sleep mode",
        flags=(
            *("--served-model-name", SERVED),
            *("--max-model-len", "2048"),
            *("--kv-cache-memory-bytes", str(KV_BYTES)),
            "--enable-sleep-mode",
        ),
        environment={
            "VLLM_SERVER_DEV_MODE": "1",
            "XLLM_XTENSOR__ENABLED": "1",
            "XLLM_XTENSOR__CACHE_IDLE_S": f"{CACHE_IDLE_S:g}",
            "XLLM_XTENSOR__KEEP_IDLE_S": f"{KEEP_IDLE_S:g}",
            "XLLM_XTENSOR__PREMAP_SLABS": str(PREMAP_SLABS),
        },
    )


def traffic(lengths: Sequence[Lengths], vocabulary: Vocabulary, window_s: float) -> list[Sending]:
    """Requests of the trace's lengths, at bursty moments."""
    moments = BURSTS.arrivals(REQUESTS_PER_S, window_s, NAME)
    requests = synthesise(
        random.Random(NAME).sample(lengths, len(moments)),
        vocabulary,
        count=len(moments),
        seed=NAME,
        max_input=MAX_INPUT,
        max_output=MAX_OUTPUT,
    )
    return [
        Sending(due_s, TRACE.stem, one.prompt, one.output_tokens, due_s + GIVE_UP_S)
        for due_s, one in zip(moments, requests, strict=True)
    ]


def warm_up(vocabulary: Vocabulary) -> tuple[Sending, ...]:
    """Some requests of the largest size at once."""
    largest = Lengths(MAX_INPUT, MAX_OUTPUT)
    requests = synthesise((largest,), vocabulary, count=WARM_UP_REQUESTS, seed="warm-up")
    return evenly(requests, give_up_s=GIVE_UP_S)


def measure(server: Server, plan: Plan, reporter: Reporter) -> Hour:
    """Warm up, idle, the hour, idle."""
    with server.client(GIVE_UP_S) as client:
        observer = Observer(client)
        ready = observer.sample()
        reporter.doing("warming up")
        send(server.url, SERVED, warm_up(plan.vocabulary), window_s=1.0)
        time.sleep(IDLE_S)
        start = observer.sample()
        reporter.done()
        sendings = traffic(plan.lengths, plan.vocabulary, plan.window_s)
        reporter.doing(f"{len(sendings)} requests within {plan.window_s:g} s")
        with Sampler(observer.sample, every_s=SAMPLE_EVERY_S) as sampler:
            sent = send(
                server.url,
                SERVED,
                sendings,
                window_s=plan.window_s,
                check_alive=server.check_alive,
            )
            time.sleep(IDLE_S)
        reporter.done()
        return Hour(ready, start, sampler.samples, observer.sample(), sent)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of the server."""

    model: Path
    vocabulary: Vocabulary
    lengths: tuple[Lengths, ...]
    window_s: float
    num_sleeps: int


def rows(hour: Hour) -> list[Row]:
    """How memory followed, and what was left of it."""
    mib = 2**20
    samples = hour.samples
    followed = (
        ("live KV (used and cached), by the engine", [s.live_bytes / mib for s in samples]),
        ("resident KV pages, by the kernel", [s.kv_bytes / mib for s in samples]),
        ("the engine's resident memory", [s.all_bytes / mib for s in samples]),
    )
    found = [
        Row(
            table="While requests came",
            labels={"memory": memory},
            figures=(
                Figure.of("mean", "MiB", [statistics.fmean(values)]),
                Figure.of("least", "MiB", [min(values)]),
                Figure.of("most", "MiB", [max(values)]),
            ),
        )
        for memory, values in followed
    ]
    found += [
        Row(
            table="Before and after",
            labels={"when": when},
            figures=(
                Figure.of("KV pages", "MiB", [sample.kv_bytes / mib]),
                Figure.of("engine", "MiB", [sample.all_bytes / mib]),
                Figure.of("times idle, before", "", [sample.all_bytes / hour.start.all_bytes]),
            ),
        )
        for when, sample in (
            ("ready", hour.ready),
            ("idle, before", hour.start),
            ("idle, after", hour.end),
        )
    ]
    return found


def checks(hour: Hour) -> list[Check]:
    """Memory followed, and went; every request was answered."""
    excess = excess_bytes(hour.samples)
    slab_bytes = hour.end.slab_bytes
    ratio = hour.end.all_bytes / hour.start.all_bytes
    return [
        Check(
            name="resident KV is within live KV, one slab a request and the reserve",
            passed=excess <= 0,
            detail=(
                f"at the tightest of {len(hour.samples)} samples {abs(excess) / 2**20:.1f} MiB "
                f"{'beyond' if excess > 0 else 'below'}; a slab has {slab_bytes / 2**20:.2f} MiB"
            ),
        ),
        Check(
            name=f"idle again: within {IDLE_WITHIN:.0%} of the engine's memory at the start",
            passed=ratio <= 1 + IDLE_WITHIN,
            detail=f"{ratio:.3f} times",
        ),
        whole_check(hour.sent.outcomes),
    ]


def notes(plan: Plan) -> tuple[str, ...]:
    """How to read the figures."""
    return (
        (
            f"Model {plan.model.name}; a KV cache of {KV_BYTES / 2**30:g} GiB at most. Lengths of "
            f"{TRACE.stem}, prompts cut at {MAX_INPUT} and outputs at {MAX_OUTPUT} tokens; "
            f"{REQUESTS_PER_S:g} requests/s in the mean over {plan.window_s:g} s, {BURSTS}."
        ),
        (
            f"The hour is compressed {COMPRESSION} times, and with it what the settings count in "
            f"seconds: xtensor.cache_idle_s={CACHE_IDLE_S:g} (for a minute; five are the default), "
            f"xtensor.keep_idle_s={KEEP_IDLE_S:g}."
        ),
        (
            f"The reserve: what was live up to {RESERVE_S:g} s before (keep_idle_s, the "
            f"{KEEPER_S:g} s between two looks of the keeper, and {LAG_S:g} s for two samples), "
            "and one slab mapped ahead. What the step under way takes is resident already; the "
            "engine tells of it when the step ends. What the cache dropped between two samples was "
            "live between them. A request that waits counts as one, for it may run when the step "
            "ends."
        ),
        (
            f"Idle, before: {IDLE_S:g} s after {WARM_UP_REQUESTS} requests of the largest size "
            "have been answered, for what a process needs once and keeps (OpenMP's threads, "
            "buffers for the largest batch) is none of the KV cache's matter. Memory is that of "
            "the engine's process."
        ),
        (
            f"Sleep: {sleeping.NUM_REQUESTS} requests with prompts of {sleeping.PROMPT_TOKENS} "
            "tokens decode; `/sleep?level=1&mode=keep`, then the weights are woken, then the KV "
            "cache. Times are those of the engine's log. The memory of blocks comes back with the "
            "first steps afterwards, which compute the kept requests' prompts again."
        ),
        (
            "KV set-up: the buffer of this model in this process, set up and given back in turn, "
            "by `torch.zeros` as stock vLLM does and by the code of this plugin's workers. The "
            "kernel zeroes each page later, when it is first used or committed."
        ),
    )


NOT_SHOWN = (
    "An hour. What grows by the hour and not by the request would not be seen.",
    (
        "A fixed KV cache beside it: it is zeroed by the kernel when a page is first used, and "
        "keeps every page that it ever used."
    ),
    "Weights read back from a disk: they still lie in the page cache here.",
)


def draw(hour: Hour, path: Path) -> bool:
    """Live KV and resident pages over time; False without matplotlib."""
    lines = {
        "live KV, by the engine": [(s.at_s, s.live_bytes / 2**20) for s in hour.samples],
        "resident KV pages, by the kernel": [(s.at_s, s.kv_bytes / 2**20) for s in hour.samples],
    }
    try:
        plot_over_time(lines, y="MiB", title="KV memory under bursts", path=path)
    except ImportError:
        return False
    return True


@click.command(NAME)
@common_options(NAME)
@model_option
@keep_logs_option
def command(*, quick: bool, json_path: Path, model: str, keep_logs: Path | None) -> None:
    """Does an elastic server's memory follow what it keeps?  And sleep and waking.

    One server, and a KV buffer before it: about 3 GiB.  Takes about six minutes on two cores; with
    --quick two.
    """
    folder = model_folder(model)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    plan = Plan(
        model=folder,
        vocabulary=Vocabulary.of_model(folder),
        lengths=read_lengths(TRACE),
        window_s=QUICK_WINDOW_S if quick else WINDOW_S,
        num_sleeps=QUICK_SLEEPS if quick else SLEEPS,
    )
    served = peer(str(folder))
    sleep_folder = ModelCache.at().root / "sleep"
    with (
        log_folder(keep_logs) as logs,
        Reporter(console, 4, first="setting KV caches up") as reporter,
    ):
        layout = set_up.layout_of(folder)
        set_ups = set_up.measure(layout, QUICK_SET_UPS if quick else SET_UPS)
        reporter.done()
        with served.server(logs / "server.log", on_wait=reporter.waiting) as server:
            hour = measure(server, plan, reporter)
            reporter.doing("sleep and waking")
            sleeps, slept = sleeping.measure(
                server, SERVED, plan.vocabulary, sleep_folder, plan.num_sleeps
            )
            reporter.done()
    picture = json_path.with_suffix(".png")
    shown = [f"![KV memory under bursts]({picture.name})"] if draw(hour, picture) else []
    result = run.finish(
        peers=[served.record(str(folder))],
        rows=[*rows(hour), *sleeping.figures(sleeps), *set_up.figures(set_ups, layout)],
        checks=[
            *checks(hour),
            *sleeping.checks(sleeps, slept),
            *set_up.checks(set_ups, layout),
        ],
        notes=[*notes(plan), *shown],
        not_shown=NOT_SHOWN,
        details={
            "samples": [asdict(sample) for sample in hour.samples],
            "sleeps": [asdict(sleep) for sleep in sleeps],
            "set_ups": {form: asdict(one) for form, one in set_ups.items()},
        },
    )
    conclude(result, json_path, console)
