"""The collector rests while a server imports, and only then."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from xllm_plugin.collection import ImportPause


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The collector as it was, whatever a test does."""
    yield
    gc.unfreeze()
    gc.enable()


def test_it_rests_until_the_end_and_what_is_there_is_not_looked_at_again() -> None:
    pause = ImportPause()
    pause.begin()
    pause.begin()
    assert not gc.isenabled()
    frozen = gc.get_freeze_count()
    pause.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


def test_an_end_without_a_beginning_changes_nothing() -> None:
    frozen = gc.get_freeze_count()
    ImportPause().end()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_program_that_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    pause = ImportPause()
    pause.begin()
    pause.end()
    assert not gc.isenabled()
