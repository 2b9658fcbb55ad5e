"""The options that every benchmark command has."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from xllm_plugin.bench.provenance import home_relative

__all__ = ["command_line", "common_options"]

F = TypeVar("F", bound=Callable[..., Any])


def common_options(name: str) -> Callable[[F], F]:
    """Add `--quick` and `--json FILE` (arguments `quick: bool` and `json_path: Path`)."""

    def decorate(function: F) -> F:
        function = click.option(
            "--json",
            "json_path",
            type=click.Path(dir_okay=False, path_type=Path),
            default=Path(f"xllm-bench-{name}.json"),
            show_default=True,
            help="Where the result goes; a README with markers beside it is refreshed.",
        )(function)
        return click.option(
            "--quick", is_flag=True, help="One short repeat: does it work, not how fast."
        )(function)

    return decorate


def command_line() -> str:
    """How this run was called, for the result: `xllm bench ...` without this disk's paths."""
    arguments = [home_relative(argument) for argument in sys.argv[1:]]
    return shlex.join(["xllm", *arguments])
