"""The pluggy manager: built-ins first, then the entry-point group ``xllm_plugin``.

``XLLM_LOAD_PLUGINS=a,b`` loads only the named third-party plugins, ``XLLM_LOAD_PLUGINS=`` none.
Built-ins always load: they are the package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pluggy

import xllm_plugin
from xllm_plugin import hookspecs
from xllm_plugin.accelerator.family import DeviceFamily
from xllm_plugin.errors import ConfigError
from xllm_plugin.service.policy import RoutingPolicy

__all__ = [
    "LOAD_ENV",
    "PluginInfo",
    "build_manager",
    "describe",
    "device_families",
    "manager_here",
    "routing_policies",
]

LOAD_ENV = "XLLM_LOAD_PLUGINS"


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One registered plugin, as `xllm doctor` shows it."""

    name: str
    origin: str
    hooks: tuple[str, ...]


def build_manager(only: str | None = None) -> pluggy.PluginManager:
    """Register built-ins and third-party plugins.

    Args:
        only: comma-separated names of the third-party plugins to load; None loads all of them.

    Raises:
        ConfigError: a name in `only` is not installed, or a plugin cannot be imported or fits no
            hook.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for name in _builtin_modules():
        manager.register(importlib.import_module(name), name=name)
    for entry_point in _third_party(only):
        _register_entry_point(manager, entry_point)
    return manager


def manager_here() -> pluggy.PluginManager:
    """`build_manager` with the environment's choice of plugins."""
    return build_manager(os.environ.get(LOAD_ENV))


def device_families(manager: pluggy.PluginManager) -> tuple[DeviceFamily, ...]:
    """Collect the families of every plugin, the preferred one first.

    Raises:
        ConfigError: two plugins bring a family of one name.
    """
    families: dict[str, DeviceFamily] = {}
    manager.hook.register_device_families(register=_register_once(families, "device family"))
    return tuple(sorted(families.values(), key=lambda family: -family.preference))


def routing_policies(manager: pluggy.PluginManager) -> dict[str, RoutingPolicy]:
    """Collect the policies of every plugin by name.

    Raises:
        ConfigError: two plugins bring a policy of one name.
    """
    policies: dict[str, RoutingPolicy] = {}
    manager.hook.register_routing_policies(register=_register_once(policies, "routing policy"))
    return dict(sorted(policies.items()))


def _register_once(found: dict[str, Any], kind: str) -> Callable[[Any], None]:
    """What a hook calls with each of a kind; two of one name are an error."""

    def register(one: Any) -> None:
        if one.name in found:
            raise ConfigError(
                f"two plugins register a {kind} named {one.name!r}; uninstall one, or name the "
                f"plugins to load in {LOAD_ENV}."
            )
        found[one.name] = one

    return register


def describe(manager: pluggy.PluginManager) -> tuple[PluginInfo, ...]:
    """List the registered plugins with the hooks that each fills."""
    distributions = {
        id(plugin): f"{distribution.project_name} {distribution.version}"
        for plugin, distribution in manager.list_plugin_distinfo()
    }
    return tuple(
        PluginInfo(
            name=name,
            origin=distributions.get(id(plugin), "built in"),
            hooks=tuple(sorted(caller.name for caller in manager.get_hookcallers(plugin) or ())),
        )
        for name, plugin in manager.list_name_plugin()
        if plugin is not None
    )


def _builtin_modules() -> list[str]:
    """The routing policies, and each sub-package with an `accelerator.py`: a device family."""
    return ["xllm_plugin.service.policies", *_family_modules()]


def _family_modules() -> list[str]:
    return [
        f"xllm_plugin.{package.name}.accelerator"
        for package in pkgutil.iter_modules(xllm_plugin.__path__)
        if package.ispkg
        and importlib.util.find_spec(f"xllm_plugin.{package.name}.accelerator") is not None
    ]


def _third_party(only: str | None) -> list[importlib.metadata.EntryPoint]:
    found = {ep.name: ep for ep in importlib.metadata.entry_points(group=hookspecs.PROJECT)}
    if only is None:
        return list(found.values())
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if name not in found:
            raise ConfigError(
                f"{LOAD_ENV}: no plugin named {name!r}; installed are {sorted(found) or 'none'}."
            )
    return [found[name] for name in wanted]


def _register_entry_point(
    manager: pluggy.PluginManager, entry_point: importlib.metadata.EntryPoint
) -> None:
    try:
        manager.load_setuptools_entrypoints(hookspecs.PROJECT, name=entry_point.name)
        manager.check_pending()
    except Exception as error:  # a foreign module may raise anything at import
        raise ConfigError(
            f"plugin {entry_point.name!r} ({entry_point.value}) cannot be loaded: {error}. "
            f"Mend or uninstall it, or leave it out of {LOAD_ENV}."
        ) from error
