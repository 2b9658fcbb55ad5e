"""The report: versions, platform and why, families, plugins, seams, settings, findings."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform as host
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from xllm_plugin import __version__, shims
from xllm_plugin.accelerator.discover import Choice
from xllm_plugin.accelerator.family import DeviceFamily, Fact, Probe
from xllm_plugin.config import Setting, settings_with_origin
from xllm_plugin.doctor.machine import TORCH_BROKEN, Finding, find, look
from xllm_plugin.errors import SeamError, XllmError
from xllm_plugin.plugins import PluginInfo, describe, device_families, manager_here
from xllm_plugin.seams import SEAMS, check
from xllm_plugin.selection import DEVICE_ENV, Selection, select_here
from xllm_plugin.startup import resolve, vllm_version

__all__ = ["FamilyState", "Report", "SeamState", "examine"]

T = TypeVar("T")

DISTRIBUTIONS = (
    "vllm",
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "pydantic",
    "pluggy",
)


@dataclass(frozen=True, slots=True)
class FamilyState:
    """One device family and what its probe said."""

    name: str
    probe: Probe


@dataclass(frozen=True, slots=True)
class SeamState:
    """One row of the seam table and whether it fits this vLLM."""

    name: str
    target: str
    why: str
    fits: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `xllm doctor` shows; field names are its JSON keys."""

    versions: dict[str, str]
    platform: str
    platform_reason: str
    platform_class: str
    device: str
    device_reason: str
    device_families: tuple[FamilyState, ...]
    plugins: tuple[PluginInfo, ...]
    seams: tuple[SeamState, ...]
    settings: tuple[Setting, ...]
    findings: tuple[Finding, ...]
    device_facts: tuple[Fact, ...] = ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that keep a model from being served as asked."""
        return tuple(finding for finding in self.findings if finding.severity == "problem")


def examine() -> Report:
    """Look at this machine.  Never raises for what it finds wrong: that is what it reports."""
    shims.install()
    findings = list(find(look()))
    selection = _noting(findings, "platform", select_here) or Selection("unknown", "see findings")
    manager = _noting(findings, "plugins", manager_here)
    families: tuple[DeviceFamily, ...] | None = ()
    if manager is not None:
        collect = functools.partial(device_families, manager)
        families = _noting(findings, "plugins", collect)
    choice = None if selection.platform != "xllm" else _noting(findings, "device", resolve)
    ask_family = functools.partial(_device_facts, families or (), choice)
    facts = _noting(findings, "device", ask_family) or ()
    if choice is not None:
        name = f"device-{choice.family.name}"
        findings += [
            Finding(name, "problem", f"{fact.name} {fact.found}", fact.mend)
            for fact in facts
            if fact.mend
        ]
    # vLLM asks our plugin on import, which ends this process, too, where it ends a vLLM command.
    importable = vllm_version() is not None and (selection.is_native or choice is not None)
    importable = importable and not any(finding.name == TORCH_BROKEN for finding in findings)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    seams = tuple(_seam_states()) if importable else ()
    findings += [_seam_finding(seam) for seam in seams if not seam.fits]
    return Report(
        versions=_versions(),
        platform=selection.platform,
        platform_reason=selection.reason,
        platform_class=_platform_class() if importable else "none: see the problems",
        device=choice.family.name if choice else "none of ours",
        device_reason=choice.reason if choice else f"platform {selection.platform}",
        device_families=tuple(FamilyState(f.name, f.probe()) for f in families or ()),
        plugins=() if manager is None else describe(manager),
        seams=seams,
        settings=_noting(findings, "settings", settings_with_origin) or (),
        findings=tuple(findings),
        device_facts=facts,
    )


def _device_facts(families: Sequence[DeviceFamily], choice: Choice | None) -> tuple[Fact, ...]:
    """What the family that runs, or was to run, says of its device."""
    name = choice.family.name if choice is not None else os.environ.get(DEVICE_ENV)
    return next((family.examine() for family in families if family.name == name), ())


def _noting(findings: list[Finding], name: str, look_up: Callable[[], T]) -> T | None:
    """Call; what it raises of ours becomes a finding, once."""
    try:
        return look_up()
    except XllmError as error:
        if str(error) not in {finding.found for finding in findings}:
            findings.append(Finding(name, "problem", str(error)))
        return None


def _versions() -> dict[str, str]:
    versions = {"xllm-plugin": __version__, "python": host.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _platform_class() -> str:
    """Ask vLLM itself, in this process, which class it runs on."""
    try:
        current = importlib.import_module("vllm.platforms").current_platform
    except (XllmError, ImportError, OSError, RuntimeError) as error:
        return f"none: {error}"
    return f"{type(current).__module__}.{type(current).__qualname__}"


def _seam_states() -> Iterator[SeamState]:
    for seam in SEAMS:
        try:
            check(seam)
        except SeamError as error:
            yield SeamState(seam.name, seam.target, seam.why, fits=False, detail=str(error))
        else:
            yield SeamState(seam.name, seam.target, seam.why, fits=True, detail="fits")


def _seam_finding(seam: SeamState) -> Finding:
    return Finding(f"seam-{seam.name}", "problem", seam.detail, "install a supported vLLM")
