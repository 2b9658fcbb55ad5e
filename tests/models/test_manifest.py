"""What is noticed about a changed model folder, and what is not."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from xllm_plugin.models.catalog import CATALOG
from xllm_plugin.models.manifest import FILE_NAME, Manifest, damage

RECIPE = CATALOG["tiny-llama"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "weights").write_bytes(b"0123456789")
    (made / "config.json").write_text("{}")
    Manifest.of_folder(made, RECIPE).write(made)
    return made


def test_untouched_folder_is_sound(folder: Path) -> None:
    assert damage(folder, RECIPE) is None
    assert damage(folder, RECIPE, verify=True) is None


def test_missing_file(folder: Path) -> None:
    (folder / "weights").unlink()
    assert damage(folder, RECIPE) == "weights is missing"


def test_cut_file(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123")
    assert damage(folder, RECIPE) == "weights has 4 bytes, not 10"


def test_changed_file_of_the_same_size(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0123456780")
    assert "weights has changed" in str(damage(folder, RECIPE))


def test_change_with_the_time_put_back_is_found_by_verify(folder: Path) -> None:
    before = (folder / "weights").stat()
    (folder / "weights").write_bytes(b"0123456780")
    os.utime(folder / "weights", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert damage(folder, RECIPE) is None
    assert "weights has changed" in str(damage(folder, RECIPE, verify=True))


def test_copy_with_other_times_is_sound(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert damage(copied, RECIPE) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99}', '{"format": 1}'])
def test_unreadable_manifest(folder: Path, content: str) -> None:
    (folder / FILE_NAME).write_text(content)
    assert FILE_NAME in str(damage(folder, RECIPE))


def test_other_version_of_the_recipe(folder: Path) -> None:
    assert "recipe" in str(damage(folder, replace(RECIPE, version=RECIPE.version + 1)))


def test_other_sources(folder: Path) -> None:
    assert "sources" in str(damage(folder, replace(RECIPE, requires=())))
