"""Is the output with the plugin equal to stock vLLM's?  See README.md beside this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude
from xllm_plugin.bench.options import case_option, chosen_cases, command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Peer, Row
from xllm_plugin.models import prepare
from xllm_plugin.testing.collect import Collection, Settings, collect_in_child
from xllm_plugin.testing.equality import (
    Completion,
    Report,
    Verdict,
    check_bit_equal,
    check_near_ties,
    check_token_equal,
    measure,
)

FOLDER = Path(__file__).resolve().parent
NAME = "equality"
QUESTION = "Is the output with the plugin equal to stock vLLM's?"

WIDE_BATCH = 64
NARROW_BATCH = 1
"""Sequences a batch of the main runs, and of the yardstick.  Of 16, 4 and 1, one alone makes stock
differ most from itself (it runs matrix-vector kernels), so that the near-tie rules have work."""

# vLLM 0.32's C++ rotary operator on CPU turns 3-D queries, which MLA has, wrongly.  Stock needs to
# be told; the plugin keeps MLA models off it by itself.
WITHOUT_ROTARY_OPERATOR = ("all", "-rotary_embedding")

NOTES = (
    (
        "bit-equal: same tokens, and every log-prob (of the token and of five candidates) the "
        "same to the last bit. token-equal: same tokens. near-ties: tokens differ only where "
        "stock's own rounding decides, as rarely as stock from itself. Rules and thresholds: "
        "`xllm_plugin/testing/equality.py`."
    ),
    (
        "'same batches': both sides at 64 sequences a batch (or at 1, 'narrow'); must be "
        "bit-equal. 'other batches': xllm at 1 against stock at 64; must be token-equal in "
        "float32, near-ties in bf16. 'stock itself': stock at 1 against stock at 64, the "
        "yardstick of the near-ties, which nobody judges. While 'narrow' is bit-equal, 'other "
        "batches' repeats the yardstick by construction."
    ),
    (
        "'native layers': xllm with its own kernels at 64 sequences a batch against stock at 64, "
        "both eager; must be near-ties. Where the processor has no AVX512-BF16 they are not used, "
        "and the row shows vLLM's own compilation. All other rows are without them."
    ),
    "A sequence counts up to and including its first differing token: then the texts differ.",
)
NOT_SHOWN = (
    (
        "Requests that arrive while others run, preemption, several engines: batches are then "
        "not the same from run to run."
    ),
    "Sampling: everything is greedy.",
    (
        "Other machines: which products round differently depends on the processor and the "
        "number of threads."
    ),
)


Side = Literal["stock", "xllm"]


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one form."""

    name: str
    model: str
    kind: str
    prompts: str = "prompts.jsonl"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eager: bool = True
    stock_custom_ops: tuple[str, ...] = ()
    other_batches: bool = True
    native_layers: bool = False
    quick: bool = False

    def settings(self, side: Side, *, max_num_seqs: int, num_prompts: int | None) -> Settings:
        """The engine's settings on one side."""
        return Settings(
            model=str(prepare(self.model)),
            max_num_seqs=max_num_seqs,
            dtype=self.dtype,
            eager=self.eager and not (side == "xllm" and self.native_layers),
            custom_ops=self.stock_custom_ops if side == "stock" else (),
            limit=num_prompts,
        )


CASES = (
    Case("smollm2", "smollm2", "dense", quick=True),
    Case("smollm2, native layers", "smollm2", "dense", native_layers=True, quick=True),
    Case("smollm2, float32", "smollm2", "dense", dtype="float32"),
    Case("smollm2, compiled", "smollm2", "dense", eager=False, other_batches=False),
    Case("tiny-qwen3-moe", "tiny-qwen3-moe", "MoE", quick=True),
    Case(
        "tiny-deepseek-v2",
        "tiny-deepseek-v2",
        "MLA, MoE",
        stock_custom_ops=WITHOUT_ROTARY_OPERATOR,
    ),
    Case(
        "tiny-deepseek-v3",
        "tiny-deepseek-v3",
        "MLA, MoE",
        stock_custom_ops=WITHOUT_ROTARY_OPERATOR,
    ),
    Case("tiny-llava", "tiny-llava", "image", prompts="images.jsonl"),
    Case("tiny-qwen2.5-vl", "tiny-qwen2.5-vl", "image", prompts="images.jsonl"),
)

QUICK_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """One comparison of one case.  `report` is None for the yardstick, which nobody judges."""

    case: Case
    comparison: str
    report: Report
    judged: bool = True


@click.command(NAME)
@common_options(NAME, quick=f"Two models, {QUICK_PROMPTS} prompts: some minutes.")
@case_option(CASES)
def command(*, quick: bool, json_path: Path, names: tuple[str, ...]) -> None:
    """Compare xllm's tokens and log-probs with stock vLLM's, model by model."""
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    outcomes: list[Outcome] = []
    for case in chosen_cases(CASES, names, quick=quick):
        found = run_case(case, asking(case, QUICK_PROMPTS if quick else None))
        for outcome in found:
            say(described(outcome))
        outcomes += found
    result = run.finish(
        peers=PEERS,
        rows=[row(outcome) for outcome in outcomes],
        checks=[check(outcome) for outcome in outcomes if outcome.judged],
        notes=NOTES,
        not_shown=NOT_SHOWN,
        details={
            f"{outcome.case.name}: {outcome.comparison}": outcome.report.to_dict()
            for outcome in outcomes
        },
    )
    conclude(result, json_path, Console())


PEERS = (
    Peer(
        name="stock",
        what="stock vLLM, one offline engine in one process",
        command=("python", "-m", "xllm_plugin.testing.collect"),
        environment={"XLLM_PLATFORM": "native", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ),
    Peer(
        name="xllm",
        what="the same command with the plugin",
        command=("python", "-m", "xllm_plugin.testing.collect"),
        environment={"XLLM_PLATFORM": "xllm", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ),
)


Ask = Callable[[Side, int], Sequence[Completion]]
"""Completions of one side at so many sequences a batch."""


def say(line: str) -> None:
    """Progress goes to stderr, so that stdout holds the result alone."""
    click.echo(line, err=True)


def asking(case: Case, num_prompts: int | None) -> Ask:
    """Ask real engines, one child process each."""

    def ask(side: Side, max_num_seqs: int) -> Sequence[Completion]:
        found = collect_in_child(
            case.settings(side, max_num_seqs=max_num_seqs, num_prompts=num_prompts),
            FOLDER / "data" / case.prompts,
            platform="native" if side == "stock" else "xllm",
            environment={"XLLM_GRAPH__MODE": "auto" if case.native_layers else "off"},
        )
        say(progress(case, found))
        return found.completions

    return ask


def run_case(case: Case, ask: Ask) -> list[Outcome]:
    """Ask both sides in turn and judge them."""
    stock, xllm = ask("stock", WIDE_BATCH), ask("xllm", WIDE_BATCH)
    if case.native_layers:
        stock_narrow = ask("stock", NARROW_BATCH)
        judged = check_near_ties(stock, xllm, measure(stock, stock_narrow))
        return [
            Outcome(case, "native layers", judged),
            Outcome(case, "stock itself", check_token_equal(stock, stock_narrow), judged=False),
        ]
    outcomes = [Outcome(case, "same batches", check_bit_equal(stock, xllm))]
    if case.other_batches:
        stock_narrow, xllm_narrow = ask("stock", NARROW_BATCH), ask("xllm", NARROW_BATCH)
        outcomes += other_batches(case, stock, stock_narrow, xllm_narrow)
    return outcomes


def other_batches(
    case: Case,
    stock: Sequence[Completion],
    stock_narrow: Sequence[Completion],
    xllm_narrow: Sequence[Completion],
) -> list[Outcome]:
    """Judge xllm at the narrow batch against stock at the wide one."""
    noise = measure(stock, stock_narrow)
    if case.dtype == "float32":
        judged = check_token_equal(stock, xllm_narrow)
    else:
        judged = check_near_ties(stock, xllm_narrow, noise)
    return [
        Outcome(case, "same batches, narrow", check_bit_equal(stock_narrow, xllm_narrow)),
        Outcome(case, "other batches", judged),
        Outcome(case, "stock itself", check_token_equal(stock, stock_narrow), judged=False),
    ]


def progress(case: Case, found: Collection) -> str:
    """One line for a finished engine."""
    return (
        f"{case.name}: {found.platform} at {found.settings.max_num_seqs} sequences a batch, "
        f"{found.num_threads} threads; start {found.start_s} s, answers {found.generate_s} s"
    )


def described(outcome: Outcome) -> str:
    """What came out, for the terminal."""
    head = f"{outcome.case.name}, {outcome.comparison}"
    if outcome.judged:
        return f"{head}: {outcome.report.summary()}"
    spread = outcome.report.spread
    return f"{head}: {spread.num_differing} of {spread.num_prompts} sequences differ"


def row(outcome: Outcome) -> Row:
    """One line of the table."""
    spread = outcome.report.spread
    verdict = str(outcome.report.verdict) if outcome.judged else "(yardstick)"
    unexplained = outcome.report.num_unexplained if outcome.judged else 0
    return Row(
        labels={
            "model": outcome.case.name,
            "kind": outcome.case.kind,
            "comparison": outcome.comparison,
            "verdict": verdict,
        },
        figures=(
            count("prompts", spread.num_prompts),
            count("tokens", spread.num_tokens),
            count("differing", spread.num_differing),
            count("unexplained", unexplained),
            Figure.of("largest margin", "nats", [spread.max_margin]),
            Figure.of("max log-prob change", "nats", [spread.max_abs_logprob_difference]),
        ),
    )


def count(name: str, value: int) -> Figure:
    """A number of things."""
    return Figure.of(name, "", [value])


def check(outcome: Outcome) -> Check:
    """Whether the comparison came out as it has to."""
    report = outcome.report
    passed = report.verdict is not Verdict.DIFFERENT
    return Check(
        name=f"{outcome.case.name}, {outcome.comparison}",
        passed=passed,
        detail=str(report.verdict) if passed else "; ".join(report.problems),
    )
