"""The contract of `xllm_plugin.accelerator.graphs.GraphBackend`, clause by clause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from xllm_plugin.accelerator.graphs import GraphBackend, GraphHandle
from xllm_plugin.testing.conformance.contract import (
    Contract,
    Unchecked,
    UncheckedError,
    refuses,
    require,
)

__all__ = ["GRAPHS", "GraphKit", "GraphProbe", "GraphWork", "check_graph_backend"]

BackendT = TypeVar("BackendT", bound=GraphBackend)

NO_GRAPH = GraphHandle(2**62 + 1)
"""A handle that no backend has given out."""

SAMPLE = 5
"""An input unlike those that the checks use beside it."""


@dataclass(frozen=True, slots=True)
class GraphWork:
    """A piece of device work: one tensor in, one tensor out, ``output = input + 1``.

    Attributes:
        write: put a small integer into the input tensor.
        run: enqueue the work, and return the output tensor, allocated by `run`.
        read: the integer in an output tensor, when the device has finished.
    """

    write: Callable[[int], None]
    run: Callable[[], Any]
    read: Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class GraphProbe:
    """What the checks need beyond the protocol, for one backend.  None: clauses go unchecked.

    Attributes:
        make_work: makes work with tensors of its own.
        fail_next_capture: makes the device run out of memory during the next capture.
    """

    make_work: Callable[[], GraphWork]
    fail_next_capture: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class GraphKit(Generic[BackendT]):
    """How to check a backend: make a fresh one, and look behind it."""

    make_backend: Callable[[], BackendT]
    probe: Callable[[BackendT], GraphProbe]


class _RunFailedError(Exception):
    """What captured code raises in these checks."""


GRAPHS: Contract[GraphKit[Any]] = Contract("GraphBackend")


def check_graph_backend(
    make_backend: Callable[[], BackendT], probe: Callable[[BackendT], GraphProbe]
) -> tuple[Unchecked, ...]:
    """Check that a backend keeps the contract of `GraphBackend`.

    Args:
        make_backend: makes a fresh backend, once for each clause.
        probe: brings work for a backend that `make_backend` made.

    Returns:
        The clauses that the probe brings no means to check.

    Raises:
        AssertionError: the first broken clause.
    """
    return GRAPHS.check(GraphKit(make_backend, probe))


class Scene:
    """A backend with one captured graph."""

    def __init__(self, kit: GraphKit[Any]) -> None:
        self.backend: GraphBackend = kit.make_backend()
        self.probe = kit.probe(self.backend)
        self.work = self.probe.make_work()
        self.graph = self.backend.capture(self.work.run)

    def check(self, when: str) -> None:
        """Require that the graph still computes."""
        expect_result(self.backend, self.graph, self.work, 40, when)

    def keeps_nothing(self, when: str, memory_bytes: int) -> None:
        """Require that a failed capture left the backend as it was and fit to capture."""
        self.check(when)
        used = self.backend.memory_used_bytes()
        require(used == memory_bytes, f"{when}, {used} bytes are held, not {memory_bytes}.")
        work = self.probe.make_work()
        expect_result(self.backend, self.backend.capture(work.run), work, 9, f"{when}, a new graph")


def expect_result(
    backend: GraphBackend, graph: GraphHandle, work: GraphWork, value: int, when: str
) -> None:
    """Replay on `value` and require its successor."""
    work.write(value)
    found = work.read(backend.replay(graph))
    require(found == value + 1, f"{when}: input {value} gave {found}, not {value + 1}.")


@GRAPHS.clause
def has_every_method(kit: GraphKit[Any]) -> None:
    """A backend has every method of the protocol."""
    backend = kit.make_backend()
    require(isinstance(backend, GraphBackend), f"{type(backend).__name__} lacks one.")


@GRAPHS.clause
def replay_reads_the_present_inputs(kit: GraphKit[Any]) -> None:
    """`replay` runs the captured work on the present contents of its input tensors."""
    scene = Scene(kit)
    for value in (1, 5, 5, 2):
        expect_result(scene.backend, scene.graph, scene.work, value, "a replay")


@GRAPHS.clause
def replay_returns_what_run_returned(kit: GraphKit[Any]) -> None:
    """`replay` returns what `run` returned, whatever its structure."""
    scene = Scene(kit)
    work = scene.probe.make_work()
    graph = scene.backend.capture(lambda: {"output": (work.run(),), "label": "kept"})
    work.write(SAMPLE)
    result = scene.backend.replay(graph)
    require(
        isinstance(result, dict) and result.keys() == {"output", "label"},
        f"run returned a dict with output and label, replay returned {result!r}.",
    )
    require(result["label"] == "kept", f"the label 'kept' came back as {result['label']!r}.")
    found = work.read(result["output"][0])
    require(found == SAMPLE + 1, f"the output inside the dict is {found}, not {SAMPLE + 1}.")


@GRAPHS.clause
def replay_returns_the_same_tensors(kit: GraphKit[Any]) -> None:
    """`replay` returns the same tensors every time; the next replay overwrites them."""
    scene = Scene(kit)
    scene.work.write(1)
    first = scene.backend.replay(scene.graph)
    scene.work.write(SAMPLE)
    scene.backend.replay(scene.graph)
    found = scene.work.read(first)
    require(
        found == SAMPLE + 1,
        f"the tensor of the first replay holds {found} after the second, not {SAMPLE + 1}.",
    )


@GRAPHS.clause
def graphs_do_not_disturb_each_other(kit: GraphKit[Any]) -> None:
    """`replay` leaves other graphs' results as they are."""
    scene = Scene(kit)
    other = scene.probe.make_work()
    other_graph = scene.backend.capture(other.run)
    scene.work.write(SAMPLE)
    result = scene.backend.replay(scene.graph)
    expect_result(scene.backend, other_graph, other, 20, "the other graph")
    found = scene.work.read(result)
    require(
        found == SAMPLE + 1,
        f"a result was {SAMPLE + 1} and, after another graph's replay, {found}.",
    )


@GRAPHS.clause
def handles_are_given_out_once(kit: GraphKit[Any]) -> None:
    """A backend gives each handle out only once, so that a stale one is always found out."""
    scene = Scene(kit)
    seen = {scene.graph}
    for _ in range(4):
        graph = scene.backend.capture(scene.probe.make_work().run)
        require(graph not in seen, f"handle {graph} came twice.")
        seen.add(graph)
        scene.backend.drop(graph)


@GRAPHS.clause
def what_run_raises_passes_through(kit: GraphKit[Any]) -> None:
    """What `run` raises passes through `capture`, and nothing is kept."""
    scene = Scene(kit)
    memory_bytes = scene.backend.memory_used_bytes()
    work = scene.probe.make_work()

    def fail() -> None:
        work.run()
        raise _RunFailedError("on purpose")

    refuses(_RunFailedError, "capture of code that fails", scene.backend.capture, fail)
    scene.keeps_nothing("after a capture whose code failed", memory_bytes)


@GRAPHS.clause
def capture_out_of_memory_raises_memory_error(kit: GraphKit[Any]) -> None:
    """`capture` raises MemoryError when the device has no memory left, and nothing is kept."""
    scene = Scene(kit)
    if scene.probe.fail_next_capture is None:
        raise UncheckedError("GraphProbe.fail_next_capture is not given")
    memory_bytes = scene.backend.memory_used_bytes()
    work = scene.probe.make_work()
    scene.probe.fail_next_capture()
    what = "capture on a device without memory"
    refuses(MemoryError, what, scene.backend.capture, work.run)
    scene.keeps_nothing("after a capture without memory", memory_bytes)


@GRAPHS.clause
def replay_refuses_unknown_graphs(kit: GraphKit[Any]) -> None:
    """`replay` raises ValueError for a graph that was not captured or has been dropped."""
    scene = Scene(kit)
    dropped = scene.backend.capture(scene.probe.make_work().run)
    scene.backend.drop(dropped)
    for what, graph in (("never captured", NO_GRAPH), ("dropped", dropped)):
        refuses(ValueError, f"replay of a graph {what}", scene.backend.replay, graph)
    scene.check("after refused replays")


@GRAPHS.clause
def drop_refuses_unknown_graphs(kit: GraphKit[Any]) -> None:
    """`drop` raises ValueError for a graph that was not captured or has been dropped."""
    scene = Scene(kit)
    dropped = scene.backend.capture(scene.probe.make_work().run)
    scene.backend.drop(dropped)
    for what, graph in (("never captured", NO_GRAPH), ("dropped", dropped)):
        refuses(ValueError, f"drop of a graph {what}", scene.backend.drop, graph)
    scene.check("after refused drops")


@GRAPHS.clause
def drop_leaves_other_graphs(kit: GraphKit[Any]) -> None:
    """`drop` leaves other graphs alive."""
    scene = Scene(kit)
    for _ in range(2):
        scene.backend.drop(scene.backend.capture(scene.probe.make_work().run))
    scene.check("after other graphs were dropped")


@GRAPHS.clause
def memory_is_counted_and_freed(kit: GraphKit[Any]) -> None:
    """`memory_used_bytes` is zero without graphs, positive with one, never less with two."""
    backend: GraphBackend = kit.make_backend()
    make_work = kit.probe(backend).make_work
    require(backend.memory_used_bytes() == 0, f"a new one holds {backend.memory_used_bytes()}.")
    graphs, used = [], [0]
    for _ in range(2):
        graphs.append(backend.capture(make_work().run))
        used.append(backend.memory_used_bytes())
    require(0 < used[1] <= used[2], f"with no, one and two graphs it was {used}.")
    for graph in graphs:
        backend.drop(graph)
        used.append(backend.memory_used_bytes())
    require(used[3] <= used[2], f"a drop took it from {used[2]} to {used[3]}.")
    require(used[4] == 0, f"all graphs dropped, it is {used[4]}.")
