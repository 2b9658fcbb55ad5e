"""`xllm doctor`: it reports what is wrong where everything else would stop at it."""

from __future__ import annotations

import importlib.util
import json
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from xllm_plugin.accelerator.family import Probe
from xllm_plugin.cli.doctor import _show
from xllm_plugin.config import Setting
from xllm_plugin.doctor import Finding, Report
from xllm_plugin.doctor.report import FamilyState, SeamState
from xllm_plugin.plugins import PluginInfo

DOCTOR = ("-m", "xllm_plugin.cli", "doctor")


def report(*findings: Finding) -> Report:
    return Report(
        versions={"vllm": "0.32.0+cpu"},
        platform="xllm",
        platform_reason="[why]",
        platform_class="a.Platform",
        device="cpu",
        device_reason="vLLM 0.32.0+cpu",
        device_families=(FamilyState("cpu", Probe(True, "a CPU [build]", "one")),),
        plugins=(PluginInfo("vendor", "vendor 1.0", ("register_device_families",)),),
        seams=(SeamState("a-seam", "x:y", "reason", fits=False, detail="gone"),),
        settings=(Setting("channel.enabled", True, "default"),),
        findings=findings,
    )


def shown(a_report: Report) -> str:
    text = StringIO()
    _show(a_report, Console(file=text, width=200))
    return text.getvalue()


def test_everything_in_the_report_is_shown() -> None:
    text = shown(
        report(Finding("shm", "problem", "[64] MiB", "mount it"), Finding("n", "note", "x"))
    )
    for words in ("0.32.0+cpu", "[why]", "a.Platform", "a CPU [build]", "vendor 1.0", "a-seam"):
        assert words in text
    assert "problem shm: [64] MiB" in text
    assert "mend: mount it" in text
    assert "nothing to mend" not in text


def test_a_sound_machine_is_told_so() -> None:
    assert "nothing to mend" in shown(report())


def examined(done: Any) -> dict[str, Any]:
    """Parse standard output, all of which has to be the one JSON object."""
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


@pytest.mark.parametrize(
    ("environment", "name", "words"),
    [
        ({"XLLM_PLATFORM": "cuda"}, "platform", "unknown platform 'cuda'"),
        ({"XLLM_DEVICE": "abacus"}, "device", "no such device family"),
        ({"XLLM_LOAD_PLUGINS": "none-such"}, "plugins", "no plugin named 'none-such'"),
    ],
)
def test_a_mistake_is_a_problem_in_a_whole_report(
    run_python: Any, environment: dict[str, str], name: str, words: str
) -> None:
    done = run_python(*DOCTOR, "--json", **environment)
    assert (done.returncode, done.stderr) == (1, "")
    found = examined(done)
    (problem,) = [p for p in found["problems"] if p["name"] in {"platform", "device", "plugins"}]
    assert problem["name"] == name
    assert words in problem["found"]
    assert found["platform_class"] == "none: see the problems"
    assert found["versions"]["vllm"]
    assert found["settings"]


def test_several_mistakes_are_all_reported(run_python: Any, site: Any) -> None:
    site.add_distribution("vllm", "0.31.0")
    done = run_python(*DOCTOR, "--json", XLLM_CHANNEL__ENABLED="maybe", VLLM_PLUGINS="other")
    assert done.returncode == 1
    problems = {problem["name"]: problem["found"] for problem in examined(done)["problems"]}
    assert "vLLM 0.31.0 is installed" in problems["device"]
    assert "channel.enabled='maybe'" in problems["settings"]
    assert "VLLM_PLUGINS='other'" in problems["plugin-not-allowed"]


def test_two_plugins_with_one_family_are_a_problem(run_python: Any, site: Any) -> None:
    site.add_module("copycat", "from xllm_plugin.cpu.accelerator import register_device_families")
    site.add_distribution("copycat-dist", entry_points={"xllm_plugin": {"copycat": "copycat"}})
    done = run_python(*DOCTOR, "--json")
    assert done.returncode == 1, done.stderr
    (problem,) = [p for p in examined(done)["problems"] if "device family" in p["found"]]
    assert problem["name"] == "plugins"


def test_the_text_report_of_a_machine_with_a_problem(run_python: Any) -> None:
    done = run_python(*DOCTOR, XLLM_DEVICE="abacus", COLUMNS="200")
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem device: XLLM_DEVICE=abacus" in done.stdout


@pytest.mark.engine  # imports all of vLLM, twenty seconds
def test_a_machine_on_which_it_works(run_python: Any) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    done = run_python(*DOCTOR, "--json", XLLM_DEVICE="cpu")
    found = examined(done)
    assert found["platform_class"] == "xllm_plugin.cpu.platform.XllmCpuPlatform"
    assert (found["platform"], found["device"]) == ("xllm", "cpu")
    assert found["seams"]
    assert all(seam["fits"] for seam in found["seams"])
    assert done.returncode == (1 if found["problems"] else 0)
