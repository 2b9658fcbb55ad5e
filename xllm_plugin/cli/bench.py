"""`xllm bench`: run one of the benchmarks under benchmarks/, found by folder.

A benchmark is a folder with a `bench.py` that has a click command named `command`.  It is loaded by
path, so that adding a question is adding a folder, and nothing of it is imported for any other.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

import xllm_plugin
from xllm_plugin.errors import ConfigError, InternalError

__all__ = ["BenchGroup", "bench", "benchmarks_folder"]


def benchmarks_folder() -> Path:
    """`benchmarks/` of the source checkout, or its copy inside an installed wheel."""
    package = Path(xllm_plugin.__file__).parent
    for folder in (package.parent / "benchmarks", package / "_benchmarks"):
        if any(folder.glob("*/bench.py")):
            return folder
    raise ConfigError(
        f"no benchmarks beside {package}; reinstall xllm-plugin, or run from a source checkout"
    )


class BenchGroup(click.Group):
    """One sub-command for each benchmark folder, imported on use.

    Args:
        folder: holds the benchmark folders; `benchmarks_folder()` by default.
    """

    def __init__(self, *args: object, folder: Path | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type] # handed through to click
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the benchmark folders are."""
        return self._folder or benchmarks_folder()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the folders' names."""
        del ctx
        return sorted(path.parent.name for path in self.folder.glob("*/bench.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load the benchmark, or raise `ConfigError` with the names there are."""
        names = self.list_commands(ctx)
        if cmd_name not in names:
            raise ConfigError(
                f"no benchmark {cmd_name!r}; choose from {', '.join(names)} "
                "(`xllm bench --list` says what they ask)"
            )
        return _load(self.folder / cmd_name / "bench.py")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names alone: their help would need every benchmark imported."""
        with formatter.section("Benchmarks"):
            formatter.write_dl([(name, "") for name in self.list_commands(ctx)])


def _print_list(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    group = ctx.command
    assert isinstance(group, BenchGroup)
    formatter = ctx.make_formatter()
    formatter.write_dl([(name, question(group.folder / name)) for name in group.list_commands(ctx)])
    click.echo(formatter.getvalue().rstrip())
    ctx.exit()


def question(folder: Path) -> str:
    """The first paragraph of the benchmark's README under its title: the question it answers."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    paragraphs = (" ".join(p.split()) for p in readme.read_text().split("\n\n"))
    return next((p for p in paragraphs if p and not p.startswith(("#", "<!--"))), "")


@click.group(
    cls=BenchGroup,
    subcommand_metavar="NAME [--quick] [--json FILE] [OPTIONS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_list,
    help="List the benchmarks and the question each answers.",
)
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Run a benchmark and write its result.

    `xllm bench NAME --help` shows a benchmark's own options.  A result is written when the run is
    complete; an interrupted one stops the servers that it started and writes nothing.
    """
    ctx.with_resource(_sigterm_as_interrupt())


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C, so that `with` blocks stop their servers."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(path: Path) -> click.Command:
    name = f"xllm_benchmark_{path.parent.name.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:  # also Ctrl-C: half a module is not to be found later
        del sys.modules[name]
        raise
    command = getattr(module, "command", None)
    if not isinstance(command, click.Command):
        raise InternalError(f"{path} has no click command named `command`; see another benchmark")
    return command
