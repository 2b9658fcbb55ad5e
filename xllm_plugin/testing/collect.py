"""Collect what an engine answers, for `xllm_plugin.testing.equality`.

As a command (``python -m xllm_plugin.testing.collect --model DIR --prompts FILE --out FILE``) it
runs one offline engine in its own process and writes completions with log-probs as JSON.  As a
library, `collect_in_child` starts that command under either platform and reads the file.

The batches have to be the same on both sides for a bit-equal comparison, so everything that shapes
them is fixed here: all prompts are added in order before the first step (which needs the engine in
this very process; a separate engine process would take the first steps with what has arrived),
sampling is greedy, and limits and threads are arguments.  The file says which platform, threads and
vLLM it came from, so that nobody compares vLLM with itself by mistake.

Importing this file imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from xllm_plugin.bench.files import write_atomically
from xllm_plugin.errors import InternalError, ModelError, NotNowError
from xllm_plugin.testing.equality import Completion

__all__ = [
    "Collection",
    "Prompt",
    "Settings",
    "collect_in_child",
    "completion_of",
    "read_prompts",
]

KV_CACHE_BYTES = 2**29
"""Room for 64 sequences of 700 tokens of the largest test model (SmolLM2-135M, 23 kB a token)."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What shapes the batches and the arithmetic of one run."""

    model: str
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    max_tokens: int = 32
    dtype: str = "bfloat16"
    eager: bool = True
    num_threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    custom_ops: tuple[str, ...] = ()
    logprobs: int = 5
    seed: int = 0
    limit: int | None = None  # use only the first prompts
    alone: bool = False  # answer the prompts once more, one at a time
    gpu_memory_utilization: float | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One chat turn of a user, with an image or without."""

    prompt_id: str
    text: str
    image: Path | None = None

    def messages(self) -> list[dict[str, Any]]:
        """As OpenAI chat messages; the image travels as a data URL."""
        if self.image is None:
            return [{"role": "user", "content": self.text}]
        encoded = base64.b64encode(self.image.read_bytes()).decode()
        url = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
        return [{"role": "user", "content": [url, {"type": "text", "text": self.text}]}]


@dataclass(frozen=True, slots=True)
class Collection:
    """Completions and where they came from.

    `platform` is the class name of vLLM's platform; `num_replaced_modules` counts the model's
    modules that run something else than their class's `forward`; `alone` has the completions of
    `Settings.alone`.
    """

    completions: tuple[Completion, ...]
    settings: Settings
    platform: str
    vllm: str
    num_threads: int
    num_replaced_modules: int
    start_s: float
    generate_s: float
    alone: tuple[Completion, ...] = ()


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """Prompts from JSON lines ``{"id", "text", "image"?}``; images lie beside the file."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return tuple(
        Prompt(row["id"], row["text"], path.parent / row["image"] if "image" in row else None)
        for row in rows
    )


def collect_in_child(
    settings: Settings,
    prompts: Path,
    *,
    platform: Literal["xllm", "native"],
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 570,
) -> Collection:
    """Run one engine in a child process under `platform` and return what it answered.

    Raises:
        ModelError: the engine failed; the message ends with the last lines of its log.
        NotNowError: it did not finish within `timeout_s`.
        InternalError: it answered from the other platform than was asked for.
    """
    with tempfile.TemporaryDirectory(prefix="xllm-collect-") as folder:
        out, log = Path(folder, "out.json"), Path(folder, "log")
        command = [sys.executable, "-m", __name__, *_arguments(settings, prompts, out)]
        with log.open("w") as stream:
            try:
                code = subprocess.run(  # noqa: PLW1510 - the code is looked at below
                    command,
                    env=_environment(settings, platform, environment or {}),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise NotNowError(
                    f"collecting from {settings.model} under {platform} took longer than "
                    f"{timeout_s:.0f} s; give it more time or fewer prompts:\n{_tail(log)}"
                ) from error
        if code != 0 or not out.exists():
            raise ModelError(
                f"collecting from {settings.model} under {platform} ended with exit code {code}; "
                f"its last words:\n{_tail(log)}"
            )
        found = _read(out)
    if (found.platform.startswith("xllm_plugin.")) != (platform == "xllm"):
        raise InternalError(f"asked for platform {platform!r}, but {found.platform} answered")
    return found


def _arguments(settings: Settings, prompts: Path, out: Path) -> list[str]:
    arguments = [f"--prompts={prompts}", f"--out={out}"]
    for name, value in asdict(settings).items():
        option = "--" + name.replace("_", "-")
        if name == "eager":
            arguments.append("--eager" if value else "--compile")
        elif name == "alone":
            arguments += [option] * value
        elif name == "custom_ops":
            arguments += [f"{option}={op}" for op in value]
        elif value is not None:
            arguments.append(f"{option}={value}")
    return arguments


def _environment(settings: Settings, platform: str, additions: Mapping[str, str]) -> dict[str, str]:
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("XLLM_PLATFORM")},
        "XLLM_PLATFORM": platform,
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(settings.num_threads),
        **additions,
    }


def _read(path: Path) -> Collection:
    data = json.loads(path.read_text())
    settings = data.pop("settings")
    completions, alone = (
        tuple(map(Completion.from_dict, data.pop(name))) for name in ("completions", "alone")
    )
    return Collection(
        completions=completions,
        alone=alone,
        settings=Settings(**settings | {"custom_ops": tuple(settings["custom_ops"])}),
        **data,
    )


def _tail(log: Path, num_lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])


def generate(settings: Settings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Start an engine in this process, answer all prompts in one call, and return the record."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    start = time.monotonic()
    options: dict[str, Any] = {}
    if settings.custom_ops:
        options["compilation_config"] = {"custom_ops": list(settings.custom_ops)}
    if settings.gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = settings.gpu_memory_utilization
    engine = vllm.LLM(
        model=settings.model,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        dtype=settings.dtype,
        enforce_eager=settings.eager,
        seed=settings.seed,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        distributed_executor_backend="uni",
        max_logprobs=max(20, settings.logprobs),
        **options,
    )
    ready = time.monotonic()
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=settings.max_tokens,
        logprobs=settings.logprobs,
        seed=settings.seed,
    )

    def answer(batch: Sequence[Prompt]) -> list[dict[str, Any]]:
        outputs = engine.chat([p.messages() for p in batch], sampling, use_tqdm=False)
        return [
            completion_of(prompt.prompt_id, output.outputs[0]).to_dict()
            for prompt, output in zip(batch, outputs, strict=True)
        ]

    completions = answer(prompts)
    done = time.monotonic()
    alone: list[dict[str, Any]] = []
    if settings.alone:
        engine.reset_prefix_cache()  # what the batch has computed would be part of it
        alone = [one for prompt in prompts for one in answer([prompt])]
    return {
        "settings": asdict(settings),
        "platform": f"{type(current_platform).__module__}.{type(current_platform).__name__}",
        "vllm": vllm.__version__,
        "num_threads": torch.get_num_threads(),
        "num_replaced_modules": engine.apply_model(_num_replaced_modules)[0],
        "start_s": round(ready - start, 1),
        "generate_s": round(done - ready, 3),
        "completions": completions,
        "alone": alone,
    }


def _num_replaced_modules(model: Any) -> int:
    return sum("forward" in vars(module) for module in model.modules())


def completion_of(prompt_id: str, output: Any) -> Completion:
    """One of vLLM's `CompletionOutput`s that was asked for with log-probs."""
    candidates = [{token: x.logprob for token, x in at.items()} for at in output.logprobs]
    pairs = zip(output.token_ids, candidates, strict=True)
    return Completion(
        prompt_id=prompt_id,
        token_ids=tuple(output.token_ids),
        logprobs=tuple(scores[token] for token, scores in pairs),
        candidates=tuple(candidates),
    )


DEFAULTS = Settings(model="")


@click.command(context_settings={"show_default": True})
@click.option("--model", required=True, help="Folder of the model.")
@click.option("--prompts", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--limit", type=int, help="Use only the first prompts.")
@click.option("--alone", is_flag=True, help="Answer them once more, one at a time.")
@click.option("--max-num-seqs", default=DEFAULTS.max_num_seqs)
@click.option("--max-num-batched-tokens", default=DEFAULTS.max_num_batched_tokens)
@click.option("--max-model-len", default=DEFAULTS.max_model_len)
@click.option("--max-tokens", default=DEFAULTS.max_tokens)
@click.option("--dtype", default=DEFAULTS.dtype)
@click.option("--eager/--compile", default=DEFAULTS.eager)
@click.option("--num-threads", default=DEFAULTS.num_threads, help="Expected; set OMP_NUM_THREADS.")
@click.option("--custom-ops", multiple=True, help="As in vLLM's compilation_config; repeatable.")
@click.option("--logprobs", default=DEFAULTS.logprobs)
@click.option("--seed", default=DEFAULTS.seed)
def main(prompts: Path, out: Path, **settings: Any) -> None:
    """Answer PROMPTS with one offline engine and write tokens and log-probs."""
    wanted = Settings(**settings)
    record = generate(wanted, read_prompts(prompts)[: wanted.limit])
    write_atomically(out, json.dumps(record))


if __name__ == "__main__":
    main()
