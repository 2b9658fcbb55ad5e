"""What the NPU family says where something is missing, one message each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.npu.accelerator import FAMILY, SUPPORTED_TORCH_NPU
from xllm_plugin.testing.cann import Emulator

PROBE = "import json; from xllm_plugin.npu.accelerator import probe; p = probe()\n"
PROBE += "print(json.dumps([p.usable, p.found]))"


def probed(folder: Path, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}", **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def add_torch_npu(site: Any, version: str) -> None:
    site.add_module("torch_npu", "raise ImportError('the probe imports nothing')")
    site.add_distribution("torch_npu", version)


def test_no_torch_npu(site: Any) -> None:
    assert "no torch_npu (pip install" in probed(site.folder)


def test_another_torch_npu(site: Any) -> None:
    add_torch_npu(site, "2.10.0.post4")
    assert "torch_npu 2.10.0.post4 (pip install torch_npu==" in probed(site.folder)


def test_no_cann(site: Any) -> None:
    add_torch_npu(site, SUPPORTED_TORCH_NPU)
    found = probed(site.folder, LD_LIBRARY_PATH="")
    assert "libascendcl.so" in found
    assert "set_env.sh" in found


@pytest.mark.npu
def test_no_device_and_a_device(site: Any, emulator: Emulator) -> None:
    add_torch_npu(site, SUPPORTED_TORCH_NPU)
    libraries = str(emulator.libraries)
    found = probed(site.folder, LD_LIBRARY_PATH=libraries, XLLM_CANN_DEVICES="0")
    assert "but no device; look at `npu-smi info`" in found
    assert probed(site.folder, LD_LIBRARY_PATH=libraries).startswith("[true")


def test_an_accelerator_goes_before_the_cpu() -> None:
    assert FAMILY.name == "npu"
    assert FAMILY.preference > 0


@pytest.mark.npu
def test_without_a_device_a_command_ends_with_one_message(
    emulator: Emulator, run_python: Callable[..., subprocess.CompletedProcess[str]], site: Any
) -> None:
    environment = emulator.environment({}, operators=False)
    path = f"{site.folder}:{environment.pop('PYTHONPATH')}:{Path(__file__).parents[2]}"
    done = run_python(
        "-m",
        "xllm_plugin.cli",
        "serve",
        "nothing",
        **{**environment, "PYTHONPATH": path, "XLLM_DEVICE": "npu", "XLLM_CANN_DEVICES": "0"},
    )
    assert done.returncode == 2
    assert "XLLM_DEVICE=npu: not usable here" in done.stderr
    assert "but no device" in done.stderr
    assert "Traceback" not in done.stderr
