"""From source to a checked library: built once, built again when damaged, and reasons when not."""

from __future__ import annotations

import ctypes
import logging
import stat
import threading
from pathlib import Path

import pytest

from xllm_plugin.cpu.native import build

COUNTING = """#!/bin/sh
case "$1" in --version) echo "toy 1"; exit 0;; esac
echo built >> {log}
while [ "$1" != "-o" ]; do shift; done
echo "library" > "$2"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in compiler that notes each build; returns its log."""
    log = tmp_path / "log"
    script = tmp_path / "toy-c++"
    script.write_text(COUNTING.format(log=log))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return log


def num_builds(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


def test_the_real_sources_build_into_a_library_that_loads(tmp_path: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    try:
        path = build.built_library(tmp_path)
    except build.NativeBuildError as error:
        if "unrecognized" in str(error) or "target" in str(error):
            pytest.skip(str(error))
        raise
    assert hasattr(ctypes.CDLL(str(path)), "xllm_linear")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "kernels.so",
        "kernels.so.sha256",
    ]


def test_it_is_built_once(tmp_path: Path, compiler: Path) -> None:
    first = build.built_library(tmp_path / "cache")
    assert build.built_library(tmp_path / "cache") == first
    assert first.read_text() == "library\n"
    assert num_builds(compiler) == 1


@pytest.mark.parametrize("damage", ["library", "checksum", "no checksum", "no library"])
def test_a_damaged_library_is_reported_and_built_again(
    tmp_path: Path, compiler: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    library = build.built_library(tmp_path / "cache")
    checksum = library.with_name("kernels.so.sha256")
    match damage:
        case "library":
            library.write_text("half a libr")
        case "checksum":
            checksum.write_bytes(b"\xff\xfe")
        case "no checksum":
            checksum.unlink()
        case _:
            library.unlink()
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        build.built_library(tmp_path / "cache")
    assert library.read_text() == "library\n"
    assert num_builds(compiler) == 2
    assert ("is damaged" in caplog.text) is (damage == "library")


def test_another_compiler_builds_beside(tmp_path: Path, compiler: Path) -> None:
    first = build.built_library(tmp_path / "cache")
    script = tmp_path / "toy-c++"
    script.write_text(script.read_text().replace("toy 1", "toy 2"))
    assert build.built_library(tmp_path / "cache") != first
    assert first.exists()


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NativeBuildError, match=r"no C\+\+ compiler was found"):
        build.built_library(tmp_path)


def test_a_compiler_that_refuses_leaves_nothing(tmp_path: Path, compiler: Path) -> None:
    script = tmp_path / "toy-c++"
    script.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'error: unknown flag' >&2\nexit 1\n"
    )
    with pytest.raises(build.NativeBuildError, match="refused the kernels: error: unknown flag"):
        build.built_library(tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert list(folder.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, compiler: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(build.NativeBuildError, match="XLLM_CACHE_DIR"):
        build.built_library(tmp_path / "cache")


def test_a_build_begun_early_is_the_only_one(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path / "cache"))
    early = build.EarlyBuild()
    monkeypatch.setattr(build, "early_build", early)
    monkeypatch.setattr(build, "may_run_here", lambda: True)
    early.begin()
    early.begin()
    assert build.built_library().read_text() == "library\n"
    assert num_builds(compiler) == 1
    assert not any(thread.name == "xllm-kernels" for thread in threading.enumerate())


def test_an_early_build_that_fails_is_told_to_who_needs_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    early = build.EarlyBuild()
    monkeypatch.setattr(build, "early_build", early)
    monkeypatch.setattr(build, "may_run_here", lambda: True)
    early.begin()
    early.wait()
    assert capsys.readouterr().err == ""
    with pytest.raises(build.NativeBuildError, match="/bin/false"):
        build.built_library()


def test_nothing_is_built_early_for_a_processor_that_would_not_run_it(
    tmp_path: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "may_run_here", lambda: False)
    early = build.EarlyBuild()
    early.begin()
    early.wait()
    assert num_builds(compiler) == 0
