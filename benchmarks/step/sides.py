"""Run the two sides as child processes that answer one job at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.peers import COMMON_ENVIRONMENT, peer_servers
from xllm_plugin.bench.servers import clean_environment, tail
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import InternalError, NotNowError
from xllm_plugin.testing.equality import Completion

__all__ = [
    "SIDES",
    "Child",
    "Side",
    "compare_outputs",
    "completions",
    "environment",
    "outputs_job",
    "peer",
    "require_fair",
    "start_job",
]

Side = Literal["stock-best", "xllm"]
SIDES: Final[tuple[Side, ...]] = ("stock-best", "xllm")

START_TIMEOUT_S = 600.0  # a first start compiles
JOB_TIMEOUT_S = 300.0
GRACE_S = 20.0
_WHAT: Final[Mapping[Side, str]] = {
    "stock-best": "stock vLLM computing on all cores, one offline engine in one process",
    "xllm": "the same engine with this plugin, no tuning",
}


def environment(side: Side) -> dict[str, str]:
    """What a side's process has beyond this one's cleaned environment."""
    if side == "stock-best":
        return dict(peer_servers("-", port=0, names=(side,))[0].environment)
    return {"XLLM_PLATFORM": "xllm", **COMMON_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def peer(side: Side) -> schema.Peer:
    """One side as a result tells it."""
    return schema.Peer(
        name=side,
        what=_WHAT[side],
        command=("python", "benchmarks/step/driver.py"),
        environment=environment(side),
    )


class Child:
    """A `driver.py` process for the length of a `with` block.

    Args:
        name: shown in messages.
        additions: to the cleaned environment.
        log_path: gets what the engine prints.
        command: for tests; by default this interpreter running `driver.py`.
    """

    def __init__(
        self,
        name: str,
        additions: Mapping[str, str],
        log_path: Path,
        *,
        command: Sequence[str] | None = None,
    ) -> None:
        self.name = name
        self.log_path = log_path
        driver = Path(__file__).resolve().with_name("driver.py")
        self._command = tuple(command or (sys.executable, str(driver)))
        self._environment = clean_environment(additions)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which ends the child
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the end of its jobs
        try:
            if error is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a compiler's processes too
            process.wait()
            process.stdout.close()

    def ask(self, job: Mapping[str, Any], *, timeout_s: float = JOB_TIMEOUT_S) -> dict[str, Any]:
        """Have one job done.  Raises `NotNowError` when the child dies or takes too long."""
        process = self._process
        assert process is not None, "use the child in a `with` block"
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error
        if not select.select([process.stdout], [], [], timeout_s)[0]:
            raise NotNowError(
                f"{self.name} did not finish {job['do']!r} within {timeout_s:g} s; end of its log:"
                f"\n{tail(self.log_path)}"
            )
        line = process.stdout.readline()
        if not line:
            raise self._died()
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _died(self) -> NotNowError:
        return NotNowError(
            f"the engine of {self.name} ended; end of its log:\n{tail(self.log_path)}"
        )


def start_job(
    model: Path,
    vocabulary: Vocabulary,
    *,
    batches: Sequence[int],
    prefills: Sequence[int] = (),
    max_model_len: int,
    max_tokens: int,
) -> dict[str, Any]:
    """The engine's settings, and the shapes to touch before any is timed.

    Args:
        model: its folder.
        vocabulary: what prompts are made of.
        batches: how many requests decode together.
        prefills: tokens of prompts.
        max_model_len: tokens of a request, at most.
        max_tokens: tokens of a step, at most.
    """
    return {
        "do": "start",
        "model": str(model),
        "max_model_len": max_model_len,
        "max_batch": max([*batches, outputs.NUM_OUTPUT_PROMPTS]),
        "max_tokens": max_tokens,
        "tokens": vocabulary.ordinary(),
        "batches": list(batches),
        "prefills": list(prefills),
    }


def outputs_job(vocabulary: Vocabulary) -> dict[str, Any]:
    """Prompts whose greedy outputs are compared."""
    return {
        "do": "outputs",
        "prompts": [request.prompt for request in outputs.prompts(vocabulary, seed=0)],
        "max_tokens": outputs.OUTPUT_TOKENS,
        "logprobs": outputs.NUM_CANDIDATES,
    }


def completions(answers: Sequence[Mapping[str, Any]]) -> tuple[Completion, ...]:
    """What an engine answers to an `outputs_job`, out of JSON."""
    return tuple(Completion.from_dict(answer) for answer in answers)


def compare_outputs(reference: Child, other: Child, vocabulary: Vocabulary) -> schema.Check:
    """Both engines' greedy outputs, prompt by prompt, before any time counts."""
    job = outputs_job(vocabulary)
    expected, found = reference.ask(job), other.ask(job)
    alone = completions(expected["alone"])
    noise = outputs.self_noise(alone, completions(expected["together"]))
    return outputs.compare(other.name, reference.name, alone, completions(found["alone"]), noise)


def require_fair(found: Mapping[Side, Mapping[str, Any]]) -> None:
    """Raise `InternalError` unless each side is what it should be."""
    for side, facts in found.items():
        wanted = "xllm" if side == "xllm" else "native"
        if facts["platform"] != wanted:
            raise InternalError(
                f"asked for platform {wanted!r}, but {facts['platform']!r} answered for {side}; "
                "please report this"
            )
