"""The service's README: every setting with its default, every policy and state.

Metrics: test_metrics.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import xllm_plugin.service
from xllm_plugin.cli.service import _flags
from xllm_plugin.plugins import build_manager, routing_policies
from xllm_plugin.service.config import ServiceConfig, load
from xllm_plugin.service.lifecycle import State

README = (Path(xllm_plugin.service.__file__).parent / "README.md").read_text()


def rows() -> list[str]:
    """The table of settings, as it has to be."""
    found = []
    for section, field in ServiceConfig.model_fields.items():
        model: Any = field.annotation
        assert issubclass(model, BaseModel)
        for name, setting in model.model_fields.items():
            default = "none" if setting.default in (None, ()) else setting.default
            found.append(f"| `{section}.{name}` | {default} | {setting.description or ''} |")
    return found


def test_every_setting_is_there_with_its_default() -> None:
    for row in rows():
        assert row in README, f"{row}\n\nthe whole table:\n" + "\n".join(rows())


def test_the_example_of_a_file_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    file = tmp_path / "service.yaml"
    file.write_text(example)
    names = [one.name for one in load({}, file).instances.static]
    assert names == ["gpu1:8000", "large"]
    ((name, value),) = re.findall(r"`(XLLM_SERVICE_INSTANCES__STATIC)='([^']*)'`", README)
    monkeypatch.setenv(name, value)
    assert [one.name for one in load({}, None).instances.static] == ["gpu1:8000"]
    (flag,) = re.findall(r"--set (keys\.file=\S+)", README)
    assert _flags({}, (flag,)) == {"keys": {"file": "keys.yaml"}}


def test_every_policy_and_state_is_there() -> None:
    for name in (*routing_policies(build_manager("")), *State):
        assert f"`{name}`" in README or f"| {name} |" in README
