"""The contract of `xllm_plugin.accelerator.family.DeviceFamily`, clause by clause."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from typing import Any

from xllm_plugin.accelerator.family import Capabilities, DeviceFamily, Probe
from xllm_plugin.accelerator.graphs import GraphBackend
from xllm_plugin.accelerator.memory import MemoryDriver
from xllm_plugin.testing.conformance.contract import (
    Contract,
    Unchecked,
    UncheckedError,
    require,
)

__all__ = ["FAMILY", "check_device_family", "load_kit"]

GRAPH_MODES = ("eager", "partial", "full")
HEAVY_MODULES = ("torch", "vllm", "numpy", "transformers", "torch_npu", "triton")
PROBE_TIMEOUT_S = 60.0
PROBE_IN_CHILD = """\
import json, pickle, sys
before = set(sys.modules)
probe = pickle.loads(sys.stdin.buffer.read())
probe()
print(json.dumps(sorted(set(sys.modules) - before)))
"""

FAMILY: Contract[DeviceFamily] = Contract("DeviceFamily")


def check_device_family(family: DeviceFamily) -> tuple[Unchecked, ...]:
    """Check that a family's record keeps the contract of `DeviceFamily`.

    Where the family is usable its classes are imported, and with them vLLM.

    Returns:
        The clauses that cannot be checked here, as on a machine without the hardware.

    Raises:
        AssertionError: the first broken clause.
    """
    return FAMILY.check(family)


def load_kit(class_path: str, kit: str) -> Any:
    """Find how a family's part is checked: `kit` in the module ``testkit`` beside its class.

    The driver ``acme.device.memory.Driver`` is checked with ``acme.device.testkit.MEMORY_KIT``, a
    `MemoryKit`; a graph backend likewise with ``GRAPH_KIT``.

    Raises:
        AssertionError: there is no such module, or nothing of that name in it.
    """
    package = class_path.rpartition(".")[0].rpartition(".")[0]
    module = f"{package}.testkit"
    require(
        importlib.util.find_spec(module) is not None,
        f"{class_path} is named as a part of a device family, but {module}, which says how to "
        f"check it, does not exist. Write it, with {kit}.",
    )
    found = getattr(importlib.import_module(module), kit, None)
    require(found is not None, f"{module} has no {kit}, by which {class_path} is checked.")
    return found


def usable_or_unchecked(family: DeviceFamily) -> None:
    probe = family.probe()
    if not probe.usable:
        raise UncheckedError(
            f"{family.name} is not usable: looked for {probe.looked_for}; found {probe.found}"
        )


def named_classes(family: DeviceFamily) -> dict[str, str]:
    """The class paths in a family's record, by field."""
    fields = {
        "platform_class": family.platform_class,
        "capabilities.memory_driver": family.capabilities.memory_driver,
        "capabilities.graph_backend": family.capabilities.graph_backend,
    }
    return {field: path for field, path in fields.items() if path is not None}


@FAMILY.clause
def record_is_a_device_family(family: DeviceFamily) -> None:
    """A family is a `DeviceFamily` with `Capabilities`."""
    require(isinstance(family, DeviceFamily), f"it is a {type(family).__name__}.")
    require(
        isinstance(family.capabilities, Capabilities),
        f"its capabilities are a {type(family.capabilities).__name__}.",
    )


@FAMILY.clause
def name_is_a_folder_name(family: DeviceFamily) -> None:
    """`name` is fit for `XLLM_DEVICE` and a folder: lower-case letters, digits, underscores."""
    require(re.fullmatch(r"[a-z][a-z0-9_]*", family.name) is not None, f"it is {family.name!r}.")


@FAMILY.clause
def class_paths_are_dotted(family: DeviceFamily) -> None:
    """Every class is named by a dotted path ``package.module.Class``."""
    for field, path in named_classes(family).items():
        good = len(path.split(".")) > 2 and all(part.isidentifier() for part in path.split("."))  # noqa: PLR2004 - package, module, class
        require(good, f"{field} is {path!r}.")


@FAMILY.clause
def graph_modes_fit_the_backend(family: DeviceFamily) -> None:
    """`graph_modes` are known, named once, and need a backend exactly if they go beyond eager."""
    modes, backend = family.capabilities.graph_modes, family.capabilities.graph_backend
    require(
        bool(modes) and len(set(modes)) == len(modes) and set(modes) <= set(GRAPH_MODES),
        f"they are {modes}; accepted are {GRAPH_MODES}, each once.",
    )
    captures = bool(set(modes) - {"eager"})
    require(
        captures == (backend is not None), f"they are {modes} and graph_backend is {backend!r}."
    )


@FAMILY.clause
def probe_explains_itself(family: DeviceFamily) -> None:
    """`probe` never raises; it says what it looked for and found, and the same when asked again."""
    first, second = family.probe(), family.probe()
    require(isinstance(first, Probe), f"it returned a {type(first).__name__}.")
    require(isinstance(first.usable, bool), f"usable is {first.usable!r}, no bool.")
    require(
        bool(first.looked_for.strip()) and bool(first.found.strip()),
        f"looked_for is {first.looked_for!r} and found is {first.found!r}.",
    )
    require(first.usable == second.usable, f"usable was {first.usable}, then {second.usable}.")


@FAMILY.clause
def probe_imports_nothing_heavy(family: DeviceFamily) -> None:
    """`probe` and the module that holds it import neither torch nor vLLM nor their like."""
    try:
        pickled = pickle.dumps(family.probe)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UncheckedError(f"the probe cannot be sent to a fresh interpreter: {error}") from error
    child = subprocess.run(
        [sys.executable, "-c", PROBE_IN_CHILD],
        input=pickled,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        timeout=PROBE_TIMEOUT_S,
        check=False,
    )
    require(
        child.returncode == 0,
        f"in a fresh interpreter it failed:\n{child.stderr.decode(errors='replace')}",
    )
    imported = json.loads(child.stdout.splitlines()[-1])
    heavy = [name for name in imported if name in HEAVY_MODULES]
    require(not heavy, f"it imported {', '.join(heavy)}.")


@FAMILY.clause
def classes_can_be_loaded(family: DeviceFamily) -> None:
    """On a machine where the family is usable, each named class exists and fits its protocol."""
    usable_or_unchecked(family)
    protocols = {
        "capabilities.memory_driver": MemoryDriver,
        "capabilities.graph_backend": GraphBackend,
    }
    for field, path in named_classes(family).items():
        module, _, name = path.rpartition(".")
        found = getattr(importlib.import_module(module), name, None)
        require(isinstance(found, type), f"{field}: {path} is {found!r}, no class.")
        methods = _methods(protocols[field]) if field in protocols else ()
        lacking = [method for method in methods if not hasattr(found, method)]
        require(not lacking, f"{field}: {path} lacks {', '.join(lacking)}.")


def _methods(protocol: type) -> tuple[str, ...]:
    return tuple(name for name in vars(protocol) if not name.startswith("_"))
