"""Run the two sides as child processes that answer one job at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from xllm_plugin.bench import outputs, schema
from xllm_plugin.bench.json_process import JsonProcess
from xllm_plugin.bench.peers import COMMON_ENVIRONMENT, peer_servers
from xllm_plugin.bench.traces import Vocabulary
from xllm_plugin.errors import InternalError
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


class Child(JsonProcess):
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
        driver = Path(__file__).resolve().with_name("driver.py")
        command = command or (sys.executable, str(driver))
        super().__init__(f"the engine of {name}", command, additions, log_path, grace_s=GRACE_S)
        self.name = name

    def ask(self, job: Mapping[str, Any], *, timeout_s: float = JOB_TIMEOUT_S) -> dict[str, Any]:
        """Have one job done.  Raises `NotNowError` when the child dies or takes too long."""
        self.send(job)
        return self.receive(timeout_s, to=str(job["do"]))


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
