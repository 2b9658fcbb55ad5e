"""Every plugin point of this package, one function each.

A plugin is a module or class whose functions carry `hookimpl`; it is found through the entry-point
group ``xllm_plugin``.  The built-in parts register through the same hooks.  Later features add
their own hooks here (routing policies, draft methods, rebalance policies) when they come to exist.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from xllm_plugin.accelerator.family import DeviceFamily

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "xllm_plugin"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_device_families(register: Callable[[DeviceFamily], None]) -> None:
    """Call `register` once for each accelerator family that the plugin brings."""
