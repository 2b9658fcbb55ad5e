"""Adapters of held requests are not forgotten."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from xllm_plugin.scheduler.lora import not_to_hold


def request(adapter: int) -> Any:
    return SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=adapter) if adapter else None)


def test_where_all_adapters_fit_anybody_may_be_held() -> None:
    held = [request(1), request(2)]
    assert not_to_hold(held, [request(0)], [*held, request(0)], max_loras=2) == []


def test_an_adapter_is_held_only_beside_one_that_runs() -> None:
    held = [request(1), request(0), request(2)]
    offered = [request(2), request(0)]
    assert not_to_hold(held, offered, [*held, *offered], max_loras=1) == [held[0]]
    assert not_to_hold(held, [], [*held, request(3)], max_loras=2) == [held[0], held[2]]
