"""`xllm memory`: what running engines have taken for their KV caches, and how much one may take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click
import msgspec

from xllm_plugin.channel.client import ChannelClient
from xllm_plugin.channel.paths import EngineSocket, channel_directory
from xllm_plugin.cli.top import sockets_at
from xllm_plugin.cli.top_view import memory_text
from xllm_plugin.errors import ChannelError, MisuseError
from xllm_plugin.xtensor.messages import MEMORY_SECTION, MemorySection

__all__ = ["memory"]

LOOK_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 30.0
"""The call waits for the step that runs."""
CALL: Final = "set_memory_budget"
UNITS: Final = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_in_bytes(text: str) -> int:
    """Read 2147483648, 2048MiB or 2GiB; whole numbers only, so that nothing is rounded unseen.

    Raises:
        click.BadParameter: it is no such size.
    """
    found = re.fullmatch(r"(\d+)\s*([KMG]iB)?", text, re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r}: give bytes, or as 1536MiB or 2GiB.")
    return int(found[1]) * UNITS[(found[2] or "").upper()]


@click.command()
@click.option(
    "--socket",
    "socket",
    type=click.Path(path_type=Path),
    help="One engine's socket, or a directory of sockets.",
)
@click.option(
    "--budget",
    "budget_bytes",
    metavar="SIZE",
    type=size_in_bytes,
    help="The most that the engine may take from now on: bytes, or as 1536MiB or 2GiB.",
)
def memory(socket: Path | None, budget_bytes: int | None) -> None:
    """Show the KV memory of this user's engines, or change what one of them may take.

    A smaller budget takes effect as requests end: none of them is ended for it.
    """
    engines = sockets_at(socket)
    if not engines:
        raise ChannelError(
            f"no engine is running: no live socket in {socket or channel_directory()}. Start one "
            "with `xllm serve MODEL`."
        )
    if budget_bytes is None:
        silent = None
        for engine in engines:
            try:
                click.echo(f"{_name(engine)}: {_seen(engine.path)}")
            except ChannelError as error:
                click.echo(f"{_name(engine)}: does not answer")
                silent = error
        if silent is not None:
            raise silent
        return
    if len(engines) > 1:
        paths = ", ".join(str(engine.path) for engine in engines)
        raise MisuseError(f"--budget is one engine's; add --socket with one of {paths}.")
    (engine,) = engines
    click.echo(f"{_name(engine)}: {_told(_set_budget(engine.path, budget_bytes))}")


def _name(engine: EngineSocket) -> str:
    return f"{engine.instance_id} dp{engine.dp_rank}" if engine.instance_id else str(engine.path)


def _seen(path: Path) -> str:
    with ChannelClient(path, LOOK_TIMEOUT_S) as client:
        found = client.snapshot().section(MEMORY_SECTION, MemorySection)
    return "its KV cache is fixed" if found is None else _told(found)


def _told(found: MemorySection) -> str:
    draining_bytes = found.num_draining_slabs * found.slab_bytes
    later = f"; {draining_bytes / 2**20:.0f} MiB go when requests end" if draining_bytes else ""
    return f"{memory_text(found)}{later}"


def _set_budget(path: Path, budget_bytes: int) -> MemorySection:
    """Ask the engine.

    Raises:
        MisuseError: its KV cache is fixed, or the budget is not one that it can have.
    """
    with ChannelClient(path, CALL_TIMEOUT_S) as client:
        if CALL not in {call.name for call in client.describe()}:
            raise MisuseError(
                f"the KV cache of the engine at {path} is fixed. Start it with "
                "XLLM_XTENSOR__ENABLED=1 to change its budget while it runs."
            )
        return msgspec.convert(client.call(CALL, budget_bytes=budget_bytes), MemorySection)
