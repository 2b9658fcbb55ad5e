"""What does planning a step cost, and does it stay within 1 ms?  See README.md beside this file."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.scheduler.plan import Limits, Running, View, Waiting, make_plan
from xllm_plugin.scheduler.predictor import DeviceSpeed, ModelShape, StepModel, Work
from xllm_plugin.scheduler.waiting_queue import WaitingQueue

NAME = "plan_cost"
QUESTION = "What does planning a step cost, and does it stay within 1 ms?"
AT_MOST_MS: Final = 1.0
SIZES: Final = ((0, 8), (100, 64), (1000, 256))
REPEATS, REPEATS_QUICK = 201, 11

# SmolLM2-135M on two cores.
WORK: Final = Work.of(
    ModelShape(
        weight_bytes=270e6, flops_per_token=270e6, kv_bytes_per_token=23040, flops_per_pair=69120
    ),
    DeviceSpeed(bytes_per_s=20e9, flops_per_s=3e11),
)
MODEL: Final = StepModel(work=WORK, error=0.05, num_samples=100)
ONLINE_SHARE: Final = 0.8
LIMITS: Final = Limits(max_sequences=512, max_tokens=2048, max_step_ms=250)


def view(kind: str, num_waiting: int, num_running: int, seed: int) -> View:
    """Requests of one kind; `mixed` has all of them, four in five online."""
    rng = random.Random(f"{kind} {num_waiting} {seed}")
    due_s = {"late": (-5, -1), "in time": (30, 60), "mixed": (-5, 5), "offline": (0, 1)}[kind]

    def is_online() -> bool:
        return kind != "offline" and (kind != "mixed" or rng.random() < ONLINE_SHARE)

    waiting = [
        Waiting(
            f"w{i}",
            is_online(),
            rng.uniform(*due_s),
            50.0,
            rng.uniform(-10, 0),
            rng.choice([0, 0, 1]),
            rng.randint(1, 2000),
        )
        for i in range(num_waiting)
    ]
    running = []
    for i in range(num_running):
        is_prompt = i % 32 == 0
        todo = 500 if is_prompt else 1
        computed = rng.randint(1, 1000)
        due = rng.uniform(0, 2 if is_prompt else 0.5)
        running.append(Running(f"r{i}", is_online(), due, 50.0, 0.0, 0, computed, todo, is_prompt))
    return View(
        now_s=0.0,
        running=running,
        waiting=WaitingQueue(waiting),
        free_blocks=10**6,
        total_blocks=10**6,
        block_tokens=16,
    )


def measure(kind: str, size: tuple[int, int], repeats: int) -> list[float]:
    """Milliseconds of one plan, each over other requests; a first one warms up.

    Since the plan before it a request has left the queue and another one has come.
    """
    spent_ms = []
    for seed in range(-1, repeats):
        seen = view(kind, *size, seed)
        gone = next(iter(seen.waiting), None)
        began = time.perf_counter()
        if gone is not None:
            seen.waiting.remove(gone.request_id)
            seen.waiting.add(gone)
        make_plan(seen, MODEL, LIMITS)
        if seed >= 0:
            spent_ms.append((time.perf_counter() - began) * 1e3)
    return spent_ms


@click.command(NAME)
@common_options(NAME)
def command(*, quick: bool, json_path: Path) -> None:
    """Time plans over queues of several kinds and sizes."""
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    repeats = REPEATS_QUICK if quick else REPEATS
    rows, checks = [], []
    for size in SIZES:
        for kind in ("in time", "late", "mixed", "offline"):
            figure = Figure.of("a plan", "ms", measure(kind, size, repeats))
            num_waiting, num_running = size
            labels = {"requests": kind, "waiting": str(num_waiting), "running": str(num_running)}
            rows.append(Row(labels=labels, figures=(figure,)))
            checks.append(
                Check(
                    name=f"{kind}, {num_waiting} waiting, {num_running} running: "
                    f"at most {AT_MOST_MS:g} ms",
                    passed=figure.median <= AT_MOST_MS,
                    detail=f"median {figure.median:.2f} ms",
                )
            )
    result = run.finish(
        rows=rows,
        checks=checks[-4:],
        notes=("Every repeat plans for other requests. The check is of the largest size.",),
        not_shown=("Reading the requests out of vLLM's scheduler, and putting the plan in force.",),
    )
    conclude(result, json_path, Console())
