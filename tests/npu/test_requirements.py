"""What is missing on a machine, one message each, by the commands that people run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from xllm_plugin.npu import availability
from xllm_plugin.npu.availability import DeviceMemory
from xllm_plugin.npu.requirements import SUPPORTED_TORCH_NPU, is_older, memory_fact
from xllm_plugin.testing.cann import Emulator

ROOT = str(Path(__file__).parents[2])
COMMAND = ("-m", "xllm_plugin.cli")
RunPython = Callable[..., CompletedProcess[str]]

BROKEN = "raise ImportError('libhccl.so: cannot open shared object file')"


def install_torch_npu(site: Any, version: str, **entry_points: Any) -> None:
    """As pip would where there is no CANN."""
    site.add_module("torch_npu", BROKEN)
    site.add_distribution("torch_npu", version, entry_points)


def run_in(site: Any, run_python: RunPython, *arguments: str, **variables: str) -> Any:
    """A command of ours in an environment without CANN."""
    variables = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LD_LIBRARY_PATH": "", **variables}
    return run_python(*COMMAND, *arguments, PYTHONPATH=f"{site.folder}:{ROOT}", **variables)


def run_emulated(
    emulator: Emulator, run_python: RunPython, *arguments: str, **variables: str
) -> Any:
    """The same with the emulated CANN."""
    environment = emulator.environment({"PYTHONPATH": ROOT}, operators=False)
    return run_python(*COMMAND, *arguments, **environment, **variables)


def expect_in_doctor(done: Any, name: str, found: str, mend: str) -> None:
    """One problem, with what was found and the next step; it is the last of the facts."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(done.stdout)
    (problem,) = [one for one in report["problems"] if one["name"].startswith("device")]
    assert f"{name} {found}" in problem["found"]
    assert mend in problem["found"] + problem["mend"]
    fact = report["device_facts"][-1]
    assert (fact["name"], fact["found"]) == (name, found)
    assert mend in fact["mend"]


@pytest.mark.parametrize(
    ("version", "name", "found", "mend"),
    [
        (None, "torch_npu", "none", "torch_npu==2.13.0, on a machine with CANN alone"),
        ("2.10.0.post4", "torch_npu", "2.10.0.post4", "pip install torch_npu==2.13.0"),
        (SUPPORTED_TORCH_NPU, "CANN", "none", "libascendcl.so: cannot open shared object file"),
    ],
)
def test_doctor_without_torch_npu_or_cann(  # noqa: PLR0917  a case and its means
    site: Any, run_python: RunPython, version: str | None, name: str, found: str, mend: str
) -> None:
    if version is not None:
        install_torch_npu(site, version)
    done = run_in(site, run_python, "doctor", "--device", "npu", "--json")
    expect_in_doctor(done, name, found, mend)


@pytest.mark.npu
@pytest.mark.parametrize(
    ("variables", "name", "found", "mend"),
    [
        ({"XLLM_CANN_VERSION": "8.3.RC1"}, "CANN", "8.3.RC1", "install CANN 8.5 or newer"),
        ({"XLLM_CANN_DEVICES": "0"}, "devices", "0", "look at `npu-smi info`"),
        ({"XLLM_CANN_SOC": "Ascend310P3"}, "chip", "Ascend310P3", "Atlas A2 or Atlas A3 are"),
    ],
)
def test_doctor_with_the_wrong_cann_device_or_chip(  # noqa: PLR0917  a case and its means
    emulator: Emulator,
    run_python: RunPython,
    variables: dict[str, str],
    name: str,
    found: str,
    mend: str,
) -> None:
    done = run_emulated(emulator, run_python, "doctor", "--device", "npu", "--json", **variables)
    expect_in_doctor(done, name, found, mend)


@pytest.mark.npu
@pytest.mark.full  # imports all of vLLM
def test_doctor_where_all_is_there(emulator: Emulator, run_python: RunPython) -> None:
    done = run_emulated(emulator, run_python, "doctor", "--device", "npu", "--json")
    report = json.loads(done.stdout)
    assert [one for one in report["problems"] if one["name"].startswith("device")] == []
    assert report["platform_class"] == "xllm_plugin.npu.platform.XllmNpuPlatform"
    facts = {fact["name"]: fact["found"] for fact in report["device_facts"]}
    assert facts == {
        "torch_npu": SUPPORTED_TORCH_NPU,
        "CANN": "8.5.0",
        "driver": "25.2.0",
        "devices": "1",
        "chip": "Ascend910B3 (Atlas A2)",
        "device 0": "4.00 of 4.00 GiB free",
    }


@pytest.mark.npu
@pytest.mark.full
def test_doctor_with_a_busy_device(emulator: Emulator, run_python: RunPython) -> None:
    arguments = ("doctor", "--device", "npu", "--json")
    done = run_emulated(emulator, run_python, *arguments, XLLM_CANN_BUSY="1")
    expect_in_doctor(done, "device 0", "cannot be taken", "set up by another process")


def test_the_memory_that_is_free_and_a_device_that_cannot_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: dict[str, Any] = {"answer": DeviceMemory(2**30, 3 * 2**30)}
    monkeypatch.setattr(availability, "answer", lambda _: answers["answer"])
    assert memory_fact().found == "1.00 of 3.00 GiB free"
    answers["answer"] = "aclrtSetDevice: error 507033"
    fact = memory_fact()
    assert fact.found == "cannot be taken"
    assert "device 0 cannot be taken: aclrtSetDevice: error 507033" in fact.mend


@pytest.mark.parametrize(
    ("version", "is_it"), [("8.3.RC1", True), ("8.5", False), ("8.5.0", False), ("unknown", False)]
)
def test_versions_by_their_leading_numbers(version: str, is_it: bool) -> None:
    assert is_older(version, (8, 5)) is is_it


@pytest.mark.parametrize(
    "arguments",
    [("doctor",), pytest.param(("serve", "nothing"), marks=pytest.mark.full)],
    ids=lambda one: one[0],
)
def test_torch_npu_without_cann_breaks_torch_and_a_message_says_so(
    site: Any, run_python: RunPython, arguments: tuple[str, ...]
) -> None:
    """With the CPU family, too: it is torch that fails, before anything of ours runs."""
    backends = {"torch.backends": {"torch_npu": "torch_npu:load"}}
    install_torch_npu(site, SUPPORTED_TORCH_NPU, **backends)
    variables = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1", "COLUMNS": "400"}
    done = run_in(site, run_python, *arguments, **variables)
    assert "Traceback" not in done.stdout + done.stderr
    if arguments == ("doctor",):
        assert done.returncode == 1
        assert f"torch_npu {SUPPORTED_TORCH_NPU} is installed and CANN is not found" in done.stdout
        assert "mend: source CANN's set_env.sh" in done.stdout
    else:
        assert done.returncode == 2
        assert "cannot be imported: Failed to load the backend extension: torch_npu" in done.stderr
        assert "libhccl.so: cannot open shared object file" in done.stderr


@pytest.mark.npu
@pytest.mark.full  # doctor refuses by the same probe
def test_the_self_test_of_a_machine_without_a_device(
    emulator: Emulator, run_python: RunPython
) -> None:
    arguments = ("selftest", "--device", "npu")
    done = run_emulated(emulator, run_python, *arguments, XLLM_CANN_DEVICES="0")
    assert (done.returncode, done.stdout) == (2, "")
    assert "devices 0: look at `npu-smi info`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.npu
@pytest.mark.parametrize(
    ("variables", "code", "said"),
    [
        ({"XLLM_CANN_BUSY": "1"}, 75, "device 0 cannot be taken: aclrtSetDevice"),
        pytest.param(
            {"XLLM_CANN_USED_BYTES": str(4 * 2**30)},
            75,
            "other processes hold the rest",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"XLLM_CANN_MEMORY_BYTES": str(2**28)},
            2,
            "Take a device with more memory",
            marks=pytest.mark.full,
        ),
    ],
    ids=["busy", "shared", "small"],
)
def test_the_self_test_of_a_device_that_is_not_free(
    emulator: Emulator, run_python: RunPython, variables: dict[str, str], code: int, said: str
) -> None:
    done = run_emulated(emulator, run_python, "selftest", "--device", "npu", **variables)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
