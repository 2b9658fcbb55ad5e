"""The contracts of a device family's parts as code, for its own test suite.

::

    def test_memory_driver() -> None:
        check_memory_driver(MyDriver, lambda driver: MemoryProbe(read=my_read, write=my_write))

A check returns the clauses that it had no means to check, and raises `AssertionError` with the
clause that is broken.  `MEMORY`, `GRAPHS` and `FAMILY` list the clauses, for one test a clause.

A family that names a part in its `Capabilities` says how to check it in a module `testkit` beside
the part's own: ``MEMORY_KIT`` and ``GRAPH_KIT`` (see `load_kit`).  Nothing here imports torch or
vLLM.
"""

from __future__ import annotations

from xllm_plugin.testing.conformance.contract import Contract, Unchecked, UncheckedError
from xllm_plugin.testing.conformance.families import FAMILY, check_device_family, load_kit
from xllm_plugin.testing.conformance.graphs import (
    GRAPHS,
    GraphKit,
    GraphProbe,
    check_graph_backend,
)
from xllm_plugin.testing.conformance.memory import (
    MEMORY,
    MemoryKit,
    MemoryProbe,
    check_memory_driver,
)

__all__ = [
    "FAMILY",
    "GRAPHS",
    "MEMORY",
    "Contract",
    "GraphKit",
    "GraphProbe",
    "MemoryKit",
    "MemoryProbe",
    "Unchecked",
    "UncheckedError",
    "check_device_family",
    "check_graph_backend",
    "check_memory_driver",
    "load_kit",
]
