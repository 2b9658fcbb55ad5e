"""The record by which a device family makes itself known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Capabilities", "DeviceFamily", "Fact", "Probe"]


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a family can run here.

    Attributes:
        usable: True when vLLM can run on this family now.
        looked_for: what was looked for, in words an operator can act on.
        found: what was found instead, or what makes it usable.
    """

    usable: bool
    looked_for: str
    found: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that a family needs of a machine, or that helps to judge its device.

    Attributes:
        name: in a word or two, such as "driver".
        found: the value seen, or "none".
        needed: what is accepted; empty where anything is.
        mend: the next step; empty where what was found will do.
    """

    name: str
    found: str
    needed: str = ""
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The parts of a family that exist; a feature that needs an absent one says so at start-up.

    Attributes:
        graph_modes: of "eager", "partial", "full", those that the family's graph backend captures.
        memory_driver: class path of its `MemoryDriver`, or None.
        graph_backend: class path of its `GraphBackend`, or None.

    A family that names a part ships a module `testkit` beside it, with `MEMORY_KIT` or `GRAPH_KIT`
    (`xllm_plugin.testing.conformance`), so that the conformance tests can look behind the part.
    """

    graph_modes: tuple[str, ...] = ("eager",)
    memory_driver: str | None = None
    graph_backend: str | None = None


@dataclass(frozen=True, slots=True)
class DeviceFamily:
    """One family of accelerators.

    Attributes:
        name: as in `XLLM_DEVICE`; also the folder's name.
        preference: among the usable families the one with the highest preference is chosen.
        platform_class: class path of its vLLM platform.
        probe: finds out whether it can run here; imports nothing heavy and does not initialise
            the device.
        capabilities: the parts that exist.
        prepare: called in a server's process, early in its imports and perhaps again, for what
            can be done beside them; returns at once, raises nothing.
        examine: what `xllm doctor` shows of the device and of what it needs, in the order in which
            to mend it.  It may take the device for a moment, in a process of its own.
    """

    name: str
    preference: int
    platform_class: str
    probe: Callable[[], Probe]
    capabilities: Capabilities = field(default_factory=Capabilities)
    prepare: Callable[[], None] = lambda: None
    examine: Callable[[], tuple[Fact, ...]] = lambda: ()
