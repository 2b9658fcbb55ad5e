"""Does the NPU family answer as the CPU family does?  See README.md beside this file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import click
import httpx
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude, log_folder
from xllm_plugin.bench.options import (
    case_option,
    chosen_cases,
    command_line,
    common_options,
    keep_logs_option,
)
from xllm_plugin.bench.peers import xllm_server
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.models import prepare
from xllm_plugin.npu.accelerator import FAMILY
from xllm_plugin.npu.acl import Acl
from xllm_plugin.testing.cann import find_emulator
from xllm_plugin.testing.collect import Prompt, Settings, collect_in_child, read_prompts
from xllm_plugin.testing.dialogues import read_metric
from xllm_plugin.testing.equality import Completion, Report, Spread, check_near_ties, measure
from xllm_plugin.testing.float32 import InFloat32, answers_in_float32, without_expert_ties

FOLDER = Path(__file__).resolve().parent
PROMPTS = FOLDER.parent / "equality" / "data" / "prompts.jsonl"
NAME = "npu_agreement"
QUESTION = "Does the NPU family answer as the CPU family does, but for rounding?"

NUM_PROMPTS, MAX_TOKENS, MAX_NUM_SEQS = 8, 16, 4
STEP_TOKENS = 64
"""Fewer than most prompts have, so that they are computed in chunks beside decodes."""
WHOLE_PROMPTS = 1024
"""vLLM's CPU platform has no chunks with latent attention."""

NUM_CANDIDATES = 5
PATIENCE_S = 3000.0
"""The emulator is slow, and the machine may be somebody else's for a while."""

NOTES = (
    (
        "'positions': over the text that a run shares with transformers in float32, up to and "
        "including a sequence's first other token; 'agree': those with the same token; 'margin': "
        "how much likelier float32 held its own token, in nats; 'change': of log-probs. 'with the "
        "CPU': the same against the CPU family in bfloat16."
    ),
    (
        "'eager': `xllm serve` with XLLM_GRAPH__MODE=off. 'graphs': a server whose steps of "
        "one-token requests run as captured graphs. 'cached': the same server asked again, with "
        "prompts that its prefix cache knows. In all, prompts are computed in chunks."
    ),
    (
        "Judged as near-ties (`xllm_plugin/testing/equality.py`) of float32, with 'CPU, bfloat16' "
        "as the yardstick: a token may differ where bfloat16 moved the gap of two candidates by as "
        "much on the CPU, not more often than there, and log-probs drift at most three times as "
        "far."
    ),
    (
        "'expert ties': sequences that part where a router's logits of the last expert chosen and "
        "the first one not chosen are less than two steps of bfloat16 apart. They are cut before "
        "that place: with another expert the log-probs are others."
    ),
)
NOT_SHOWN = (
    "A device, if it is emulated: rounding, order and speed are then the emulator's.",
    "That text makes sense: the tiny models' weights are random.",
)


@dataclass(frozen=True, slots=True)
class Case:
    """One model."""

    name: str
    kind: str
    chunks_on_cpu: bool = True
    quick: bool = True

    def settings(self) -> Settings:
        """Of an engine of the NPU family."""
        return Settings(
            model=str(prepare(self.name)),
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=1024,
            max_tokens=MAX_TOKENS,
            logprobs=NUM_CANDIDATES,
            limit=NUM_PROMPTS,
        )

    def settings_on_cpu(self) -> Settings:
        """The same, as far as vLLM's CPU platform goes."""
        step = STEP_TOKENS if self.chunks_on_cpu else WHOLE_PROMPTS
        return replace(self.settings(), max_num_batched_tokens=step)


CASES = (
    Case("tiny-llama", "dense"),
    Case("tiny-qwen3-moe", "MoE"),
    Case("tiny-deepseek-v3", "MLA, MoE", chunks_on_cpu=False),
    Case("smollm2", "dense", quick=False),
)

Answers = Sequence[Completion]


class Sides(Protocol):
    """Who is asked; each method gives one completion a prompt."""

    def in_float32(self, case: Case) -> InFloat32:
        """Transformers on the host."""

    def on_cpu(self, case: Case) -> Answers:
        """The CPU family."""

    def served(self, case: Case, *, graphs: bool) -> tuple[Answers, Answers]:
        """A server of the NPU family, with graphs or without, asked twice."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one model.

    Attributes:
        case: the model.
        run: which.
        spread: from float32.
        num_expert_ties: sequences that part from float32 where experts tie; not in `spread`.
        against_cpu: from the CPU family; None for the CPU family itself.
        report: the judgement; None for the yardstick, which nobody judges.
    """

    case: Case
    run: str
    spread: Spread
    num_expert_ties: int
    against_cpu: Spread | None = None
    report: Report | None = None


def run_case(case: Case, sides: Sides) -> list[Outcome]:
    """Ask all sides in turn, and judge those of the NPU family."""
    truth, cpu = sides.in_float32(case), sides.on_cpu(case)
    runs: dict[str, Answers] = {}
    for name, graphs in (("eager", False), ("graphs", True)):
        first, again = sides.served(case, graphs=graphs)
        runs |= {name: first, f"{name}, cached": again}
    expected, found, num_ties = without_expert_ties(truth, cpu)
    noise = measure(expected, found)
    outcomes = [Outcome(case, "CPU, bfloat16", noise, num_ties)]
    for run, answers in runs.items():
        expected, found, num_ties = without_expert_ties(truth, answers)
        report = check_near_ties(expected, found, noise)
        against_cpu = measure(cpu, answers)
        outcomes.append(Outcome(case, run, report.spread, num_ties, against_cpu, report))
    return outcomes


class RealSides:
    """Models, engines and servers, one at a time.

    Args:
        device: variables of a process that sees the device.
        folder: gets the servers' logs.
    """

    def __init__(self, device: Mapping[str, str], folder: Path) -> None:
        self._device = {**device, "XLLM_DEVICE": "npu"}
        self._folder = folder

    def in_float32(self, case: Case) -> InFloat32:
        """See `Sides`."""
        return answers_in_float32(
            prepare(case.name),
            PROMPTS,
            limit=NUM_PROMPTS,
            max_tokens=MAX_TOKENS,
            num_candidates=NUM_CANDIDATES,
        )

    def on_cpu(self, case: Case) -> Answers:
        """See `Sides`."""
        return self._collect(case.settings_on_cpu(), {"XLLM_DEVICE": "cpu"})

    def served(self, case: Case, *, graphs: bool) -> tuple[Answers, Answers]:
        """See `Sides`; also sees that prefixes were cached, and graphs captured where asked for.

        Raises:
            AssertionError: they were not, or graphs were where none was asked for.
        """
        mode = "auto" if graphs else "off"
        log = self._folder / f"{case.name}-{mode}.log"
        with serving(case, log, {**self._device, "XLLM_GRAPH__MODE": mode}) as url:
            first, again = (ask_server(url, case.name) for _ in range(2))
            num_hits = read_metric(url, "vllm:prefix_cache_hits_total")
        assert num_hits > 0, "no prompt had a cached prefix"
        assert ("run as one graph" in log.read_text()) is graphs, f"graphs were asked for: {graphs}"
        return first, again

    def _collect(self, settings: Settings, environment: Mapping[str, str]) -> Answers:
        found = collect_in_child(
            settings, PROMPTS, platform="xllm", environment=environment, timeout_s=PATIENCE_S
        )
        assert f".{environment['XLLM_DEVICE']}." in found.platform
        return found.completions


def device_environment() -> dict[str, str]:
    """What a process needs to see a device: nothing where there is one, else the emulator.

    Raises:
        EmulatorUnavailableError: there is neither.
    """
    if FAMILY.probe().usable:
        return {}
    inherited = {
        name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONPATH") if name in os.environ
    }
    return find_emulator().environment(inherited)


def is_emulated(device: Mapping[str, str]) -> bool:
    """Whether `device_environment` found the emulator, in the caller's environment or itself."""
    return bool(device) or hasattr(Acl().library, "emulator_hold")


@contextmanager
def serving(case: Case, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The URL of a server that captures graphs as soon as it may."""
    settings = case.settings()
    flags = {
        "served-model-name": case.name,
        "max-model-len": settings.max_model_len,
        "max-num-seqs": settings.max_num_seqs,
        "max-num-batched-tokens": settings.max_num_batched_tokens,
        "kv-cache-memory-bytes": 2**27,
    }
    peer = xllm_server(
        settings.model,
        case.name,
        "a server of the NPU family",
        flags=[word for name, value in flags.items() for word in (f"--{name}", str(value))],
        environment={
            "XLLM_GRAPH__MIN_USES": "1",
            "XLLM_GRAPH__REPLAN_STEPS": "2",
            **environment,
        },
    )
    with peer.server(log, ready_timeout_s=PATIENCE_S, grace_s=60.0) as server:
        yield server.url


def ask_server(url: str, model: str) -> Answers:
    """All prompts, as many at once as the server runs."""
    with (
        httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_S) as client,
        ThreadPoolExecutor(MAX_NUM_SEQS) as pool,
    ):

        def ask(prompt: Prompt) -> Completion:
            request = {
                "model": model,
                "messages": prompt.messages(),
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": NUM_CANDIDATES,
                "return_tokens_as_token_ids": True,
            }
            reply = client.post("/v1/chat/completions", json=request).raise_for_status()
            return completion_of_chat(prompt.prompt_id, reply.json()["choices"][0])

        return tuple(pool.map(ask, read_prompts(PROMPTS)[:NUM_PROMPTS]))


def completion_of_chat(prompt_id: str, choice: Mapping[str, Any]) -> Completion:
    """A chat's choice with log-probs and tokens written as ids."""

    def number(entry: Mapping[str, Any]) -> int:
        return int(entry["token"].removeprefix("token_id:"))

    at = choice["logprobs"]["content"]
    return Completion(
        prompt_id=prompt_id,
        token_ids=tuple(map(number, at)),
        logprobs=tuple(entry["logprob"] for entry in at),
        candidates=tuple(
            {number(one): one["logprob"] for one in (*entry["top_logprobs"], entry)} for entry in at
        ),
    )


def row(outcome: Outcome) -> Row:
    """One line of the table."""
    spread = outcome.spread
    verdict = "(yardstick)" if outcome.report is None else str(outcome.report.verdict)
    labels = {
        "model": outcome.case.name,
        "kind": outcome.case.kind,
        "run": outcome.run,
        "verdict": verdict,
    }
    figures = [
        Figure.of("positions", "", [spread.num_tokens]),
        Figure.of("agree", "", [spread.num_tokens - spread.num_differing]),
        Figure.of("expert ties", "", [outcome.num_expert_ties]),
        Figure.of("largest margin", "nats", [spread.max_margin]),
        Figure.of("mean change", "nats", [spread.mean_abs_logprob_difference]),
        Figure.of("max change", "nats", [spread.max_abs_logprob_difference]),
    ]
    if (cpu := outcome.against_cpu) is not None:
        figures += [
            Figure.of("positions with the CPU", "", [cpu.num_tokens]),
            Figure.of("agree with the CPU", "", [cpu.num_tokens - cpu.num_differing]),
            Figure.of("mean change to the CPU", "nats", [cpu.mean_abs_logprob_difference]),
            Figure.of("max change to the CPU", "nats", [cpu.max_abs_logprob_difference]),
        ]
    return Row(labels=labels, figures=tuple(figures))


def check(outcome: Outcome, report: Report) -> Check:
    """Whether a run came out as it has to."""
    return Check(
        name=f"{outcome.case.name}, {outcome.run}",
        passed=report.equal,
        detail="; ".join((*report.problems, *map(str, report.differences))) or str(report.verdict),
    )


PEERS = (
    Peer(
        name="CPU, bfloat16",
        what="the CPU family, one offline engine in one process, without native layers",
        command=("python", "-m", "xllm_plugin.testing.collect"),
        environment={"XLLM_DEVICE": "cpu"},
    ),
    Peer(
        name="eager",
        what="a server of the NPU family without graphs, over HTTP",
        command=("xllm", "serve"),
        environment={"XLLM_DEVICE": "npu", "XLLM_GRAPH__MODE": "off"},
    ),
    Peer(
        name="graphs",
        what="the same with graphs, each captured at its first use",
        command=("xllm", "serve"),
        environment={"XLLM_DEVICE": "npu", "XLLM_GRAPH__MIN_USES": "1"},
    ),
)


@click.command(NAME)
@common_options(NAME, quick="Tiny models alone.")
@case_option(CASES)
@keep_logs_option
def command(
    *, quick: bool, json_path: Path, names: tuple[str, ...], keep_logs: Path | None
) -> None:
    """Compare the NPU family's tokens and log-probs with the CPU family's, model by model."""
    chosen = chosen_cases(CASES, names, quick=quick)
    device = device_environment()
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    with log_folder(keep_logs) as logs:
        sides = RealSides(device, logs)
        outcomes = [outcome for case in chosen for outcome in run_case(case, sides)]
    result = run.finish(
        peers=PEERS,
        rows=[row(outcome) for outcome in outcomes],
        checks=[check(one, one.report) for one in outcomes if one.report is not None],
        notes=(f"Device: {'emulated' if is_emulated(device) else 'real'}.", *NOTES),
        not_shown=NOT_SHOWN,
    )
    conclude(result, json_path, Console())
