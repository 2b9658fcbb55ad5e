"""The NPU family's record, its chips, and what it does not serve: one message each."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.models import prepare
from xllm_plugin.npu.accelerator import FAMILY
from xllm_plugin.npu.socs import soc_named
from xllm_plugin.testing.cann import Emulator


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("Ascend910B1", "Atlas A2"),
        ("Ascend910B4-1", "Atlas A2"),
        ("Ascend910_9382", "Atlas A3"),
        ("Ascend910B", None),
        ("Ascend910A", None),
        ("Ascend310P3", None),
    ],
)
def test_chips_by_name(name: str, product: str | None) -> None:
    soc = soc_named(name)
    assert (soc and soc.product) == product


def test_an_accelerator_goes_before_the_cpu() -> None:
    assert FAMILY.name == "npu"
    assert FAMILY.preference > 0


@pytest.mark.npu
@pytest.mark.full
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
    assert "devices 0: look at `npu-smi info`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.npu
@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "variables", "code", "said"),
    [
        pytest.param(
            (), {"XLLM_CANN_BUSY": "1"}, 75, "device 0 cannot be taken: aclrtSetDevice", id="busy"
        ),
        pytest.param(
            (), {"XLLM_CANN_USED_BYTES": str(2**31)}, 75, "has 2.00 of its 4.00 GiB", id="shared"
        ),
        pytest.param(
            (), {"XLLM_CANN_MEMORY_BYTES": str(2**25)}, 2, "the model needs at least", id="small"
        ),
        pytest.param(
            ("--max-num-seqs", "256"),
            {"XLLM_CANN_MEMORY_BYTES": str(2**27)},
            2,
            "0.26 to compute steps of",
            id="working memory",
        ),
        pytest.param(("--dtype", "float32"), {}, 2, "--dtype float32", id="dtype"),
        pytest.param(("-tp", "2"), {}, 2, "does not support 2 ranks (HCCL)", id="ranks"),
    ],
)
def test_what_cannot_be_served_ends_with_one_message(  # noqa: PLR0917  a case and its means
    emulator: Emulator,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    arguments: tuple[str, ...],
    variables: dict[str, str],
    code: int,
    said: str,
) -> None:
    environment = emulator.environment({"PYTHONPATH": str(Path(__file__).parents[2])})
    command = ("-m", "xllm_plugin.cli", "serve", str(prepare("tiny-llama")), *arguments)
    done = run_python(*command, XLLM_DEVICE="npu", **environment, **variables)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
