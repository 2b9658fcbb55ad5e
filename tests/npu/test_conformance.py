"""The conformance suite itself, where it finds both a CPU and an NPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from xllm_plugin.testing.cann import Emulator
from xllm_plugin.testing.conformance import GRAPHS, MEMORY

pytestmark = pytest.mark.npu

ROOT = Path(__file__).parents[2]
ABSENT_ON_CPU = "cpu has no graph backend"


def test_the_parts_of_the_npu_family_keep_their_contracts(
    on_device: Callable[..., Any], tmp_path: Path
) -> None:
    """The same tests that this run skips for the NPU family, on the emulator: none is skipped."""
    report = tmp_path / "report.xml"
    arguments = ["-q", "-k", "[npu- and not test_family", f"--junit-xml={report}"]
    code = on_device(
        f"""
        import os, pytest
        os.chdir({str(ROOT)!r})
        result = int(pytest.main([*{arguments}, "-p", "no:cacheprovider", "tests/conformance"]))
        """,
        operators=True,
        XLLM_CANN_MEMORY_BYTES=str(2**27),
        XLLM_DEVICE="npu",
    )
    cases = list(ET.parse(report).iter("testcase"))
    assert code == 0
    assert len(cases) == len(MEMORY.clauses) + len(GRAPHS.clauses)
    assert [case.attrib["name"] for case in cases if case.findall("skipped")] == []


@pytest.mark.full
@pytest.mark.timeout(3000)
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
