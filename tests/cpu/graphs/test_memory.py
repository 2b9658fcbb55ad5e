"""Memory of the machine and of the container."""

from __future__ import annotations

from pathlib import Path

import pytest

from xllm_plugin.cpu.graphs.memory import available_bytes, resident_bytes


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:    2048 kB\nMemAvailable:    1024 kB\n")
    return path


def test_a_machine_without_a_limit_is_all_there_is(tmp_path: Path, meminfo: Path) -> None:
    assert available_bytes(meminfo, tmp_path / "none") == 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 2**20


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, meminfo: Path) -> None:
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 500\ninactive_file 300\n"),
    ):
        (tmp_path / name).write_text(text)
    assert available_bytes(meminfo, tmp_path) == 400


def test_this_process_has_some() -> None:
    assert 2**20 < resident_bytes() < 2**40
