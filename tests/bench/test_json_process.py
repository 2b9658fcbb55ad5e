"""A child that answers lines of JSON: its answers, its end, and what is told of a silent one."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from xllm_plugin.bench.json_process import JsonProcess
from xllm_plugin.errors import NotNowError

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
SLEEPER = """
import json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(json.dumps({"pid": child.pid}), flush=True)
input(); input()
"""


def child(tmp_path: Path, program: str, **options: Any) -> JsonProcess:
    command = (sys.executable, "-c", program)
    return JsonProcess("the child", command, {}, tmp_path / "logs" / "log", **options)


def test_it_answers_and_ends_when_nothing_more_is_said(tmp_path: Path) -> None:
    with child(tmp_path, ECHO, grace_s=60.0) as it:
        for number in range(3):
            it.send({"number": number})
            assert it.receive(60.0) == {"number": number}
        process = it._running()
    assert process.returncode == 0


def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    with child(tmp_path, SLEEPER) as it:
        started = psutil.Process(it.receive(60.0)["pid"])
    with contextlib.suppress(psutil.NoSuchProcess):
        while started.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def test_one_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    with child(tmp_path, "input(); raise SystemExit('out of memory')") as it:
        it.send({})
        with pytest.raises(NotNowError, match=r"(?s)the child ended.*out of memory"):
            it.receive(60.0)


def test_one_that_hangs_is_given_up(tmp_path: Path) -> None:
    with child(tmp_path, "input(); input(); input()") as it:
        it.send({})
        with pytest.raises(NotNowError, match=r"gave no answer to 'decode' within 0\.1 s"):
            it.receive(0.1, to="decode")


def test_who_waits_may_give_up(tmp_path: Path) -> None:
    def give_up() -> None:
        raise NotNowError("the server has died")

    with (
        child(tmp_path, "input(); input()") as it,
        pytest.raises(NotNowError, match="the server has died"),
    ):
        it.receive(60.0, on_wait=give_up)
