"""What benchmark commands run on instead of a model and vLLM servers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from xllm_plugin.bench.schedulers import Side, choose_sides

Chooser = Callable[[str, Sequence[str], Sequence[str]], tuple[Side, ...]]


@pytest.fixture
def vocabulary_folder(tmp_path: Path) -> Path:
    """A model folder that knows its vocabulary's size and nothing else."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 50}')
    return folder


@pytest.fixture
def make_fake_sides() -> Callable[[dict[str, Sequence[str]]], Chooser]:
    """Stands in for `choose_sides`: the sides named, each a fake server with flags of its own."""

    def make(flags_by_name: dict[str, Sequence[str]]) -> Chooser:
        def choose(model: str, names: Sequence[str], flags: Sequence[str]) -> tuple[Side, ...]:
            return tuple(_fake(side) for side in choose_sides(model, names, flags))

        def _fake(side: Side) -> Side:
            fake = (sys.executable, "-m", "xllm_plugin.testing.fake_openai")
            where = ("--port", str(side.server.port))
            command = (*fake, *where, *flags_by_name[side.name])
            return replace(side, server=replace(side.server, command=command))

        return choose

    return make
