"""One engine of the graph-mode benchmark, in this process.

``python driver.py`` reads one JSON object a line from standard input and answers each with one
line; `benchmarks/step/sides.py` has the other end.  The first job is ``{"do": "start"}``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xllm_plugin.bench.commands import beside
from xllm_plugin.bench.replies import reply, take_stdout
from xllm_plugin.testing.collect import completion_of

STEP = Path(__file__).resolve().parent.parent / "step"
step_driver = beside(STEP, "driver")

COMPILE_TIMEOUT_S = 600.0
WINDOW_STEPS = 40


class Forms:
    """One engine, and the forms in which its model can run a step."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.engine, self.facts = step_driver.start(job)
        core = self.engine.llm.llm_engine.engine_core.engine_core
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.graph: Any = getattr(self.runner, "_graph", None)
        self.module: Any = None
        self.functions: dict[str, Callable[..., Any]] = {}

    def wait(self) -> dict[str, Any]:
        """Wait for the background compilation, taking eager steps meanwhile."""
        until_s = time.monotonic() + COMPILE_TIMEOUT_S
        while self.graph.state.name == "COMPILING" and time.monotonic() < until_s:
            time.sleep(0.2)
        self.graph.between_steps()
        stored = self.graph._store.find(self.graph._facts)  # noqa: SLF001
        if stored is None:
            raise RuntimeError(f"no graph: {self.graph.state}")
        self.module = self.runner.model.get_submodule(stored.manifest.module)
        self.functions["dynamic"] = self.module.aot_compiled_fn
        return cost(stored, self.module)

    def compile_for(self, num_tokens: int) -> dict[str, Any]:
        """Compile for one batch size alone, as the engine's own child does for all."""
        from xllm_plugin.cpu.graphs import background
        from xllm_plugin.cpu.graphs.artefact import bind

        graph = self.graph
        request = pickle.loads(graph._request)  # noqa: S301, SLF001 - the engine's own
        facts = request.facts | {"num_tokens": str(num_tokens)}
        request = dataclasses.replace(
            request, facts=facts, num_tokens=num_tokens, parent=os.getpid()
        )
        path = graph._store.root / f".bucket-{num_tokens}.request"  # noqa: SLF001
        path.write_bytes(pickle.dumps(request))
        subprocess.run(
            [*graph._command, str(path)],  # noqa: SLF001
            env=background._environment(),  # noqa: SLF001
            stdout=sys.stderr,
            check=True,
            timeout=COMPILE_TIMEOUT_S,
        )
        stored = graph._store.find(facts)  # noqa: SLF001
        self.functions[str(num_tokens)] = for_one_size(
            num_tokens, bind(stored, self.module), self.functions["dynamic"]
        )
        return cost(stored, self.module)

    def use(self, form: str) -> None:
        """Let the next steps run eager, on the dynamic graph, or on that of one batch size."""
        if self.module is None:
            return
        self.module.do_not_compile = form == "eager"
        if form != "eager":
            self.module.aot_compiled_fn = self.functions[form]


def for_one_size(
    num_tokens: int, bucket: Callable[..., Any], dynamic: Callable[..., Any]
) -> Callable[..., Any]:
    """The bucket's graph for its own batch size, as buckets are used; else the dynamic one."""

    def choose(module: Any, input_ids: Any, *rest: Any) -> Any:
        graph = bucket if len(input_ids) == num_tokens else dynamic
        return graph(module, input_ids, *rest)

    return choose


def cost(stored: Any, module: Any) -> dict[str, Any]:
    """What a graph took to make, and takes to read back."""
    from xllm_plugin.cpu.graphs.artefact import bind

    started_s = time.perf_counter()
    bind(stored, module)
    files = [path for path in stored.folder.rglob("*") if path.is_file()]
    return {
        "wall_s": stored.manifest.wall_s,
        "cpu_s": stored.manifest.cpu_s,
        "peak_bytes": stored.manifest.peak_bytes,
        "disk_bytes": sum(path.stat().st_size for path in files),
        "read_s": time.perf_counter() - started_s,
    }


def decode_ms(engine: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> float:
    """A typical step in which every request makes one token."""
    engine.run(prompts, max_tokens)
    return middle([s.whole_ms for s in engine.steps if s.is_decode(len(prompts))])


def prefill_ms(engine: Any, prompts: Sequence[Sequence[int]]) -> float:
    """A typical step that reads one prompt."""
    found = []
    for prompt in prompts:
        engine.run([prompt], 1)
        found += [s.whole_ms for s in engine.steps if s.is_prefill(len(prompt))]
    return middle(found)


def middle(values: Sequence[float]) -> float:
    """Mean of the middle half."""
    ordered = sorted(values)
    kept = ordered[len(ordered) // 4 : max(len(ordered) * 3 // 4, len(ordered) // 4 + 1)]
    return sum(kept) / len(kept)


def work(forms: Forms, job: dict[str, Any]) -> dict[str, Any]:
    """One kind of step in each of the forms, in the order asked."""
    found = {}
    for form in job["forms"]:
        forms.use(form)
        if job["kind"] == "decode":
            found[form] = decode_ms(forms.engine, job["prompts"], job["max_tokens"])
        else:
            found[form] = prefill_ms(forms.engine, job["prompts"])
    return {"ms": found}


def meanwhile(forms: Forms, job: dict[str, Any]) -> dict[str, Any]:
    """Eager steps of one request, window by window, for some seconds; what the child got of a core.

    While it is to compile it ends when the child does, and leaves that window out.
    """
    forms.use("eager")
    rng, windows = random.Random("meanwhile"), []
    before_s, started_s = children_cpu_s(), time.monotonic()
    until_s = time.monotonic() + job["seconds"]
    while time.monotonic() < until_s:
        prompt = rng.choices(job["tokens"], k=32)
        windows.append(decode_ms(forms.engine, [prompt], WINDOW_STEPS))
        if job["is_compiling"] and forms.graph.state.name != "COMPILING":
            windows.pop()
            break
    passed_s = time.monotonic() - started_s
    return {"ms": windows, "child_cores": (children_cpu_s() - before_s) / passed_s}


def children_cpu_s() -> float:
    """Processor time of this process's live children (proc(5): stat, fields 14 and 15)."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text("ascii").split():
            stat = Path("/proc", child, "stat").read_text("ascii").rpartition(")")[2].split()
            total += int(stat[11]) + int(stat[12])
    return total / os.sysconf("SC_CLK_TCK")


def answers(forms: Forms, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy completions of each prompt alone in each of the forms, and together in the first."""
    asked = {"max_tokens": job["max_tokens"], "logprobs": job["logprobs"]}
    found = {}
    for form in job["forms"]:
        forms.use(form)
        alone = [forms.engine.run([prompt], **asked)[0] for prompt in job["prompts"]]
        found[form] = [completion_of(str(i), a.outputs[0]).to_dict() for i, a in enumerate(alone)]
    forms.use(job["forms"][0])
    together = forms.engine.run(job["prompts"], **asked)
    found["together"] = [
        completion_of(str(i), a.outputs[0]).to_dict() for i, a in enumerate(together)
    ]
    return found


JOBS: dict[str, Callable[[Forms, dict[str, Any]], dict[str, Any]]] = {
    "wait": lambda forms, _: forms.wait(),
    "compile": lambda forms, job: forms.compile_for(job["num_tokens"]),
    "work": work,
    "meanwhile": meanwhile,
    "outputs": answers,
}


def main() -> None:
    """Answer jobs until standard input ends."""
    replies = take_stdout()
    forms: Forms | None = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["do"] == "start":
            forms = Forms(job)
            reply(replies, forms.facts)
        else:
            assert forms is not None
            reply(replies, JOBS[job["do"]](forms, job))


if __name__ == "__main__":
    main()
