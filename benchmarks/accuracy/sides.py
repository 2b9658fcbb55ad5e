"""Run one side, native or xllm, of one path: the command lines and environments differ by one word.

Two ways a user of lm-eval reaches vLLM are compared:

* *offline*: lm-eval's `vllm` model, an engine in lm-eval's own process.  All prompts of a batch are
  added before the first step, so every run forms the same batches.
* *server*: lm-eval's `local-completions` model against an API server.  One prompt a request and one
  request at a time: every step holds one sequence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import httpx

from xllm_plugin.bench import schema
from xllm_plugin.bench.provenance import home_relative
from xllm_plugin.bench.servers import Server, clean_environment, find_free_port, tail
from xllm_plugin.errors import InternalError, ModelError

__all__ = ["PASSES", "PATHS", "PLATFORMS", "Passes", "Plan", "Platform", "Way", "peer", "run"]

Way = Literal["offline", "server"]
Platform = Literal["native", "xllm"]
PATHS: Final[tuple[Way, ...]] = ("offline", "server")
PLATFORMS: Final[tuple[Platform, ...]] = ("native", "xllm")

PASSES: Final[dict[Way, dict[str, int]]] = {
    "offline": {"main": 8, "repeat": 8, "other": 1},
    "server": {"main": 1, "repeat": 1, "other": 8},
}
"""Prompts a batch (offline) or a request (server).  `main` is compared; stock also runs `repeat`,
the same again, and `other`, which shows how far it is from itself when batches differ."""

MAX_MODEL_LEN = 2048
KV_CACHE_BYTES = 2**29
SERVED_NAME = "evaluated"
PROGRESS = "@progress "

Passes = dict[str, dict[str, Any]]
"""What a side found: pass -> task -> {"scores", "items"}, see `driver.py`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What both sides are asked."""

    model: Path
    limits: Mapping[str, int]  # items per task
    dtype: str
    eager: bool
    folder: Path  # for jobs, logs and answers

    is_yardstick: bool = False

    def passes(self, path: Way, platform: Platform) -> dict[str, int]:
        """Batch size of every pass of one side."""
        every = PASSES[path]
        is_whole = platform == "native" and not self.is_yardstick
        return every if is_whole else {"main": every["main"]}

    def other_form(self) -> Plan:
        """Compiled for eager and eager for compiled, to see how far stock is from itself."""
        return replace(self, eager=not self.eager, is_yardstick=True)

    def title(self, path: Way, platform: Platform) -> str:
        """What this side's files are called."""
        return "-".join((path, platform, *(("other-form",) if self.is_yardstick else ())))


def run(plan: Plan, path: Way, platform: Platform, on_step: Callable[[str], None]) -> Passes:
    """Run one side from start to end; nothing of it is left running.

    Args:
        plan: what to ask.
        path: how lm-eval reaches the engine.
        platform: which side.
        on_step: called with "pass, task" before each.

    Raises:
        ModelError: lm-eval failed; the message ends with its last words.
        NotNowError: the server did not start.
        InternalError: the other platform answered.
    """
    if path == "offline":
        return _evaluate(plan, path, platform, _offline_arguments(plan), on_step)
    port = find_free_port()
    server = Server(
        f"{platform} server",
        _serve_command(plan, port),
        port=port,
        log_path=plan.folder / f"{plan.title(path, platform)}.server.log",
        environment=clean_environment(_environment(path, platform)),
    )
    with server:
        _require_platform(platform, server.url)
        return _evaluate(plan, path, platform, _server_arguments(plan, server.url), on_step)


def peer(plan: Plan, path: Way, platform: Platform) -> schema.Peer:
    """One side as a result tells it."""
    what = {"native": "vLLM without the plugin", "xllm": "vLLM with the plugin"}[platform]
    how = {
        "offline": "lm-eval's `vllm` model with the arguments shown",
        "server": "an API server behind lm-eval's `local-completions`, one request at a time",
    }[path]
    if path == "offline":
        arguments = {**_offline_arguments(plan), "pretrained": plan.model.name}
        shown = ",".join(f"{name}={value}" for name, value in arguments.items())
        command = ["lm_eval", "run", "--model", "vllm", "--model_args", shown]
    else:
        command = ["python", *_serve_command(plan, 8000)[1:]]
        command[command.index(str(plan.model))] = plan.model.name
    return schema.Peer(
        name=f"{path} {platform}",
        what=f"{what}: {how}",
        command=tuple(home_relative(part) for part in command),
        environment=_environment(path, platform),
    )


def _environment(path: Way, platform: Platform) -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    return {
        "XLLM_PLATFORM": platform,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        # Stock leaves a core to its API server; the same threads make sums in the same order.
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        # A separate engine process takes its first step with the prompts that have arrived.
        **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if path == "offline" else {}),
    }


def _offline_arguments(plan: Plan) -> dict[str, Any]:
    return {
        "pretrained": str(plan.model),
        "dtype": plan.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "enforce_eager": plan.eager,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": True,
        "seed": 0,
    }


def _serve_command(plan: Plan, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(plan.model), "--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", plan.dtype, "--max-model-len", str(MAX_MODEL_LEN)),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--enable-prefix-caching", "--seed", "0"),
        *(["--enforce-eager"] if plan.eager else []),
    ]


def _server_arguments(plan: Plan, url: str) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(plan.model),
        "tokenizer_backend": "huggingface",
        "max_length": MAX_MODEL_LEN,
    }


def _require_platform(platform: Platform, url: str) -> None:
    """Ask the server what it is: only ours has `/xllm/info`."""
    status = httpx.get(f"{url}/xllm/info", trust_env=False, timeout=30).status_code
    answered = "xllm" if status == httpx.codes.OK else "native"
    if answered != platform:
        raise InternalError(
            f"asked for platform {platform!r}, but the server at {url} is {answered!r} "
            f"(GET /xllm/info: {status}); please report this"
        )


def _evaluate(
    plan: Plan,
    path: Way,
    platform: Platform,
    arguments: Mapping[str, Any],
    on_step: Callable[[str], None],
) -> Passes:
    """Run lm-eval in a child process and return what it found."""
    title = plan.title(path, platform)
    out, log = plan.folder / f"{title}.json", plan.folder / f"{title}.log"
    passes = plan.passes(path, platform)
    job = {
        "path": path,
        "model_arguments": dict(arguments),
        "limits": dict(plan.limits),
        "passes": [{"name": name, "batch_size": size} for name, size in passes.items()],
        "out": str(out),
    }
    job_path = plan.folder / f"{title}.job.json"
    job_path.write_text(json.dumps(job))
    code = _drive(job_path, log, clean_environment(_driver_environment(path, platform)), on_step)
    if code != 0 or not out.exists():
        raise ModelError(
            f"lm-eval on the {path} path under {platform} ended with exit code {code}; its last "
            f"words:\n{tail(log)}"
        )
    found = json.loads(out.read_text())
    if path == "offline" and found["platform"] != platform:
        raise InternalError(
            f"asked for platform {platform!r}, but {found['platform']!r} answered in lm-eval's "
            "process; please report this"
        )
    return cast("Passes", found["passes"])


def _driver_environment(path: Way, platform: Platform) -> dict[str, str]:
    # The driver's progress lines have stdout for themselves.
    return {**_environment(path, platform), "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


def _drive(
    job: Path, log: Path, environment: Mapping[str, str], on_step: Callable[[str], None]
) -> int:
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), str(job)]
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env=dict(environment),
            cwd=job.parent,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    on_step(line.removeprefix(PROGRESS).strip())
        except BaseException:  # an interrupt too must not leave the child behind; raised again
            process.terminate()
            raise
    return process.returncode
