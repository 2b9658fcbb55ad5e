"""`xllm service keys`: make, list and remove the API keys of the service's clients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xllm_plugin.errors import ConfigError, MisuseError

if TYPE_CHECKING:
    from xllm_plugin.service.key_file import KeyRecord

__all__ = ["keys"]

_MIN_KEY_CHARS = 20
_FILE = click.option(
    "--file",
    type=click.Path(path_type=Path),
    envvar="XLLM_SERVICE_KEYS__FILE",
    show_envvar=True,
    required=True,
    help="What the service has as `keys.file`.",
)


@click.group()
def keys() -> None:
    """Make, list and remove the API keys of clients.

    The file holds hashes; a key is shown once, when it is made.  A running service follows the
    file.
    """


@keys.command("add")
@click.argument("name")
@_FILE
@click.option("--tenant", help="Whose key it is.  [default: NAME]")
@click.option("--requests-per-minute", type=float, help="[default: any number]")
@click.option("--tokens-per-minute", type=float, help="Prompts and outputs.  [default: any number]")
@click.option("--max-concurrency", type=int, help="Requests at once.  [default: any number]")
@click.option("--first-priority", type=int, help="Lowest that may be asked for.  [default: 0]")
@click.option("--stdin", "reads_key", is_flag=True, help="Read a key that exists already.")
def add_command(name: str, file: Path, *, reads_key: bool, **limits: Any) -> None:
    """Make a key called NAME and print it."""
    from pydantic import ValidationError

    from xllm_plugin.service.key_file import KeyRecord, hash_of, make_key, write

    known = _read(file)
    if any(one.name == name for one in known):
        raise MisuseError(
            f"{file} has a key {name!r} already; remove it first, or take another name."
        )
    key = _key_from_stdin() if reads_key else make_key()
    given = {field: value for field, value in limits.items() if value is not None}
    try:
        record = KeyRecord(name=name, sha256=hash_of(key), **given)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc']))}={item['input']!r}: {item['msg']}"
            for item in error.errors()
        )
        raise ConfigError(f"{wrong}.") from None
    write(file, [*known, record])
    if reads_key:
        click.echo(f"The key of {name} is taken in.", err=True)
        return
    click.echo(f"The key of {name}, which is not shown again:", err=True)
    click.echo(key)


@keys.command("list")
@_FILE
def list_command(file: Path) -> None:
    """List the keys and their limits."""
    from rich.console import Console
    from rich.table import Table

    columns = ("tenant", "requests_per_minute", "tokens_per_minute", "max_concurrency")
    table = Table("name", *(column.replace("_", " ") for column in columns), "first priority")
    for one in _read(file):
        cells = [getattr(one, column) for column in columns]
        shown = ["-" if cell is None else str(cell) for cell in cells]
        table.add_row(one.name, *shown, str(one.first_priority))
    Console().print(table)


@keys.command("remove")
@click.argument("name")
@_FILE
def remove_command(name: str, file: Path) -> None:
    """Remove a key; the service refuses it within a second or two."""
    from xllm_plugin.service.key_file import write

    known = _read(file)
    kept = [one for one in known if one.name != name]
    if len(kept) == len(known):
        names = ", ".join(one.name for one in known) or "none"
        raise MisuseError(f"{file} has no key {name!r}; it has {names}.")
    write(file, kept)
    click.echo(f"The key of {name} is removed.")


def _read(file: Path) -> list[KeyRecord]:
    from xllm_plugin.service.key_file import read

    return read(file) if file.exists() else []


def _key_from_stdin() -> str:
    key = sys.stdin.readline().strip()
    if len(key) < _MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
        raise MisuseError(
            f"the key on standard input has {len(key)} characters; give {_MIN_KEY_CHARS} or more "
            "of ASCII without spaces, since only its hash protects it."
        )
    return key
