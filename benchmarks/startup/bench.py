"""How long from process start to the first token?  See README.md beside this file."""

from __future__ import annotations

import contextlib
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from pydantic import BaseModel, ConfigDict
from rich.console import Console

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.commands import (
    beside,
    conclude,
    log_folder,
    model_folder,
    names_in,
    require_known,
)
from xllm_plugin.bench.options import command_line, common_options, peer_options
from xllm_plugin.bench.peers import PEER_NAMES, PeerServer, peer_servers
from xllm_plugin.bench.progress import Reporter
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.bench.servers import Server, Waiting, find_free_port
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.testing.equality import Completion, Spread

FOLDER = Path(__file__).resolve().parent

if TYPE_CHECKING:
    from benchmarks.startup import stream
else:
    stream = beside(FOLDER, "stream")

NAME = "startup"
QUESTION = "How long does each peer take from process start to the first token?"
REFERENCE = "stock-best"
EAGER = "stock-best-eager"
REFERENCES = (REFERENCE, EAGER)
"""The fastest stock form once it has started, and the one that starts fastest."""
PEERS = (*PEER_NAMES[: PEER_NAMES.index(REFERENCE) + 1], EAGER, "xllm")
QUICK_PEERS = (EAGER, "xllm")
COLD, WARM = "cold", "warm"

FAST_PEERS = (EAGER, "xllm")
"""Start in seconds, so they are repeated; the others compile for minutes and start once."""

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64
SECOND_AT_S = 15.0
POLL_S = 0.1

CACHES: Final[Mapping[str, str]] = {
    "VLLM_CACHE_ROOT": "vllm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "XLLM_CACHE_DIR": "xllm",
}
"""Variable -> subfolder: everything that an earlier start may have compiled.  Not the model, which
every peer gets by its absolute path, and not the hub's folder."""

MARKS: Final[Mapping[str, str]] = {
    "server's imports": "non-default args:",
    "engine's start": "Initializing a V1 LLM engine",
    "loading": "init engine (profile",
}
"""Phase -> what vLLM's log says at its end, in this order."""

_COMPILED_AGAIN = "Compiling model again due to a load failure"


class Start(BaseModel):
    """What one start gave; times are seconds since the process was started."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ready_s: float
    first_token_s: float
    tpot_ms: float
    """Of the first tokens."""
    second_at_s: float
    """When the second request was sent: at 15 s, or when the first was answered if later."""
    second_tpot_ms: float
    rss_bytes: int
    """Of all its processes, after the first answer."""
    marks_s: dict[str, float]
    """Phase -> when the log told its end, for those it told of."""
    compiled_again: bool
    """Whether vLLM found a compiled model in its cache and could not load it."""


class LogWatch:
    """Notes when a server's log says that a phase of its start has ended."""

    def __init__(self, log: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.marks_at_s: dict[str, float] = {}
        self._log = log
        self._clock = clock

    def look(self) -> None:
        """Read the log; to be called often while the server starts."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        for phase, mark in MARKS.items():
            if phase not in self.marks_at_s and mark in text:
                self.marks_at_s[phase] = self._clock()


@dataclass(slots=True)
class Measured:
    """What one peer gave, gathered over the repeats."""

    peer: PeerServer
    starts: dict[str, list[Start]] = field(default_factory=dict)
    """Condition -> repeats."""
    outputs: tuple[Completion, ...] = ()
    noise: Spread | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of every peer."""

    model: Path
    vocabulary: Vocabulary
    conditions: tuple[str, ...]
    repeats: int
    log_folder: Path

    def prompt(self, number: int) -> list[int]:
        """Random tokens, the same for every peer; another prompt for every `number`."""
        rng = random.Random(f"startup {number}")
        return rng.choices(self.vocabulary.ordinary(), k=PROMPT_TOKENS)


def startup_peers(
    model: str, *, port: int, flags: Sequence[str], names: Sequence[str]
) -> tuple[PeerServer, ...]:
    """The peers called `names`, in that order.  Raises `ConfigError` for unknown ones."""
    require_known("peers", names, PEERS)
    return tuple(_peer(model, port, tuple(flags), name) for name in names)


def _peer(model: str, port: int, flags: tuple[str, ...], name: str) -> PeerServer:
    if name != EAGER:
        return peer_servers(model, port=port, flags=flags, names=(name,))[0]
    (compiled,) = peer_servers(model, port=port, flags=flags, names=(REFERENCE,))
    what = f"{compiled.what}, nothing compiled"
    return compiled.changed(EAGER, what, flags=("--enforce-eager",))


def cache_environment(caches: Path | None) -> dict[str, str]:
    """Variables that put every compile cache under `caches`; none when the user's are wanted."""
    if caches is None:
        return {}
    return {variable: str(caches / folder) for variable, folder in CACHES.items()}


@contextlib.contextmanager
def cache_folder(conditions: Sequence[str]) -> Iterator[Path | None]:
    """A folder for the caches of one peer's cold start and of the warm one after it.

    Without a cold start the warm one uses what the user has.
    """
    if COLD not in conditions:
        yield None
        return
    with tempfile.TemporaryDirectory(
        prefix="xllm-bench-caches-", ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def measure(plan: Plan, peers: Sequence[PeerServer], console: Console) -> list[Measured]:
    """Interleave the peers: every repeat starts each of them, beginning with another one.

    Those that compile take part in the first repeat alone.
    """
    measured = [Measured(peer) for peer in peers]
    rounds = [
        [one for one in measured if repeat == 0 or one.peer.name in FAST_PEERS]
        for repeat in range(plan.repeats)
    ]
    total = sum(map(len, rounds)) * len(plan.conditions)
    with Reporter(console, total, first="starting") as reporter:
        for repeat, taking_part in enumerate(rounds):
            turn = repeat % max(1, len(taking_part))
            for one in taking_part[turn:] + taking_part[:turn]:
                measure_repeat(plan, one, repeat, reporter, is_reference=one is measured[0])
    return measured


def measure_repeat(
    plan: Plan, one: Measured, repeat: int, reporter: Reporter, *, is_reference: bool
) -> None:
    """A peer's cold start, then a warm one."""
    with cache_folder(plan.conditions) as caches:
        for condition in plan.conditions:
            reporter.peer(f"{one.peer.name}, {condition}", repeat, plan.repeats)
            log = plan.log_folder / f"{one.peer.name}.{condition}.{repeat + 1}.log"
            watch = LogWatch(log)
            server = server_of(one.peer, caches, log, while_waiting(watch, reporter))
            start = measure_start(plan, one, server, watch, reporter, is_reference=is_reference)
            one.starts.setdefault(condition, []).append(start)
            reporter.line(_line(start))
            reporter.done()


def _line(start: Start) -> str:
    return (
        f"ready {start.ready_s:.1f} s, first token {start.first_token_s:.1f} s, "
        f"TPOT {start.tpot_ms:.1f} ms, from {start.second_at_s:.0f} s on "
        f"{start.second_tpot_ms:.1f} ms, {start.rss_bytes / 2**30:.2f} GiB"
    )


def while_waiting(watch: LogWatch, reporter: Reporter) -> Callable[[Waiting], None]:
    """What to do each time that a server was not ready."""

    def look(waiting: Waiting) -> None:
        watch.look()
        reporter.waiting(waiting)

    return look


def measure_start(
    plan: Plan,
    one: Measured,
    server: Server,
    watch: LogWatch,
    reporter: Reporter,
    *,
    is_reference: bool,
) -> Start:
    """Start a peer's server, ask it twice, and stop it; the first time also collect outputs."""
    started_s = time.monotonic()
    with server:
        ready_s = time.monotonic() - started_s
        watch.look()
        reporter.doing("first request")
        first = ask(server, plan, 1)
        rss_bytes = tree_rss_bytes(server)
        reporter.doing(f"waiting until {SECOND_AT_S:g} s after the start")
        time.sleep(max(0.0, started_s + SECOND_AT_S - time.monotonic()))
        second_at_s = time.monotonic() - started_s
        second = ask(server, plan, 2)
        if not one.outputs:
            reporter.doing("collecting outputs to compare")
            collect_outputs(plan, one, server.url, is_reference=is_reference)
    return Start(
        ready_s=ready_s,
        first_token_s=first.first_at_s - started_s,
        tpot_ms=first.tpot_ms,
        second_at_s=second_at_s,
        second_tpot_ms=second.tpot_ms,
        rss_bytes=rss_bytes,
        marks_s={phase: at_s - started_s for phase, at_s in watch.marks_at_s.items()},
        compiled_again=_COMPILED_AGAIN in server.log_path.read_text(errors="replace"),
    )


def server_of(
    peer: PeerServer, caches: Path | None, log: Path, on_wait: Callable[[Waiting], None]
) -> Server:
    """The peer's server, not started; its caches under `caches` or, for None, the user's own."""
    return peer.server(log, more=cache_environment(caches), poll_s=POLL_S, on_wait=on_wait)


def ask(server: Server, plan: Plan, number: int) -> stream.Streamed:
    """One streamed completion.  Raises `NotNowError`, with the log's end if the server has died."""
    try:
        return stream.complete(server.url, str(plan.model), plan.prompt(number), OUTPUT_TOKENS)
    except NotNowError:
        server.check_alive()
        raise


def tree_rss_bytes(server: Server) -> int:
    """Resident memory of the server's process and all below it; shared pages count in each."""
    import psutil  # type: ignore[import-untyped]  # vLLM brings it, without types

    root = psutil.Process(server.pid)
    total = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def collect_outputs(plan: Plan, one: Measured, url: str, *, is_reference: bool) -> None:
    """Greedy outputs, and the reference's spread when it gets the prompts all at once."""
    requests = outputs.prompts(plan.vocabulary, seed=0)
    one.outputs = outputs.collect(url, str(plan.model), requests)
    if is_reference:
        together = outputs.collect(url, str(plan.model), requests, at_once=len(requests))
        one.noise = outputs.self_noise(one.outputs, together)


def rows(measured: Sequence[Measured], conditions: Sequence[str]) -> list[Row]:
    """Two tables a condition, one line a peer; ratios are taken within a repeat."""
    references = {one.peer.name: one.starts for one in measured if one.peer.name in REFERENCES}
    return [
        Row(table=table, labels={"peer": one.peer.name}, figures=columns)
        for condition in conditions
        for table, tabulated in (
            (f"{condition.capitalize()} start", figures),
            (f"{condition.capitalize()} start, phase by phase", phases),
        )
        for one in measured
        for columns in (
            tabulated(
                one.starts[condition],
                {name: starts[condition] for name, starts in references.items()},
            ),
        )
        if columns
    ]


def phases(
    starts: Sequence[Start], references: Mapping[str, Sequence[Start]]
) -> tuple[Figure, ...]:
    """How long each phase took; none if a log did not tell of all."""
    del references
    if not all(set(start.marks_s) == set(MARKS) for start in starts):
        return ()
    ends = [
        (0.0, *(start.marks_s[phase] for phase in MARKS), start.ready_s, start.first_token_s)
        for start in starts
    ]
    names = (*MARKS, "serving", "first request")
    return tuple(
        Figure.of(name, "s", [end[index + 1] - end[index] for end in ends])
        for index, name in enumerate(names)
    )


def figures(
    starts: Sequence[Start], references: Mapping[str, Sequence[Start]]
) -> tuple[Figure, ...]:
    """The columns; those with ratios for the references that were measured.

    A reference that takes part in the first repeat alone is compared in that one.
    """
    found = [
        Figure.of("ready", "s", [start.ready_s for start in starts]),
        Figure.of("first token", "s", [start.first_token_s for start in starts]),
    ]
    for name, bases in references.items():
        ratios = [
            start.first_token_s / base.first_token_s
            for start, base in zip(starts, bases, strict=False)
        ]
        found.append(Figure.of(f"times {name}", "", ratios))
    found += [
        Figure.of(f"TPOT of the first {OUTPUT_TOKENS}", "ms", [start.tpot_ms for start in starts]),
        Figure.of("second request at", "s", [start.second_at_s for start in starts]),
        Figure.of("its TPOT", "ms", [start.second_tpot_ms for start in starts]),
    ]
    if REFERENCE in references:
        ratios = [
            start.second_tpot_ms / base.second_tpot_ms
            for start, base in zip(starts, references[REFERENCE], strict=False)
        ]
        found.append(Figure.of(f"its TPOT, times {REFERENCE}", "", ratios))
    rss_gib = [start.rss_bytes / 2**30 for start in starts]
    return (*found, Figure.of("memory (RSS)", "GiB", rss_gib))


def checks(measured: Sequence[Measured]) -> list[Check]:
    """Every peer's outputs equal to the first one's."""
    reference, *others = measured
    assert reference.noise is not None
    noise = reference.noise
    return [
        outputs.compare(
            other.peer.name, reference.peer.name, reference.outputs, other.outputs, noise
        )
        for other in others
    ]


def notes(plan: Plan, measured: Sequence[Measured]) -> tuple[str, ...]:
    """How to read the figures."""
    found = [
        (
            f"Model {plan.model.name}. Times count from the start of the server's process; "
            f"`/health` is asked every {POLL_S * 1e3:g} ms. The first request is sent when it "
            f"answers, the second {SECOND_AT_S:g} s after process start, or when the first is "
            f"answered if that is later; each has {PROMPT_TOKENS} random tokens and takes "
            f"{OUTPUT_TOKENS}, streamed."
        ),
        _conditions_note(plan.conditions),
        (
            "memory: resident memory of all processes of the server after the first answer; pages "
            "that processes share count in each."
        ),
    ]
    found.append(
        "Phase by phase: server's imports, until vLLM has read its arguments; engine's start, "
        "until its process begins to build the engine; loading, until the model is loaded and, "
        "where it is, compiled; serving, until `/health` answers. Read off the log every "
        f"{POLL_S * 1e3:g} ms."
    )
    if plan.repeats > 1:
        found.append(f"Peers other than {', '.join(FAST_PEERS)} compile, and start once.")
    if len(measured) > 1:
        found.append(
            f"Outputs compared: {outputs.NUM_OUTPUT_PROMPTS} prompts of "
            f"{outputs.OUTPUT_PROMPT_TOKENS} random tokens, {outputs.OUTPUT_TOKENS} greedy tokens "
            "each, sent one at a time. A difference is a near-tie if it is no larger than the "
            "first peer's from itself when it gets all prompts at once."
        )
    again = compiled_again(measured)
    return (*found, *([again] if again else []))


def _conditions_note(conditions: Sequence[str]) -> str:
    if COLD not in conditions:
        return (
            "warm: with the caches that this user has; a peer that never ran here with these flags "
            "compiles all the same."
        )
    folders = ", ".join(f"`{variable}`" for variable in CACHES)
    return (
        f"cold: {folders} are new empty folders; the model stays where it is. warm: the next start "
        "of the same peer, with the caches that the cold one has left."
    )


def compiled_again(measured: Sequence[Measured]) -> str:
    """Which warm starts compiled although their cache was full, or nothing."""
    found = []
    for one in measured:
        starts = one.starts.get(WARM, [])
        count = sum(start.compiled_again for start in starts)
        if count:
            found.append(f"{one.peer.name} in {count} of {len(starts)}")
    if not found:
        return ""
    return (
        f"Warm starts in which vLLM could not load the compiled model from its cache, said so in "
        f"its log and compiled again: {', '.join(found)}."
    )


NOT_SHOWN = (
    (
        "A machine that has just booted: program files and the model's are in the page cache, for "
        "every peer alike."
    ),
    "Downloading a model, large models, and many requests that wait for the start.",
    "Server and client share the machine's cores.",
)


@click.command(NAME)
@common_options(NAME)
@click.option("--peers", help=f"In this order.  [default: {','.join(PEERS)}]")
@peer_options
@click.option("--conditions", help=f"cold, warm or both.  [default: {COLD},{WARM}]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    help="Of the peers that do not compile; the others start once.  [default: 3]",
)
def command(
    *,
    quick: bool,
    json_path: Path,
    peers: str | None,
    model: str,
    conditions: str | None,
    repeats: int | None,
    vllm_args: str,
    port: int | None,
    keep_logs: Path | None,
) -> None:
    """How long from process start to the first token, with empty caches and with full ones?

    Starts each peer in turn and asks it for a streamed completion.  Takes about 20 minutes on two
    cores; with --quick (two peers, warm) two.
    """
    wanted = chosen_conditions(conditions or (WARM if quick else f"{COLD},{WARM}"))
    names = names_in(peers) if peers is not None else (QUICK_PEERS if quick else PEERS)
    startup_peers("-", port=0, flags=(), names=names)  # a wrong name ends before a model is built
    folder = model_folder(model)
    flags = shlex.split(vllm_args)
    servers = startup_peers(str(folder), port=port or find_free_port(), flags=flags, names=names)
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    console = Console()
    with log_folder(keep_logs) as logs:
        vocabulary = Vocabulary.of_model(folder)
        plan = Plan(folder, vocabulary, wanted, repeats or (1 if quick else 3), logs)
        measured = measure(plan, servers, console)
    result = run.finish(
        peers=[server.record(str(folder)) for server in servers],
        rows=rows(measured, wanted),
        checks=checks(measured),
        notes=notes(plan, measured),
        not_shown=NOT_SHOWN,
        details={
            one.peer.name: {
                condition: [start.model_dump() for start in starts]
                for condition, starts in one.starts.items()
            }
            for one in measured
        },
    )
    conclude(result, json_path, console)


def chosen_conditions(text: str) -> tuple[str, ...]:
    """Read `cold,warm`; cold always goes first, since it leaves the caches for the warm start."""
    found = names_in(text)
    if not found or not set(found) <= {COLD, WARM}:
        raise ConfigError(f"conditions {text!r}: write {COLD}, {WARM} or {COLD},{WARM}")
    return tuple(condition for condition in (COLD, WARM) if condition in found)
