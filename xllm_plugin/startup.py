"""Checks before vLLM runs on us: its version, its rivals, the device."""

from __future__ import annotations

import importlib.metadata
import os

from xllm_plugin.accelerator.discover import Choice, choose
from xllm_plugin.accelerator.platform import XllmPlatformMixin
from xllm_plugin.config import load_config
from xllm_plugin.errors import PlatformError
from xllm_plugin.plugins import device_families, manager_here
from xllm_plugin.selection import DEVICE_ENV

__all__ = [
    "SUPPORTED_VLLM",
    "check_platform_is_ours",
    "check_vllm_version",
    "other_platforms",
    "resolve",
    "vllm_version",
]

SUPPORTED_VLLM = "0.32"


def resolve() -> Choice:
    """Check the surroundings and choose the device family.

    File and environment are read here too, long before vLLM's config is built, only so that a
    mistake in them shows at once.

    Raises:
        ConfigError: a setting in file or environment is wrong.
        PlatformError: vLLM is absent or of another version, a second out-of-tree platform is
            active, or no device family is usable.
    """
    check_vllm_version(vllm_version())
    rivals = other_platforms()
    if rivals:
        raise PlatformError(
            f"vLLM runs on one out-of-tree platform, and {', '.join(map(repr, rivals))} would be "
            "active beside 'xllm'. Choose one: VLLM_PLUGINS=xllm (plus the other plugins you "
            f"need) for this one, --platform native for {rivals[0]!r}, or uninstall one of them."
        )
    load_config()
    return choose(device_families(manager_here()), os.environ.get(DEVICE_ENV) or None)


def check_platform_is_ours() -> None:
    """See that vLLM runs on our platform, once it has chosen.

    Raises:
        PlatformError: it never asked us; the message says which variable keeps it from asking.
    """
    from vllm.platforms import current_platform

    if isinstance(current_platform, XllmPlatformMixin):
        return
    reason = "another platform was put in place"
    if os.environ.get("VLLM_TARGET_DEVICE"):
        reason = f"VLLM_TARGET_DEVICE={os.environ['VLLM_TARGET_DEVICE']} makes it skip every plugin"
    raise PlatformError(
        f"xllm is wanted, but vLLM runs on {type(current_platform).__qualname__}: {reason}. "
        "Unset it, or ask for vLLM without this plugin: XLLM_PLATFORM=native."
    )


def vllm_version() -> str | None:
    """Return the version of the installed vLLM, or None."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def check_vllm_version(version: str | None) -> None:
    """Refuse a vLLM that this package was not written against.

    Raises:
        PlatformError: vLLM is absent, or not of the supported minor version.
    """
    if version is None:
        raise PlatformError(
            "vLLM is not installed here. Install it with this package: pip install "
            "'xllm-plugin[cpu]'; README, \"Install\", names the index it needs."
        )
    if version.split(".")[:2] != SUPPORTED_VLLM.split("."):
        raise PlatformError(
            f"vLLM {version} is installed; this version of xllm-plugin supports "
            f"{SUPPORTED_VLLM}.x. Install that one, or run vLLM without this plugin: "
            "--platform native (XLLM_PLATFORM=native)."
        )


def other_platforms() -> tuple[str, ...]:
    """Name the other out-of-tree platform plugins that would be active in this process."""
    allowed = os.environ.get("VLLM_PLUGINS")
    # Not stripped: vLLM does not strip either (vllm/envs.py).
    names = None if allowed is None else allowed.split(",")
    return tuple(
        entry.name
        for entry in importlib.metadata.entry_points(group="vllm.platform_plugins")
        if not entry.value.startswith("xllm_plugin.")
        and (names is None or entry.name in names)
        and _is_active(entry)
    )


def _is_active(entry: importlib.metadata.EntryPoint) -> bool:
    try:
        return entry.load()() is not None
    except Exception:  # noqa: BLE001  vLLM, too, counts a plugin that raises as not active
        return False
