"""The child process that compiles: ``python -m xllm_plugin.cpu.graphs.compiler REQUEST``.

It has the lowest priority at first, one thread, and ends with its parent.  It builds the model as
the engine does, from the engine's own configuration, and compiles it by vLLM's ahead-of-time path.
Before the graph is kept it is read back and run at two batch sizes, so that what the engine loads
has worked.
"""

from __future__ import annotations

import logging
import os
import pickle
import resource
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from xllm_plugin.cpu.parent import end_with_parent

__all__ = ["Request", "main"]

logger = logging.getLogger("vllm.xllm_plugin")

PATIENCE_S = 60.0
NICE = 10
TRIAL_TOKENS = (8, 24)


@dataclass(frozen=True, slots=True)
class Request:
    """What to compile, as the parent pickles it.

    Attributes:
        vllm_config: the engine's, as before its model was loaded.
        facts: what the graph depends on.
        root: of the store.
        parent: process id.
        cpus: that it may run on.
        num_tokens: compile for this batch size alone; None: for all (benchmarks/graph_mode).
    """

    vllm_config: Any
    facts: dict[str, str]
    root: Path
    parent: int
    cpus: frozenset[int]
    num_tokens: int | None = None


class _CompiledError(Exception):
    """Ends the run of the model in which it was compiled; the rest of it is not needed."""


def main(path: str) -> None:
    """Compile what the request at `path` asks for, unless another process has."""
    started_s = time.monotonic()
    step_back()
    end_with_parent()
    # The package's platform, which importing vLLM brings, is the engine's own.
    from xllm_plugin.cpu.graphs.store import GraphStore

    request: Request = pickle.loads(Path(path).read_bytes())  # noqa: S301 - our parent wrote it
    Path(path).unlink()
    os.sched_setaffinity(0, request.cpus)
    store = GraphStore(request.root)
    key = store.key(request.facts)
    with store.lock(key):
        if os.getppid() == request.parent and store.find(request.facts) is None:
            compile_into(store, request, started_s)


def step_back() -> None:
    """Run only where nobody else would, and be the first to go when memory is short.

    Under constant load that is nowhere (0.004 of a core beside one client that decodes), so after
    `PATIENCE_S` this process becomes one that others give way to a little: nice 10 is about a tenth
    of a core.  The kernel may refuse that to an ordinary user; then it waits for quiet times.
    """
    os.nice(NICE)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    timer = threading.Timer(PATIENCE_S, stop_waiting, (os.getpid(),))
    timer.daemon = True
    timer.start()


def stop_waiting(pid: int) -> None:
    """Compete with others, as the kernel allows."""
    try:
        os.sched_setscheduler(pid, os.SCHED_OTHER, os.sched_param(0))
    except PermissionError as error:
        logger.info("xllm-plugin: the compilation goes on at idle priority: %s", error)


def compile_into(store: Any, request: Request, started_s: float) -> None:
    """Compile, try, and keep; `started_s` is when this process began, for the record."""
    from vllm.config import set_current_vllm_config

    from xllm_plugin.cpu.graphs.choice import to_be_compiled
    from xllm_plugin.cpu.graphs.store import INDUCTOR, Manifest

    building = store.begin(store.key(request.facts))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(building / INDUCTOR)
    config = request.vllm_config
    to_be_compiled(config)
    config.cache_config.kv_cache_memory_bytes = 1  # vLLM looks for room for a cache otherwise
    with set_current_vllm_config(config):
        runner = loaded_runner(config, building)
        name = compile_model(runner, building, request.num_tokens)
        sizes = TRIAL_TOKENS if request.num_tokens is None else (request.num_tokens,)
        inputs = try_out(runner, building, name, sizes)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    manifest = Manifest(
        facts=request.facts,
        files={},
        module=name,
        inputs=inputs,
        wall_s=round(time.monotonic() - started_s, 1),
        cpu_s=round(usage.ru_utime + usage.ru_stime, 1),
        peak_bytes=usage.ru_maxrss * 1024,
    )
    store.finish(building, manifest)


def loaded_runner(config: Any, folder: Path) -> Any:
    """vLLM's own worker with the model's weights, and no KV cache."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    from xllm_plugin.cpu.worker import init_amx

    init_amx()
    rendezvous = folder / "rendezvous"
    worker = CPUWorker(config, 0, 0, f"file://{rendezvous}", is_driver_worker=True)
    worker.init_device()
    rendezvous.unlink(missing_ok=True)
    worker.load_model()
    return worker.model_runner


def compile_model(runner: Any, building: Path, num_tokens: int | None) -> str:
    """Let vLLM compile the model in a profiling run, and save the function.

    Returns:
        The compiled module's name in the model.
    """
    import torch
    from vllm.v1.worker.cpu_model_runner import _set_global_compilation_settings

    from xllm_plugin.cpu.graphs.store import MODEL

    parts = {
        name: module
        for name, module in runner.model.named_modules()
        if getattr(module, "do_not_compile", True) is False
    }
    if len(parts) != 1:
        raise RuntimeError(f"vLLM compiles {len(parts)} parts of this model: {', '.join(parts)}")
    ((name, module),) = parts.items()

    def save() -> NoReturn:
        constants = baked_in(module.aot_compiled_fn)
        if constants:
            raise RuntimeError(f"tensors of this process were baked in: {', '.join(constants)}")
        module.aot_compiled_fn.save_compiled_function(str(building / MODEL))
        raise _CompiledError

    module.save_aot_compiled_function = save
    if num_tokens is not None:
        torch._dynamo.mark_dynamic = lambda *_args, **_kwargs: None  # noqa: SLF001
    try:
        with _set_global_compilation_settings(runner.vllm_config):
            runner._dummy_run(num_tokens or runner.max_num_tokens, is_profile=True)  # noqa: SLF001
    except _CompiledError:
        return name
    raise RuntimeError("vLLM ran the model without compiling it")


def try_out(runner: Any, building: Path, name: str, sizes: Sequence[int]) -> list[Any]:
    """Read the saved function back, run it, and describe the inputs it takes."""
    from xllm_plugin.cpu.graphs.artefact import describe, generalise, load, take_inputs

    module = runner.model.get_submodule(name)
    function = load(building, module)
    seen: list[list[Any]] = []
    take_inputs(function, lambda inputs: seen.append([describe(value) for value in inputs]))
    module.aot_compiled_fn = function
    for num_tokens in sizes:
        runner._dummy_run(min(num_tokens, runner.max_num_tokens), is_profile=True)  # noqa: SLF001
    return generalise(seen[0], seen[-1])


def baked_in(function: Any) -> list[str]:
    """Constants of the graph: weights or kernel handles there would be this process's own."""
    entry = function._artifacts.compiled_fn.compiled_fn.serialize()  # noqa: SLF001
    return sorted(entry.compiled_fw.result.constants or {})


if __name__ == "__main__":
    # Pickled classes are found under the module's name, not as those of "__main__".
    from xllm_plugin.cpu.graphs.compiler import main as run

    run(sys.argv[1])
