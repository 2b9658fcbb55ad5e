"""The conformance suite itself, where it finds both a CPU and an NPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from xllm_plugin.testing.cann import Emulator

pytestmark = [pytest.mark.npu, pytest.mark.full, pytest.mark.timeout(3000)]

ROOT = Path(__file__).parents[2]
ABSENT_ON_CPU = "cpu has no graph backend"


def test_cpu_and_npu_keep_the_same_contracts(emulator: Emulator, tmp_path: Path) -> None:
    """Every clause of the NPU's; of the CPU's all but those of parts that it does not have."""
    environment = emulator.environment({**os.environ, "PYTHONPATH": str(ROOT)})
    report = tmp_path / "report.xml"
    command = ("-m", "pytest", "-q", "-k", "cpu or npu", f"--junit-xml={report}")
    done = subprocess.run(
        [sys.executable, *command, "-p", "no:cacheprovider", "tests/conformance"],
        cwd=ROOT,
        env={**environment, "XLLM_CANN_MEMORY_BYTES": str(2**27), "XLLM_DEVICE": "npu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    passed = {"cpu": 0, "npu": 0}
    for case in ET.parse(report).iter("testcase"):
        family = case.attrib["name"].partition("[")[2].partition("-")[0]
        if family not in passed:  # "input" has an npu in it
            continue
        (skipped,) = case.findall("skipped") or (None,)
        if skipped is None:
            passed[family] += 1
        else:
            assert ABSENT_ON_CPU in skipped.attrib["message"]
    assert passed["npu"] > passed["cpu"] > 0
