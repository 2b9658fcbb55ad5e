"""Choosing the device family: what was asked for, else the best usable one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm_plugin.accelerator.family import DeviceFamily, Probe
from xllm_plugin.errors import PlatformError

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A family, what its probe said, and why it was chosen."""

    family: DeviceFamily
    probe: Probe
    reason: str


def choose(families: Sequence[DeviceFamily], wanted: str | None) -> Choice:
    """Choose a family.

    Args:
        families: the registered ones, preferred first.
        wanted: a family's name, or None for the first usable one.

    Raises:
        PlatformError: `wanted` is unknown or not usable, or none is usable; the message says for
            each family what was looked for and what was found.
    """
    if wanted is not None:
        return _choose_named(families, wanted)
    probes = [(family, family.probe()) for family in families]
    for family, probe in probes:
        if probe.usable:
            return Choice(family, probe, f"{probe.found}; first usable of {_names(families)}")
    raise PlatformError(
        "no device family is usable here.\n"
        + "\n".join(_explained(family, probe) for family, probe in probes)
        + "\nInstall one of them, or run vLLM without this plugin: --platform native."
    )


def _choose_named(families: Sequence[DeviceFamily], wanted: str) -> Choice:
    for family in families:
        if family.name == wanted:
            probe = family.probe()
            if probe.usable:
                return Choice(family, probe, f"XLLM_DEVICE={wanted}")
            raise PlatformError(
                f"XLLM_DEVICE={wanted}: not usable here.\n{_explained(family, probe)}\n"
                f"Unset XLLM_DEVICE to take the first usable of {_names(families)}."
            )
    raise PlatformError(
        f"XLLM_DEVICE={wanted}: no such device family; looked among the built-in ones and the "
        f"plugins of the entry-point group 'xllm_plugin' and found {_names(families)}. "
        "Unset XLLM_DEVICE to choose automatically."
    )


def _names(families: Sequence[DeviceFamily]) -> str:
    return ", ".join(family.name for family in families) or "none"


def _explained(family: DeviceFamily, probe: Probe) -> str:
    return f"  {family.name}: looked for {probe.looked_for}; found {probe.found}"
