"""Who holds what, asked for several models in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xllm_plugin.service.config import InstanceEntry, KvIndexConfig
from xllm_plugin.service.fleet import Fleet
from xllm_plugin.service.kv_index import directory as directory_module
from xllm_plugin.service.kv_index.directory import KvDirectory
from xllm_plugin.service.kv_index.index import NO_EXTRA, packed
from xllm_plugin.service.kv_index.places import Places
from xllm_plugin.service.kv_index.prompts import Prompt
from xllm_plugin.service.kv_index.wire import BlockStored
from xllm_plugin.service.lifecycle import Alive, Timings
from xllm_plugin.testing.service_harness import make_pool

MODELS = ("a", "b", "c")
PROMPT = Prompt(packed([1, 2, 3]), NO_EXTRA)


@contextmanager
def made() -> Iterator[tuple[Fleet, KvDirectory]]:
    """A directory of three models that one instance has, and nobody is followed."""
    fleet = Fleet(Timings(lease_s=1e9), make_pool, clock=lambda: 0.0)
    entry = InstanceEntry(url="http://i:80", name="i")
    instance = fleet.register(entry, source="t", incarnation="1", leased=True)
    fleet.set_models(instance, {name: {"id": name} for name in MODELS})
    fleet.report(instance, Alive("1"))
    directory = KvDirectory(fleet, KvIndexConfig())
    directory.index.apply(directory.index.add(), BlockStored([b"x"], None, [1, 2], 2))
    try:
        yield fleet, directory
    finally:
        directory._context.destroy(linger=0)


@pytest.mark.looks_inside
def test_models_asked_in_turn_each_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    num_made = 0

    def counted(*args: object) -> Places:
        nonlocal num_made
        num_made += 1
        return Places(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(directory_module, "Places", counted)
    with made() as (fleet, directory):
        for _ in range(3):
            for name in MODELS:
                assert directory.lookup(PROMPT, name, fleet.candidates(name)) == {}
        assert num_made == len(MODELS)
        monkeypatch.setattr(directory_module, "_MAX_PLACES", len(MODELS))
        directory.lookup(PROMPT, "d", fleet.candidates("a"))
        assert list(directory._places) == ["b", "c", "d"]


def test_new_candidates_have_places_of_their_own() -> None:
    with made() as (fleet, directory):
        directory.lookup(PROMPT, "a", fleet.candidates("a"))
        (before,) = directory._places.values()
        others = list(fleet.candidates("a"))
        directory.lookup(PROMPT, "a", others)
        (after,) = directory._places.values()
        assert after[0] is others
        assert after[1] is not before[1]
