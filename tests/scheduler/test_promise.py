"""Promises: what a request may say, what it gets if it says nothing, what is refused."""

from __future__ import annotations

import difflib
import subprocess
import sys
from typing import Any

import pytest

from xllm_plugin.config import XllmConfig, load_config
from xllm_plugin.errors import ConfigError, PromiseError
from xllm_plugin.scheduler.promise import KEYS, Promise, ServiceClass, read_promise

DEFAULTS = Promise(ttft_ms=700, tpot_ms=30, tenant="house", priority=4)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {"xllm_resume_from": "x"}])
def test_a_request_that_says_nothing_gets_the_defaults(extra_args: Any) -> None:
    assert read_promise(extra_args, DEFAULTS) == DEFAULTS


def test_what_is_said_counts_and_the_rest_is_default() -> None:
    assert read_promise({"xllm_ttft_ms": 250, "xllm_class": "offline"}, DEFAULTS) == Promise(
        ttft_ms=250.0, tpot_ms=30, service_class=ServiceClass.OFFLINE, priority=4, tenant="house"
    )


def test_numbers_come_as_text_too() -> None:
    args = {
        "xllm_ttft_ms": "250",
        "xllm_tpot_ms": " 12.5 ",
        "xllm_class": " Online",
        "xllm_priority": "-3",
        "xllm_tenant": "team/a@b:1",
    }
    assert read_promise(args, DEFAULTS) == Promise(
        250.0, 12.5, ServiceClass.ONLINE, -3, "team/a@b:1"
    )


WRONG = [
    ("xllm_ttft_ms", 0),
    ("xllm_ttft_ms", -5.0),
    ("xllm_ttft_ms", "soon"),
    ("xllm_ttft_ms", float("nan")),
    ("xllm_ttft_ms", "inf"),
    ("xllm_ttft_ms", True),
    ("xllm_ttft_ms", None),
    ("xllm_ttft_ms", [100]),
    ("xllm_ttft_ms", 10**400),
    ("xllm_tpot_ms", 86_400_001),
    ("xllm_tpot_ms", ""),
    ("xllm_class", "batch"),
    ("xllm_class", 1),
    ("xllm_priority", 1.5),
    ("xllm_priority", "high"),
    ("xllm_priority", 2**31),
    ("xllm_tenant", ""),
    ("xllm_tenant", "x" * 65),
    ("xllm_tenant", 'a"b'),
    ("xllm_tenant", "a\n"),
    ("xllm_tenant", 7),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k}={v!r:.12}" for k, v in WRONG])
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(PromiseError) as caught:
        read_promise({key: value}, DEFAULTS)
    assert caught.value.field == key
    message = str(caught.value)
    assert message.startswith(f"{key} is ")
    assert "accepted is" in message
    assert len(message) < 300, "a value is not repeated at any length"


def test_a_misspelt_key_is_refused_and_another_s_is_left_alone() -> None:
    with pytest.raises(PromiseError, match="did you mean xllm_ttft_ms") as caught:
        read_promise({"xllm_tttf_ms": 5}, DEFAULTS)
    assert caught.value.field == "xllm_tttf_ms"
    for key in KEYS:
        assert key in str(caught.value)


def test_a_body_full_of_names_is_not_compared_name_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def matches(key: str, *_: object, **__: object) -> list[str]:
        compared.append(key)
        return []

    monkeypatch.setattr(difflib, "get_close_matches", matches)
    args = {f"xllm_{number}": 0 for number in range(1000)}
    assert read_promise({"xllm_" + "a" * 60: 0, **args}, DEFAULTS) == DEFAULTS
    assert compared == list(args)[:64]
    with pytest.raises(PromiseError, match="xllm_tpot_ms is '1111"):
        read_promise({"xllm_tpot_ms": "1" * 65}, DEFAULTS)


def test_the_settings_are_the_defaults() -> None:
    assert XllmConfig().scheduler.policy == "fcfs"
    assert XllmConfig().scheduler.default_promise == Promise()
    config = load_config(
        {"xllm": {"scheduler": {"ttft_ms": 4000, "tpot_ms": 100, "service_class": "offline"}}},
        environ={"XLLM_SCHEDULER__POLICY": "slo", "XLLM_SCHEDULER__TENANT": "lab"},
    )
    assert config.scheduler.policy == "slo"
    assert config.scheduler.default_promise == Promise(4000, 100, ServiceClass.OFFLINE, 0, "lab")


@pytest.mark.parametrize(
    "values",
    [{"policy": "best"}, {"ttft_ms": 0}, {"target": 1.5}, {"tenant": "a b"}, {"max_wait_s": 0}],
)
def test_wrong_settings_stop_the_start(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"scheduler\.{next(iter(values))}"):
        load_config({"xllm": {"scheduler": values}}, environ={})


def test_reading_a_promise_needs_no_engine() -> None:
    check = (
        "import sys, xllm_plugin.scheduler.promise, xllm_plugin.scheduler.config; "
        "assert not {'torch', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
