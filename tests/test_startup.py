"""What is checked before vLLM runs on us."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.errors import PlatformError
from xllm_plugin.startup import check_vllm_version, other_platforms, resolve, vllm_version

GROUP = "vllm.platform_plugins"


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    shims.install()
    for name in ("VLLM_PLUGINS", "XLLM_DEVICE", "XLLM_LOAD_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.0+cpu", "0.32.7.dev1", "0.32.1rc2"])
def test_supported_versions(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "1.32.0", "0.3.2", "0.320.0", ""])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(PlatformError, match=f"vLLM {version} is installed") as caught:
        check_vllm_version(version)
    assert "supports 0.32.x" in str(caught.value)
    assert "--platform native" in str(caught.value)


def test_without_vllm() -> None:
    with pytest.raises(
        PlatformError, match=r"not installed here.*pip install 'xllm-plugin\[cpu\]'"
    ):
        check_vllm_version(None)


def test_the_version_is_that_of_the_first_distribution_on_the_path(site_here: Any) -> None:
    site_here.add_distribution("vllm", "0.31.0")
    assert vllm_version() == "0.31.0"
    with pytest.raises(PlatformError, match=r"vLLM 0\.31\.0 is installed"):
        resolve()


def add_rival(site: Any, name: str, source: str) -> None:
    module = f"{name}_rival"
    site.add_module(module, source)
    site.add_distribution(f"{name}-dist", entry_points={GROUP: {name: f"{module}:platform"}})


def test_we_are_no_rival_of_ourselves() -> None:
    assert other_platforms() == ()


def test_only_an_active_platform_is_a_rival(site_here: Any) -> None:
    add_rival(site_here, "asleep", "def platform(): return None")
    add_rival(site_here, "broken", "def platform(): raise OSError('no driver')")
    add_rival(site_here, "unimportable", "import no_such_library")
    add_rival(site_here, "awake", "def platform(): return 'awake.Platform'")
    assert other_platforms() == ("awake",)
    with pytest.raises(PlatformError, match="'awake' would be active beside 'xllm'") as caught:
        resolve()
    assert "VLLM_PLUGINS=xllm" in str(caught.value)
    assert "--platform native for 'awake'" in str(caught.value)


@pytest.mark.parametrize(
    ("allowed", "rivals"),
    [("xllm,awake", ("awake",)), ("xllm", ()), ("", ()), ("xllm, awake", ())],
    ids=["both", "ours", "none", "vLLM strips no blanks"],
)
def test_vllm_s_own_list_of_plugins_counts(
    site_here: Any, monkeypatch: pytest.MonkeyPatch, allowed: str, rivals: tuple[str, ...]
) -> None:
    add_rival(site_here, "awake", "def platform(): return 'awake.Platform'")
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert other_platforms() == rivals


def test_an_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_DEVICE", "abacus")
    with pytest.raises(PlatformError, match="XLLM_DEVICE=abacus: no such device family"):
        resolve()


def test_an_empty_device_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_DEVICE", "")
    assert "first usable of" in resolve().reason


def test_the_named_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_DEVICE", "cpu")
    choice = resolve()
    assert (choice.family.name, choice.reason) == ("cpu", "XLLM_DEVICE=cpu")
