"""Every plugin point of this package, one function each.

A plugin is a module or class whose functions carry `hookimpl`; it is found through the entry-point
group ``xllm_plugin``.  The built-in parts register through the same hooks.  Later features add
their own hooks here (draft methods, rebalance policies) when they come to exist.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from xllm_plugin.accelerator.family import DeviceFamily
from xllm_plugin.service.policy import RoutingPolicy

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "xllm_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Call `register` once for each accelerator family that the plugin brings."""


@hookspec
def register_routing_policies(register: Callable[[RoutingPolicy], None]) -> None:
    """Call `register` once for each policy by which `xllm service` may choose instances."""
