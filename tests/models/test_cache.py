"""Where the cache lies, how folders appear in it, and who waits for whom."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.errors import ModelError
from xllm_plugin.models.cache import ModelCache


def test_place_follows_the_environment() -> None:
    env = {"XLLM_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b"}
    assert ModelCache.at("/c", env).root == Path("/c")
    assert ModelCache.at(None, env).root == Path("/a")
    assert ModelCache.at(None, {"XDG_CACHE_HOME": "/b"}).root == Path("/b/xllm")
    assert ModelCache.at(None, {}).root == Path.home() / ".cache" / "xllm"


def test_finished_build_replaces_the_old_folder(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    for content in ("old", "new"):
        with cache.building("m") as folder:
            (folder / "file").write_text(content)
            assert not (cache.model("m") / "file").exists() or content == "new"
    assert (cache.model("m") / "file").read_text() == "new"
    assert [path.name for path in cache.model("m").parent.iterdir()] == ["m"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, SystemExit])
def test_interrupted_build_leaves_the_old_folder_and_nothing_else(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    cache = ModelCache(tmp_path)
    with cache.building("m") as folder:
        (folder / "file").write_text("old")

    def broken_build() -> None:
        with cache.building("m") as folder:
            (folder / "file").write_text("half")
            raise interruption

    with pytest.raises(interruption):
        broken_build()
    assert (cache.model("m") / "file").read_text() == "old"
    assert [path.name for path in cache.model("m").parent.iterdir()] == ["m"]


def test_rest_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    leftover = tmp_path / "models" / ".m.0123abcd"
    leftover.mkdir(parents=True)
    other = tmp_path / "models" / ".m-two.0123abcd"
    other.mkdir()
    with cache.building("m"):
        assert not leftover.exists()
    assert other.exists()


def test_second_holder_says_that_it_waits(tmp_path: Path, make_reporter: Any) -> None:
    waits = threading.Event()
    waiting = make_reporter(on_say=lambda _: waits.set())
    order: list[str] = []

    def second() -> None:
        with ModelCache(tmp_path).lock("m", waiting):
            order.append("second")

    thread = threading.Thread(target=second)
    with ModelCache(tmp_path).lock("m", make_reporter()):
        thread.start()
        assert waits.wait(timeout=60)
        order.append("first")
    thread.join(timeout=60)
    assert order == ["first", "second"]
    assert "another process is preparing m" in waiting.text


def test_unwritable_cache_names_the_way_out(tmp_path: Path, reporter: Any) -> None:
    (tmp_path / "file").write_text("")
    cache = ModelCache(tmp_path / "file")
    with pytest.raises(ModelError, match="--cache-dir"), cache.lock("m", reporter):
        pass
