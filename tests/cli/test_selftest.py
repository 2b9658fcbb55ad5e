"""`xllm selftest`: what passes, what does not, and families without one."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from xllm_plugin.cli.selftest import find_test, table_of
from xllm_plugin.errors import MisuseError
from xllm_plugin.testing.selftest import Check

NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({"error": 0.01, "tolerance": 0.02}, True),
        ({"error": 0.03, "tolerance": 0.02}, False),
        ({"error": NAN, "tolerance": 0.02}, False),
        ({"error": 0.0, "problem": "refused"}, False),
        ({}, False),
    ],
)
def test_what_passes(fields: dict[str, Any], passed: bool) -> None:
    assert Check("npu_add", "2 x 3", **fields).passed is passed


def test_the_table_says_why_not() -> None:
    text = StringIO()
    checks = [Check("npu_add", "2 x 3", 0.001, 0.02, 12.34), Check("npu_sub", "1", problem="[no]")]
    Console(file=text, width=120).print(table_of("a device [b]", checks))
    for words in ("a device [b]", "npu_add", "12.3", "yes", "NO [no]"):
        assert words in text.getvalue()


def test_a_family_without_one_is_named() -> None:
    with pytest.raises(MisuseError, match=r"family cpu has no self-test\..*--device npu"):
        find_test("cpu", "xllm_plugin.cpu.platform.XllmCpuPlatform")
