"""`xllm selftest`: does a device compute what its family takes for granted?"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xllm_plugin import shims
from xllm_plugin.accelerator.discover import choose
from xllm_plugin.errors import MisuseError
from xllm_plugin.plugins import device_families, manager_here
from xllm_plugin.selection import DEVICE_ENV
from xllm_plugin.testing.conformance import load_kit
from xllm_plugin.testing.selftest import Check, SelfTest
from xllm_plugin.testing.selftest_model import check_model

__all__ = ["selftest"]


@click.command()
@click.option("--device", help="Device family [default: $XLLM_DEVICE, or the best usable one].")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a check.")
def selftest(*, device: str | None, as_json: bool) -> None:
    """Try the device's operators, its parts and a small model against the host, with times.

    Exits with 1 when one does not do what it should.
    """
    shims.install()
    choice = choose(device_families(manager_here()), device or os.environ.get(DEVICE_ENV) or None)
    name = choice.family.name
    test = find_test(name, choice.family.platform_class)
    os.environ[DEVICE_ENV] = name  # of what is started from here
    checks: list[Check] = []
    ours = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what torch_npu prints is no result
            for check in itertools.chain(test(), check_model(name)):
                checks.append(check)
                if as_json:
                    record = dataclasses.asdict(check) | {"passed": check.passed}
                    click.echo(json.dumps(record), file=ours)
    finally:  # what was found out before something that nobody expected
        if checks and not as_json:
            Console().print(table_of(choice.probe.found, checks))
    sys.exit(0 if all(check.passed for check in checks) else 1)


def find_test(family: str, platform_class: str) -> SelfTest:
    """The family's self-test.

    Raises:
        MisuseError: it has none.
    """
    try:
        test: SelfTest = load_kit(platform_class, "SELFTEST")
    except AssertionError as error:
        raise MisuseError(
            f"the device family {family} has no self-test. Name one that has: --device npu."
        ) from error
    return test


def table_of(title: str, checks: list[Check]) -> Table:
    """For a terminal."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for column in ("operator", "case", "error", "at most", "us a call", "passed"):
        table.add_column(column)
    for check in checks:
        table.add_row(
            check.name,
            check.what,
            "" if check.error is None else f"{check.error:.2g}",
            f"{check.tolerance:.2g}",
            "" if check.time_us is None else f"{check.time_us:.1f}",
            "yes" if check.passed else escape(f"NO {check.problem}".strip()),
        )
    return table
