"""`xllm bench` finds benchmarks by folder, explains mistakes, and cleans up when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.plots import CurvePoint
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.cli.bench import BenchGroup, bench, benchmarks_folder
from xllm_plugin.errors import ConfigError, InternalError

NAMES = sorted(path.parent.name for path in benchmarks_folder().glob("*/bench.py"))

GREETER = """
import click

@click.command("hello")
@click.option("--quick", is_flag=True)
def command(quick):
    click.echo(f"hello, quick={quick}")
"""

# Starts a server, says its process group, and would write a result if it were let.
SLOW = """
import signal, sys
from pathlib import Path

import click

from xllm_plugin.bench.servers import Server, clean_environment, find_free_port

@click.command("slow")
@click.argument("folder", type=Path)
def command(folder):
    port = find_free_port()
    fake = (sys.executable, "-m", "xllm_plugin.testing.fake_openai", "--port", str(port))
    log = folder / "log"
    with Server("f", fake, port=port, log_path=log, environment=clean_environment({})) as server:
        click.echo(f"group {server.pid}")
        sys.stdout.flush()
        signal.pause()
    (folder / "result.json").write_text("{}")
"""

RUN_IN = """
import signal, sys
from pathlib import Path
from xllm_plugin.cli.bench import bench
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs with &
bench._folder = Path(sys.argv[1])
bench(sys.argv[2:])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, code in (("hello", GREETER), ("slow", SLOW), ("empty", "command = None\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.py").write_text(code)
    readme = "# Hello\n\nHow does one\ngreet?\n\nMore.\n"
    (tmp_path / "hello" / "README.md").write_text(readme)
    (tmp_path / "no-benchmark").mkdir()
    return tmp_path


@pytest.fixture
def group(folder: Path) -> BenchGroup:
    return BenchGroup("bench", folder=folder, params=list(bench.params))


def test_a_folder_is_a_command(group: BenchGroup) -> None:
    result = CliRunner().invoke(group, ["hello", "--quick"])
    assert result.output == "hello, quick=True\n"


def test_list_shows_the_questions(group: BenchGroup) -> None:
    result = CliRunner().invoke(group, ["--list"])
    assert result.exit_code == 0
    assert [line.split() for line in result.output.splitlines()] == [
        ["empty"], ["hello", "How", "does", "one", "greet?"], ["slow"],
    ]  # fmt: skip


def test_an_unknown_name_is_answered_with_the_known(group: BenchGroup) -> None:
    result = CliRunner().invoke(group, ["nope"])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "no benchmark 'nope'; choose from empty, hello, slow" in str(result.exception)


def test_a_benchmark_without_a_command_is_our_bug(group: BenchGroup) -> None:
    result = CliRunner().invoke(group, ["empty"])
    assert isinstance(result.exception, InternalError)


def test_the_console_command_exits_with_2_for_an_unknown_name() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "xllm_plugin.cli", "bench", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "choose from" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_has_the_common_options(name: str) -> None:
    with click.Context(bench) as ctx:
        command = bench.get_command(ctx, name)
    assert command is not None
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--quick", "--json"} <= flags
    assert command.help


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stopped_run_stops_its_servers_and_writes_nothing(
    folder: Path, number: signal.Signals
) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN_IN, str(folder), "slow", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    with run:
        server_group = int(run.stdout.readline().split()[1])
        run.send_signal(number)
    assert run.returncode == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(server_group, 0)
    assert not (folder / "result.json").exists()


@contextmanager
def fakes(folder: Path, **flags: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        urls = {}
        for name, extra in flags.items():
            port = find_free_port()
            fake = "xllm_plugin.testing.fake_openai"
            command = (sys.executable, "-m", fake, "--port", str(port), *extra)
            log, environment = folder / f"{name}.log", clean_environment({})
            server = Server(name, command, port=port, log_path=log, environment=environment)
            urls[name] = stack.enter_context(server).url
        yield urls


def test_serving_with_a_failed_check_exits_with_1(tmp_path: Path) -> None:
    with click.Context(bench) as ctx:
        bench.get_command(ctx, "serving")
    finish = sys.modules["xllm_benchmark_serving"].finish
    run = schema.begin("serving", question="How much?", command="xllm bench serving")
    result = run.finish(checks=[schema.Check(name="outputs equal", passed=False)])
    point = CurvePoint("1 client", 30, 20, 100)
    out = tmp_path / "result.json"
    with pytest.raises(click.exceptions.Exit) as caught:
        finish(result, {"stock": [point]}, 50, out, Console(quiet=True))
    assert caught.value.exit_code == 1
    assert not schema.load(out).passed


@pytest.mark.e2e
def test_serving_against_two_running_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole benchmark, with vLLM's client, against servers of which one is much slower."""
    pytest.importorskip("vllm")
    monkeypatch.setattr(outputs, "OUTPUT_TOKENS", 4)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100}))
    out = tmp_path / "result.json"
    options = [
        "--quick", f"--json={out}", f"--model={tmp_path}", "--loads=1,2", "--tpot-ms=20",
        "--requests-per-load=3", "--max-input=8", "--max-output=6", "--repeats=2",
    ]  # fmt: skip
    with fakes(tmp_path, slow=("--tpot-ms", "40"), fast=("--tpot-ms", "4")) as urls:
        servers = [f"--server={name}={url}" for name, url in urls.items()]
        done = CliRunner().invoke(bench, ["serving", *options, *servers])
    assert done.exit_code == 0, done.output
    result = schema.load(out)
    assert result.passed
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    headline = {row.labels["peer"]: row for row in result.rows if "Highest" in row.table}
    assert headline["slow"].labels["bound"] == "broken at the lightest load"
    every = [row.labels for row in result.rows if row.table == "At every load"]
    loads = [(labels["load"], labels["peer"]) for labels in every]
    # The slow one is so far beyond the bound that its curve ends at once.
    assert loads[0] == ("1 client", "slow")
    assert ("2 clients", "slow") not in loads
    assert [len(points) for points in result.details["slow"]] == [1, 1]
