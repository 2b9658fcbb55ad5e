"""What does the router itself cost?  See README.md beside this file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude, log_folder, names_in
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.errors import ConfigError, NotNowError

FOLDER = Path(__file__).resolve().parent
NAME = "router"
QUESTION = "How much CPU time does the router take for a request and for a streamed event?"
NUM_BACKENDS = 2
DIRECT, OURS = "direct", "xllm service"


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    name: str
    flags: tuple[str, ...]
    is_paced: bool = False
    counts: str = "requests"


CASES = (
    Case("a request, 2 KB prompt", ("--clients", "32")),
    Case("a request, 220 KB prompt", ("--clients", "32", "--prompt-bytes", "220000")),
    Case("a streamed event, 10 ms apart", ("--clients", "64", "--stream"), True, "events"),
)


@dataclass(frozen=True, slots=True)
class Router:
    """One of the things compared: a command with places for ports."""

    name: str
    what: str
    command: tuple[str, ...]

    def filled(self, port: int, spare: int, backends: Sequence[int]) -> list[str]:
        """The command for these ports."""
        urls = [f"http://127.0.0.1:{backend}" for backend in backends]
        found: list[str] = []
        for part in self.command:
            if part == "{URLS}":
                found += urls
            elif part == "{INSTANCES}":
                found += [word for url in urls for word in ("--instance", url)]
            else:
                found.append(part.replace("{PORT}", str(port)).replace("{SPARE}", str(spare)))
        return found


def known_routers(peers_bin: Path | None) -> dict[str, Router]:
    """Ours, and each peer that is installed."""
    ours = (sys.executable, "-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1")
    found = [
        Router(
            OURS,
            "this package; metrics, retries, probes on",
            (*ours, "--port", "{PORT}", "--admin-port", "{SPARE}", "{INSTANCES}"),
        )
    ]
    common = ("--worker-urls", "{URLS}", "--host", "127.0.0.1", "--port", "{PORT}")
    rest = ("--prometheus-port", "{SPARE}", "--log-level", "error", "--policy", "round_robin")
    quick = ("--worker-startup-check-interval", "1")
    for name, before in (
        ("vllm-router", ("vllm-router",)),
        ("sglang-router", ("python", "-m", "sglang_router.launch_router")),
        ("smg", ("smg", "launch")),
    ):
        program = _program(before[0], name, peers_bin)
        if program is not None:
            command = (program, *before[1:], *common, *rest, *quick)
            found.append(Router(name, f"{name}, round robin", command))
    return {router.name: router for router in found}


def _program(program: str, name: str, peers_bin: Path | None) -> str | None:
    folder = str(peers_bin) if peers_bin else None
    if program != "python":
        return shutil.which(program, path=folder)
    python = shutil.which(program, path=folder) if folder else sys.executable
    module = name.replace("-", "_")
    if python is None:
        return None
    asked = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False)
    return python if asked.returncode == 0 else None


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far, user and system."""
    import psutil  # type: ignore[import-untyped]

    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Start processes on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(slots=True)
class Bench:
    """Backends that stay up while routers come and go."""

    seconds: float
    logs: Path
    stack: contextlib.ExitStack
    backends: dict[bool, list[int]] = field(default_factory=dict)
    found: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    answers: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))

    @property
    def load_cores(self) -> set[int]:
        """Where clients and backends run."""
        return {self.cores[0]}

    @property
    def router_cores(self) -> set[int]:
        """Where the router runs."""
        return {self.cores[-1]}

    def start_backends(self) -> None:
        """Two without a pace and two with one."""
        for is_paced in (False, True):
            self.backends[is_paced] = [find_free_port() for _ in range(NUM_BACKENDS)]
            for port in self.backends[is_paced]:
                flags = ("--interval-ms", "10") if is_paced else ()
                command = [sys.executable, str(FOLDER / "mock.py"), "--port", str(port), *flags]
                with on_cores(self.load_cores):
                    self.stack.enter_context(self._server("mock", command, port))

    def measure(self, router: Router | None, case: Case) -> None:
        """One run of one case."""
        name = router.name if router else DIRECT
        backends = self.backends[case.is_paced]
        with contextlib.ExitStack() as stack:
            pid, port = 0, backends[0]
            if router is not None:
                port, spare = find_free_port(), find_free_port()
                command = router.filled(port, spare, backends)
                with on_cores(self.router_cores):
                    server = self._server(router.name, command, port)
                    pid = stack.enter_context(server).pid or 0
            if name not in self.answers:
                self.answers[name] = asked_once(port)
            self.found.setdefault((name, case.name), []).append(self._load(pid, port, case))

    def _load(self, pid: int, port: int, case: Case) -> dict[str, float]:
        command = [sys.executable, str(FOLDER / "load.py"), "--port", str(port), *case.flags]
        with on_cores(self.load_cores):
            process = subprocess.Popen(
                [*command, "--seconds", str(self.seconds)], stdout=subprocess.PIPE, text=True
            )
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            before_s = cpu_seconds(pid) if pid else 0.0
            process.stdout.readline()
            after_s = cpu_seconds(pid) if pid else 0.0
            result: dict[str, float] = json.loads(process.stdout.readline() or "{}")
        if process.returncode or not result.get(case.counts):
            raise NotNowError(f"{case.name} on port {port}: the load client counted nothing")
        result["cpu_us"] = (after_s - before_s) * 1e6 / result[case.counts]
        return result

    def _server(self, name: str, command: Sequence[str], port: int) -> Server:
        log = self.logs / f"{name}.{port}.log"
        environment = clean_environment({})
        return Server(name, list(command), port=port, log_path=log, environment=environment)


def asked_once(port: int) -> tuple[Any, Any]:
    """A whole answer and a streamed one, to compare with those of others."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    asked = {"model": "mock", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    whole = httpx.post(url, json=asked, timeout=30)
    streamed = httpx.post(url, json={**asked, "stream": True}, timeout=30)
    return whole.json(), streamed.text


def rows(bench: Bench, names: Sequence[str]) -> list[Row]:
    """One table a case."""
    found = []
    for case in CASES:
        direct = bench.found[DIRECT, case.name]
        for name in names:
            runs = bench.found[name, case.name]
            figures = []
            if name != DIRECT:
                figures.append(Figure.of("CPU", "us", [run["cpu_us"] for run in runs]))
                added = [
                    run["ttft_p50_ms"] - base["ttft_p50_ms"]
                    for run, base in zip(runs, direct, strict=True)
                ]
                if case.is_paced:
                    figures.append(Figure.of("TTFT p50 added", "ms", added))
            figures.append(
                Figure.of("rate", f"{case.counts}/s", [r[case.counts] / r["seconds"] for r in runs])
            )
            found.append(
                Row(
                    table=case.name[0].upper() + case.name[1:],
                    labels={"router": name},
                    figures=tuple(figures),
                )
            )
    return found


def checks(bench: Bench, names: Sequence[str]) -> list[Check]:
    """Every router gives what the backend gives, and loses nothing."""
    found = []
    for name in names:
        errors = sum(run["errors"] for case in CASES for run in bench.found[name, case.name])
        is_equal = bench.answers[name] == bench.answers[DIRECT]
        detail = f"{errors:.0f} errors; answers {'equal' if is_equal else 'differ'}"
        found.append(Check(name=name, passed=is_equal and not errors, detail=detail))
    return found


NOTES = (
    (
        "CPU is the user and system time of the router's processes, from /proc, over the requests "
        "or events that clients counted in the same seconds. It includes what the kernel does for "
        "its sockets. A streamed event's CPU includes its share of its request (64 events each)."
    ),
    (
        "The router has one core to itself, clients and backends share the other. Routers are "
        "started anew for every run and take turns; ratios are what carries over to another "
        "machine."
    ),
    (
        "xllm service routes by least outstanding tokens, its default, and reads the body for it; "
        "the others by round robin, the least that they can do."
    ),
)
NOT_SHOWN = (
    "Rates: one core for clients and backends limits them, and the routers less so.",
    "TLS, API keys, tokenising for prefix-aware routing, several processes.",
)


@click.command(NAME)
@common_options(NAME)
@click.option("--routers", help="In this order.  [default: all that are installed]")
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--seconds", type=float, help="Of each run.  [default: 3]")
@click.option(
    "--peers-bin",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with the programs of peers, such as the bin of a virtual environment.",
)
def command(
    *,
    quick: bool,
    json_path: Path,
    routers: str | None,
    repeats: int | None,
    seconds: float | None,
    peers_bin: Path | None,
) -> None:
    """How much CPU time does the router take for a request and for a streamed event?

    Measures `xllm service` and each peer that is installed (vllm-router, sglang-router, smg) in
    front of two mock backends.
    """
    known = known_routers(peers_bin)
    names = names_in(routers) if routers is not None else tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"routers {', '.join(unknown) or '(none)'} are not here; installed are "
            f"{', '.join(known)}."
        )
    called = command_line()
    if peers_bin is not None:  # where they lie is this machine's affair
        called = called.replace(str(peers_bin), "peers/bin")
    run = schema.begin(NAME, question=QUESTION, command=called)
    console = Console()
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(log_folder(None))
        bench = Bench(seconds or (1.0 if quick else 3.0), logs, stack)
        bench.start_backends()
        measure(bench, [known[name] for name in names], repeats or (1 if quick else 3), console)
    everyone = (DIRECT, *names)
    result = run.finish(
        peers=[_record(known[name]) for name in names],
        rows=rows(bench, everyone),
        checks=checks(bench, everyone),
        notes=NOTES,
        not_shown=NOT_SHOWN,
        details={f"{name}: {case}": runs for (name, case), runs in bench.found.items()},
    )
    conclude(result, json_path, console)


def measure(bench: Bench, routers: Sequence[Router], repeats: int, console: Console) -> None:
    """Take turns: every repeat measures each router with each case."""
    turns: list[Router | None] = [None, *routers]
    for repeat in range(repeats):
        for case in CASES:
            for router in turns[repeat % len(turns) :] + turns[: repeat % len(turns)]:
                bench.measure(router, case)
                name = router.name if router else DIRECT
                last = bench.found[name, case.name][-1]
                console.print(
                    f"{repeat + 1}/{repeats} {case.name}, {name}: {last['cpu_us']:.1f} us"
                )


def _record(router: Router) -> Peer:
    program = Path(router.command[0]).name
    return Peer(name=router.name, what=router.what, command=(program, *router.command[1:]))


if __name__ == "__main__":
    command()
