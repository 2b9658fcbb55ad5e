"""The exception tree: one root, an exit code for each branch, drawn as it is."""

from __future__ import annotations

import re

import pytest

from xllm_plugin import errors
from xllm_plugin.errors import XllmError

EXIT_CODES = {
    "XllmError": 1,
    "MisuseError": 2,
    "ConfigError": 2,
    "PlatformError": 2,
    "ModelError": 2,
    "PromiseError": 2,
    "NotNowError": 75,
    "DownloadError": 75,
    "ChannelError": 75,
    "EtcdError": 75,
    "PagesExhaustedError": 75,
    "InternalError": 70,
    "SeamError": 70,
}


def test_every_public_error_is_listed_here() -> None:
    assert set(errors.__all__) == set(EXIT_CODES)
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("name", EXIT_CODES)
def test_each_has_one_root_and_its_exit_code(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, XllmError)
    assert error.exit_code == EXIT_CODES[name]
    assert str(error("text")) == "text"


def test_the_tree_is_drawn_as_it_is() -> None:
    parents: dict[int, str] = {}
    for indent, name in re.findall(r"^( +)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE):
        parent = parents.get(len(indent) - 2)
        assert parent is None or getattr(errors, name).__base__ is getattr(errors, parent)
        parents[len(indent)] = name
        EXIT_CODES[name]
    assert set(parents.values()) <= set(EXIT_CODES)
