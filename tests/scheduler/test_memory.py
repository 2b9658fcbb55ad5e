"""An elastic KV cache that cannot be: what a server says, and what a program gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.scheduler import memory

REFUSED = ConfigError("xtensor.budget_bytes=1: give 17 or more")


def test_a_server_s_engine_ends_with_the_message_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("EngineCore", "EngineCore_DP3"):
        monkeypatch.setattr(memory, "current_process", lambda name=name: SimpleNamespace(name=name))
        with pytest.raises(SystemExit) as ended, memory.ending_the_engine():
            raise REFUSED
        assert ended.value.code == 2
        assert capsys.readouterr().err == f"xllm: {REFUSED}\n"


def test_a_program_that_is_its_own_engine_gets_the_exception() -> None:
    with pytest.raises(ConfigError, match="give 17"), memory.ending_the_engine():
        raise REFUSED


def test_who_wants_the_traceback_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "current_process", lambda: SimpleNamespace(name="EngineCore"))
    monkeypatch.setenv("XLLM_TRACEBACK", "1")
    with pytest.raises(ConfigError), memory.ending_the_engine():
        raise REFUSED
