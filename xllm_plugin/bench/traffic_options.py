"""The options of a benchmark that sends traffic to sides."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.commands import names_in, require_known
from xllm_plugin.bench.options import keep_logs_option, model_option
from xllm_plugin.bench.traces import Vocabulary, read_lengths
from xllm_plugin.bench.traffic import Traffic

__all__ = ["MAX_INPUT", "MAX_OUTPUT", "SHORTEN", "TrafficOptions", "traffic_options"]

SHORTEN = 12.0
"""Two cores can then read nearly every recorded prompt within the tightest promise, 500 ms."""
MAX_INPUT, MAX_OUTPUT = 1536, 256
"""Tokens of a prompt and of an output, after that."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, slots=True)
class TrafficOptions:
    """What `traffic_options` adds, as it was given."""

    model: str
    traces: str
    shorten: float
    seconds: float | None
    burst_factor: float
    vllm_args: str
    seed: int
    minutes: float
    keep_logs: Path | None

    def traffic(self, model_folder: Path, data_folder: Path, *, default_seconds: float) -> Traffic:
        """What is sent, from the lengths in `data_folder`.  Raises `ConfigError` for others."""
        known = sorted(path.stem for path in data_folder.glob("azure-*.jsonl"))
        names = names_in(self.traces)
        require_known("traces", names, known)
        return Traffic(
            traces={name: read_lengths(data_folder / f"{name}.jsonl") for name in names},
            vocabulary=Vocabulary.of_model(model_folder),
            shorten=self.shorten,
            max_input=MAX_INPUT,
            max_output=MAX_OUTPUT,
            bursts=Bursts(factor=self.burst_factor),
            window_s=self.seconds or default_seconds,
            seed=self.seed,
        )


def traffic_options(function: F) -> F:
    """Add the options of a benchmark that sends traffic to sides; the argument is `options`."""
    names = [field.name for field in dataclasses.fields(TrafficOptions)]

    @functools.wraps(function)
    def gathered(**arguments: Any) -> Any:
        chosen = TrafficOptions(**{name: arguments.pop(name) for name in names})
        return function(**arguments, options=chosen)

    decorated: Any = gathered
    for option in reversed(_TRAFFIC_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return] # click's decorators keep the type


_TRAFFIC_OPTIONS = (
    model_option,
    click.option(
        "--traces",
        default="azure-conv,azure-code",
        show_default=True,
        help="Recorded lengths; requests take them in turn.",
    ),
    click.option(
        "--shorten",
        type=click.FloatRange(min=1),
        default=SHORTEN,
        show_default=True,
        help="Divide the recorded lengths, prompts and outputs alike.",
    ),
    click.option("--seconds", type=click.FloatRange(min=0.5), help="Arrivals of one trial."),
    click.option(
        "--burst-factor",
        type=click.FloatRange(min=1),
        default=4.0,
        show_default=True,
        help="Rate in a burst (2 s of every 8 s) over the rate outside; 1 for none.",
    ),
    click.option(
        "--vllm-args",
        default="--max-model-len 2048 --kv-cache-memory-bytes 1073741824",
        show_default=True,
        help="Flags that every side gets.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option(
        "--minutes",
        type=click.FloatRange(min=0.1),
        default=32.0,
        show_default=True,
        help="After that no trial begins; what is missing is left out and named.",
    ),
    keep_logs_option,
)
