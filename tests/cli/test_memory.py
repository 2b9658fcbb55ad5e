"""`xllm memory` against real engine channels."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xllm_plugin.channel import ChannelConfig, EngineChannel, EngineIdentity, EngineLoad
from xllm_plugin.cli.memory import memory
from xllm_plugin.errors import ChannelError, MisuseError
from xllm_plugin.testing.fake_memory import memory_section
from xllm_plugin.xtensor.messages import MemorySection

MIB = 2**20
Start = Callable[..., EngineChannel]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's directory of sockets, for this test."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "xllm"


@pytest.fixture
def start_engine(directory: Path) -> Iterator[Start]:
    """Starts an engine; an elastic one notes the budgets that it is told."""
    channels: list[EngineChannel] = []

    def start(instance_id: str, budgets: list[int] | None = None) -> EngineChannel:
        identity = EngineIdentity(
            instance_id=instance_id,
            model="tiny",
            platform="xllm",
            device="cpu",
            pid=os.getpid(),
            dp_rank=0,
        )
        channel = EngineChannel(ChannelConfig(), identity, EngineLoad)
        channels.append(channel)
        if budgets is not None:

            def set_memory_budget(budget_bytes: int) -> MemorySection:
                if budget_bytes < 6 * MIB:
                    raise MisuseError(f"budget_bytes={budget_bytes}: give {6 * MIB} or more.")
                budgets.append(budget_bytes)
                return memory_section(block_bytes=MIB, budget_slabs=budget_bytes // (2 * MIB))

            channel.add_section("memory", lambda: memory_section(block_bytes=MIB))
            channel.register_call("set_memory_budget", set_memory_budget)
        channel.start()
        channel.publish_if_due(force=True)
        return channel

    yield start
    for channel in channels:
        channel.close()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(memory, list(arguments))


def test_every_engine_has_a_line(start_engine: Start) -> None:
    start_engine("elastic", [])
    start_engine("fixed")
    assert run().output.splitlines() == [
        "elastic dp0: KV memory 10 of 16 MiB, 20 % of it unused; 2 MiB go when requests end",
        "fixed dp0: its KV cache is fixed",
    ]


def test_an_engine_that_does_not_answer_hides_no_other(
    start_engine: Start, directory: Path
) -> None:
    start_engine("fixed")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(directory / "busy.dp0.sock"))
        silent.listen()
        result = run()
    assert isinstance(result.exception, ChannelError)
    assert result.output.splitlines() == [
        "busy dp0: does not answer",
        "fixed dp0: its KV cache is fixed",
    ]


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("12582912", 12 * MIB), ("12MiB", 12 * MIB), ("1 gib", 1024 * MIB)]
)
def test_an_engine_is_told_its_budget(start_engine: Start, text: str, num_bytes: int) -> None:
    budgets: list[int] = []
    start_engine("elastic", budgets)
    result = run("--budget", text)
    assert budgets == [num_bytes]
    assert f"elastic dp0: KV memory 10 of {num_bytes // MIB} MiB" in result.output


def test_of_several_engines_one_is_named(start_engine: Start, directory: Path) -> None:
    budgets: list[int] = []
    start_engine("elastic", budgets)
    start_engine("fixed")
    refused = run("--budget", "12MiB").exception
    assert isinstance(refused, MisuseError)
    path = directory / "elastic.dp0.sock"
    assert f"add --socket with one of {path}, " in str(refused)
    assert f"{path}: KV memory" in run("--budget", "12MiB", "--socket", str(path)).output
    assert budgets == [12 * MIB]


def test_a_fixed_cache_has_no_budget(start_engine: Start) -> None:
    start_engine("fixed")
    refused = run("--budget", "12MiB").exception
    assert isinstance(refused, MisuseError)
    assert "XLLM_XTENSOR__ENABLED=1" in str(refused)


def test_what_the_engine_refuses_is_said_as_it_says_it(start_engine: Start) -> None:
    start_engine("elastic", [])
    refused = run("--budget", "1MiB").exception
    assert isinstance(refused, MisuseError)
    assert str(refused) == f"budget_bytes={MIB}: give {6 * MIB} or more."


@pytest.mark.parametrize("text", ["2.5GiB", "-1", "much", "2GB"])
def test_other_sizes_are_refused(text: str) -> None:
    result = run("--budget", text)
    assert result.exit_code == 2
    assert "as 1536MiB or 2GiB" in result.output


def test_no_engine_is_not_now(directory: Path) -> None:
    missing = run().exception
    assert isinstance(missing, ChannelError)
    assert str(directory) in str(missing)
    assert "xllm serve MODEL" in str(missing)
