"""What benchmark commands run on instead of a model and vLLM servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from xllm_plugin.bench.schedulers import Side, choose_sides
from xllm_plugin.cli.bench import _load

Chooser = Callable[[str, Sequence[str], Sequence[str]], tuple[Side, ...]]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> ModuleType:
    """The benchmark in the test module's `FOLDER`, loaded as `xllm bench NAME` loads it."""
    command = _load(request.module.FOLDER / "bench.py")
    return sys.modules[str(command.callback.__module__)]


@pytest.fixture
def vocabulary_folder(tmp_path: Path) -> Path:
    """A model folder that knows its vocabulary's size and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 50}')
    return folder


@pytest.fixture
def run_on_fakes(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, vocabulary_folder: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Runs the benchmark's command on fake sides; `tmp_path` gets result.json."""

    def run(flags_by_name: dict[str, Sequence[str]], *arguments: str) -> Any:
        monkeypatch.setattr(bench, "choose_sides", fake_sides(flags_by_name))
        always = ("--model", str(vocabulary_folder), "--json", str(tmp_path / "result.json"))
        return CliRunner().invoke(bench.command, [*always, *arguments])

    return run


def fake_sides(flags_by_name: dict[str, Sequence[str]]) -> Chooser:
    """Stands in for `choose_sides`: the sides named, each a fake server with flags of its own."""

    def choose(model: str, names: Sequence[str], flags: Sequence[str]) -> tuple[Side, ...]:
        return tuple(_fake(side) for side in choose_sides(model, names, flags))

    def _fake(side: Side) -> Side:
        fake = (sys.executable, "-m", "xllm_plugin.testing.fake_openai")
        where = ("--port", str(side.server.port))
        command = (*fake, *where, *flags_by_name[side.name])
        return replace(side, server=replace(side.server, command=command))

    return choose
