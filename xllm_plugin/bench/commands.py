"""How a benchmark command begins and ends: files beside it, the model, lists of names, a result."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markdown import Markdown

from xllm_plugin.bench import readme
from xllm_plugin.bench.schema import Result
from xllm_plugin.errors import ConfigError

__all__ = ["beside", "conclude", "log_folder", "model_folder", "names_in", "require_known"]


def beside(folder: Path, name: str) -> Any:
    """Import `name`.py of a benchmark's folder, which is no package, once a process."""
    full_name = f"xllm_bench_{folder.name}_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full_name]


def model_folder(model: str) -> Path:
    """The absolute path of a folder as it is; a name goes through `xllm model`."""
    if Path(model).is_dir():
        return Path(model).absolute()
    from xllm_plugin.models import prepare

    return prepare(model).absolute()


@contextlib.contextmanager
def log_folder(keep_logs: Path | None) -> Iterator[Path]:
    """The folder that the user gave, or one that is gone afterwards."""
    if keep_logs is not None:
        keep_logs.mkdir(parents=True, exist_ok=True)
        yield keep_logs.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder:
        yield Path(folder)


def names_in(text: str) -> tuple[str, ...]:
    """The names of a comma-separated option, each once, in their order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def require_known(what: str, names: Collection[str], known: Collection[str]) -> None:
    """Raise `ConfigError` unless there are names, all of them known.

    Args:
        what: they name, for people.
        names: that somebody gave.
        known: those there are.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"{what} {', '.join(unknown) or '(none)'} unknown; choose from {', '.join(known)}"
        )


def conclude(result: Result, json_path: Path, console: Console) -> None:
    """Write the result and its README, print the tables, and exit with 1 if a check failed."""
    written = readme.publish(result, json_path)
    console.print(Markdown(readme.render(result).replace("<br>", "  \n")))  # not HTML here
    console.print(f"written: {', '.join(map(str, written))}", highlight=False)
    if not result.passed:
        raise click.exceptions.Exit(1)
