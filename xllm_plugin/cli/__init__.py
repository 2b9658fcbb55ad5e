"""The `xllm` command.  One file a command; a command's file is imported only when it is called."""

from __future__ import annotations

import importlib
import os

import click

from xllm_plugin import __version__
from xllm_plugin.errors import XllmError

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("xllm_plugin.cli.serve:serve", "Serve a model over the OpenAI API (vllm serve)."),
    "service": (
        "xllm_plugin.cli.service:service",
        "Put one OpenAI endpoint in front of many servers.",
    ),
    "doctor": ("xllm_plugin.cli.doctor:doctor", "Explain what runs here, and what does not."),
    "selftest": (
        "xllm_plugin.cli.selftest:selftest",
        "Try a device against the host.",
    ),
    "model": ("xllm_plugin.cli.model:model", "Prepare a model without a model hub."),
    "top": ("xllm_plugin.cli.top:top", "Watch running engines."),
    "memory": ("xllm_plugin.cli.memory:memory", "Show or change how much memory KV caches take."),
    "bench": ("xllm_plugin.cli.bench:bench", "Run a benchmark and write its result."),
}


class LazyGroup(click.Group):
    """A click group that imports a command's module on use, so that `xllm --help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Name the commands, in the order of a newcomer's needs."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module_name), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xllm")
def cli() -> None:
    """xLLM for vLLM: serve, inspect and measure."""


def main() -> None:
    """Console entry point: errors of ours are one message and an exit code, not a traceback."""
    try:
        cli()
    except XllmError as error:
        if os.environ.get("XLLM_TRACEBACK"):
            raise
        error.stop()
