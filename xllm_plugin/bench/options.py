"""The options that every benchmark command has."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from xllm_plugin.bench.provenance import home_relative

__all__ = [
    "case_option",
    "chosen_cases",
    "command_line",
    "common_options",
    "keep_logs_option",
    "model_option",
    "peer_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def common_options(
    name: str, *, quick: str = "One short repeat: does it work, not how fast."
) -> Callable[[F], F]:
    """Add `--quick` and `--json FILE` (arguments `quick: bool` and `json_path: Path`).

    Args:
        name: of the benchmark.
        quick: what it does then, for the help.
    """

    def decorate(function: F) -> F:
        function = click.option(
            "--json",
            "json_path",
            type=click.Path(dir_okay=False, path_type=Path),
            default=Path(f"xllm-bench-{name}.json"),
            show_default=True,
            help="Where the result goes; a README with markers beside it is refreshed.",
        )(function)
        return click.option("--quick", is_flag=True, help=quick)(function)

    return decorate


class Case(Protocol):
    """One of the things that a benchmark looks at, each by itself."""

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def quick(self) -> bool:
        """Whether `--quick` has it too."""


CaseT = TypeVar("CaseT", bound=Case)


def case_option(cases: Sequence[Case]) -> Callable[[F], F]:
    """Add `--case NAME`, repeatable (argument `names: tuple[str, ...]`, for `chosen_cases`)."""
    return click.option(
        "--case",
        "names",
        multiple=True,
        type=click.Choice([case.name for case in cases]),
        help="Repeatable.  [default: all, or with --quick some]",
    )


def chosen_cases(cases: Sequence[CaseT], names: Collection[str], *, quick: bool) -> list[CaseT]:
    """The cases that were named; if none was, all, or with `--quick` those that are quick."""
    return [case for case in cases if (case.name in names if names else case.quick or not quick)]


model_option = click.option(
    "--model", default="smollm2", show_default=True, help="Folder, or `xllm model` name."
)
keep_logs_option = click.option(
    "--keep-logs",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the logs of servers and engines.",
)


def peer_options(function: F) -> F:
    """Add what a benchmark of `xllm_plugin.bench.peers` is told of them and where they run.

    Arguments: `model: str`, `vllm_args: str`, `port: int | None`, `keep_logs: Path | None`.
    """
    flags = click.option(
        "--vllm-args",
        default="--max-model-len 2048 --kv-cache-memory-bytes 4294967296",
        show_default=True,
        help="Flags that every peer gets.",
    )
    port = click.option("--port", type=int, help="For the peers.  [default: a free one]")
    return model_option(flags(port(keep_logs_option(function))))


def command_line() -> str:
    """How this run was called, for the result: `xllm bench ...` without this disk's paths."""
    arguments = [home_relative(argument) for argument in sys.argv[1:]]
    return shlex.join(["xllm", *arguments])
