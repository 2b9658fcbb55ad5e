"""The options of benchmark commands: which cases are meant, and how a result names its command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from xllm_plugin.bench.options import case_option, chosen_cases, command_line


class Case(NamedTuple):
    name: str
    quick: bool


CASES = (Case("small", True), Case("large", False), Case("other", True))


@pytest.mark.parametrize(
    ("names", "quick", "expected"),
    [
        ((), False, ["small", "large", "other"]),
        ((), True, ["small", "other"]),
        (("other", "large"), False, ["large", "other"]),
        (("large",), True, ["large"]),
    ],
)
def test_cases_that_are_named_or_all_or_the_quick_ones(
    names: tuple[str, ...], quick: bool, expected: list[str]
) -> None:
    assert [case.name for case in chosen_cases(CASES, names, quick=quick)] == expected


def test_a_case_that_is_not_there_is_answered_with_the_known() -> None:
    @click.command()
    @case_option(CASES)
    def command(names: tuple[str, ...]) -> None:
        click.echo(",".join(names))

    assert CliRunner().invoke(command, ["--case", "small", "--case", "other"]).output == (
        "small,other\n"
    )
    found = CliRunner().invoke(command, ["--case", "none"])
    assert found.exit_code == 2
    assert "'small', 'large', 'other'" in found.output


def test_a_result_names_its_command_without_this_disks_paths(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Path.home() / "models" / "a model"
    monkeypatch.setattr(sys, "argv", ["/bin/xllm", "bench", "x", "--model", str(here), "--quick"])
    assert command_line() == "xllm bench x --model '~/models/a model' --quick"
