"""A torchaudio of another build looks for its library where none is; a fitting one is left."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.shims.loader import OneModuleFinder
from xllm_plugin.shims.torchaudio import MODULE, NOWHERE, install, is_in_force

UTILS = "from pathlib import Path\n_LIB_DIR = Path(__file__).parent / 'lib'\n"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if not isinstance(finder, OneModuleFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)


def add_torchaudio(site: Any, library: bytes | None) -> Path:
    """Lay out a torchaudio as far as the shim sees it; returns the folder of its library."""
    site.add_module(MODULE, UTILS)
    folder: Path = site.folder / "torchaudio" / "_extension" / "lib"
    folder.mkdir()
    if library is not None:
        (folder / "_torchaudio.abi3.so").write_bytes(library)
    return folder


def test_a_library_that_does_not_load_is_sent_nowhere(site_here: Any) -> None:
    pytest.importorskip("torch")
    add_torchaudio(site_here, b"built for another torch")
    install()
    assert importlib.import_module(MODULE)._LIB_DIR == NOWHERE
    assert is_in_force()
    assert not NOWHERE.exists()


def test_without_a_library_nothing_is_redirected(site_here: Any) -> None:
    pytest.importorskip("torch")
    folder = add_torchaudio(site_here, None)
    install()
    utils = importlib.import_module(MODULE)
    assert folder == utils._LIB_DIR
    assert not is_in_force()
