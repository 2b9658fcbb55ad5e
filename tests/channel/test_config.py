"""The channel's settings."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from xllm_plugin.channel import ChannelConfig


def test_defaults_leave_the_channel_on_and_the_id_to_vllm() -> None:
    config = ChannelConfig()
    assert config.enabled
    assert config.resolve_instance_id("a1b2c") == "a1b2c"
    assert ChannelConfig(instance_id="mine").resolve_instance_id("a1b2c") == "mine"


@pytest.mark.parametrize(
    "wrong",
    [
        {"instance_id": "../up"},
        {"instance_id": ".hidden"},
        {"instance_id": "x" * 41},
        {"snapshot_interval_ms": -1},
        {"colour": "red"},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ChannelConfig.model_validate(wrong)


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in ChannelConfig.model_fields.values())
