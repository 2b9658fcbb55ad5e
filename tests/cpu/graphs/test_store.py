"""Graphs on disk: whole, or made again."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from xllm_plugin.cpu.graphs.store import GraphStore, Manifest, StoredGraph

FACTS = {"vllm": "0.32.0", "config": "abc"}


def keep(store: GraphStore, facts: dict[str, str] = FACTS) -> StoredGraph:
    building = store.begin(store.key(facts))
    (building / "model").write_bytes(b"function")
    (building / "inductor" / "ab").mkdir(parents=True)
    (building / "inductor" / "ab" / "kernel.so").write_bytes(b"code")
    (building / "inductor" / "ab" / "kernel.lock").write_bytes(b"")
    manifest = Manifest(facts, {}, "model", [["int"]], wall_s=1.0, cpu_s=0.5, peak_bytes=10)
    return store.finish(building, manifest)


@pytest.fixture
def store(tmp_path: Path) -> GraphStore:
    return GraphStore(tmp_path / "graphs")


def test_what_was_kept_is_found(store: GraphStore) -> None:
    assert store.find(FACTS) is None
    kept = keep(store)
    assert store.find(FACTS) == kept
    assert sorted(kept.manifest.files) == ["inductor/ab/kernel.so", "model"]
    assert store.find(FACTS | {"config": "other"}) is None


def test_files_that_come_later_do_not_matter(store: GraphStore) -> None:
    kept = keep(store)
    (kept.folder / "inductor" / "locks").mkdir()
    assert store.find(FACTS) == kept


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model").write_bytes(b"functioN"), "model is damaged"),
        (lambda f: (f / "inductor/ab/kernel.so").unlink(), "kernel.so is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest cannot be read"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest cannot be read"),
    ],
)
def test_damage_is_reported_and_removed(
    store: GraphStore, damage: object, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keep(store).folder
    assert callable(damage)
    damage(folder)
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        assert store.find(FACTS) is None
    assert message in caplog.text
    assert not folder.exists()
    keep(store)
    assert store.find(FACTS) is not None


def test_a_graph_of_something_else_is_foreign(
    store: GraphStore, caplog: pytest.LogCaptureFixture
) -> None:
    folder = keep(store).folder
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("abc", "abd"))
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        assert store.find(FACTS) is None
    assert "made for something else" in caplog.text


def test_a_manifest_without_the_function_is_no_graph(store: GraphStore) -> None:
    folder = keep(store).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    assert store.find(FACTS) is None


def test_one_process_builds_at_a_time(store: GraphStore) -> None:
    entered = threading.Event()

    def second() -> None:
        with store.lock("key"):
            entered.set()

    with store.lock("key"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.05)
    thread.join()
    assert entered.is_set()


def test_what_a_killed_process_left_goes(store: GraphStore) -> None:
    left = store.begin("key")
    other = store.begin("other")
    assert store.begin("key") != left
    assert not left.exists()
    assert other.exists()
