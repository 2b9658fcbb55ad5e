"""`xllm doctor`: explain what runs here, and what does not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xllm_plugin.doctor import Report, examine
from xllm_plugin.selection import DEVICE_ENV

__all__ = ["doctor"]


@click.command()
@click.option("--device", help="Device family [default: $XLLM_DEVICE, or the best usable one].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(*, device: str | None, as_json: bool) -> None:
    """Print versions, platform and why, device families, plugins, seams, settings and problems.

    Of the family that was chosen, or asked for, also what its device is and what it lacks.

    Exits with 1 when a problem keeps a model from being served as asked.
    """
    if device:
        os.environ[DEVICE_ENV] = device
    with contextlib.redirect_stdout(sys.stderr):  # torch_npu, for one, prints when it is imported
        report = examine()
    if as_json:
        record = dataclasses.asdict(report)
        record["problems"] = [dataclasses.asdict(problem) for problem in report.problems]
        click.echo(json.dumps(record, indent=2, default=str))
    else:
        _show(report, Console())
    sys.exit(1 if report.problems else 0)


def _show(report: Report, console: Console) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    console.print(f"[bold]versions[/]  {versions}", highlight=False)
    console.print(f"[bold]platform[/]  {report.platform}: {escape(report.platform_reason)}")
    console.print(f"          vLLM runs on {escape(report.platform_class)}")
    console.print(f"[bold]device[/]    {report.device}: {escape(report.device_reason)}")
    console.print(
        _table(
            "device families",
            ("family", "usable", "looked for", "found"),
            [
                (f.name, "yes" if f.probe.usable else "no", f.probe.looked_for, f.probe.found)
                for f in report.device_families
            ],
        )
    )
    if report.device_facts:
        console.print(
            _table(
                "the device and what it needs",
                ("what", "found", "needed", "mend"),
                [(fact.name, fact.found, fact.needed, fact.mend) for fact in report.device_facts],
            )
        )
    console.print(
        _table(
            "plugins",
            ("plugin", "origin", "hooks"),
            [(plugin.name, plugin.origin, ", ".join(plugin.hooks)) for plugin in report.plugins],
        )
    )
    console.print(
        _table(
            "vLLM internals leaned on",
            ("seam", "fits", "why"),
            [(seam.name, "yes" if seam.fits else "NO", seam.why) for seam in report.seams],
        )
    )
    console.print(
        _table(
            "settings",
            ("setting", "value", "from"),
            [(setting.name, str(setting.value), setting.origin) for setting in report.settings],
        )
    )
    if not report.findings:
        console.print("[green]nothing to mend[/]")
    for finding in report.findings:
        colour = "red" if finding.severity == "problem" else "yellow"
        console.print(f"[{colour}]{finding.severity}[/] {finding.name}: ", end="")
        console.print(finding.found, highlight=False, markup=False)
        if finding.mend:
            console.print(f"    mend: {finding.mend}", highlight=False, markup=False)


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    return table
