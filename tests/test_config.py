"""Settings: four sources, one precedence, and a message that names source and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from xllm_plugin.channel.config import ChannelConfig
from xllm_plugin.config import (
    Setting,
    XllmConfig,
    load_config,
    settings_with_origin,
)
from xllm_plugin.errors import ConfigError

INTERVAL = "channel.snapshot_interval_ms"
INTERVAL_ENV = "XLLM_CHANNEL__SNAPSHOT_INTERVAL_MS"
KNOWN = "channel.enabled, channel.directory, channel.snapshot_interval_ms"


def section(**channel: Any) -> dict[str, Any]:
    return {"xllm": {"channel": channel}}


def config_file(folder: Path, text: str, name: str = "xllm.yaml") -> dict[str, str]:
    """Write a file and return the environment that names it."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return {"XLLM_CONFIG": str(path)}


def origins(additional_config: object, environ: dict[str, str]) -> dict[str, Setting]:
    return {s.name: s for s in settings_with_origin(additional_config, environ)}


def test_defaults() -> None:
    assert load_config(None, {}) == XllmConfig()
    assert all(s.origin == "default" for s in settings_with_origin(None, {}))


def test_precedence_is_decided_leaf_by_leaf_and_each_origin_is_known(tmp_path: Path) -> None:
    environ = config_file(
        tmp_path,
        "channel: {enabled: false, snapshot_interval_ms: 1, instance_id: file, directory: /f}",
    )
    environ |= {INTERVAL_ENV: "2", "XLLM_CHANNEL__INSTANCE_ID": "env"}
    additional_config = section(instance_id="given")
    assert load_config(additional_config, environ).channel == ChannelConfig(
        enabled=False, directory=Path("/f"), snapshot_interval_ms=2, instance_id="given"
    )
    found = origins(additional_config, environ)
    assert found["channel.instance_id"] == Setting(
        "channel.instance_id", "given", "additional_config['xllm']"
    )
    assert found[INTERVAL] == Setting(INTERVAL, 2.0, "environment")
    assert found["channel.enabled"] == Setting("channel.enabled", False, environ["XLLM_CONFIG"])


def test_the_environment_read_is_the_process_s_own_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(INTERVAL_ENV, "7")
    assert load_config().channel.snapshot_interval_ms == 7


def test_values_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        XllmConfig().channel = ChannelConfig()


@pytest.mark.parametrize(("text", "value"), [("0", False), ("true", True), ("off", False)])
def test_booleans_from_the_environment(text: str, value: bool) -> None:
    environ = {"XLLM_CHANNEL__ENABLED": text}
    assert load_config(None, environ).channel.enabled is value


def test_floats_and_texts_from_the_environment() -> None:
    environ = {INTERVAL_ENV: "2.5e1", "XLLM_CHANNEL__INSTANCE_ID": "12"}
    channel = load_config(None, environ).channel
    assert (channel.snapshot_interval_ms, channel.instance_id) == (25.0, "12")


def test_a_section_as_json_in_the_environment() -> None:
    environ = {"XLLM_CHANNEL": '{"enabled": false}', INTERVAL_ENV: "3"}
    channel = load_config(None, environ).channel
    assert (channel.enabled, channel.snapshot_interval_ms) == (False, 3)


def test_an_empty_variable_is_not_set() -> None:
    assert load_config(None, {INTERVAL_ENV: "", "XLLM_CONFIG": ""}) == XllmConfig()


def test_variables_of_other_parts_and_programs_are_none_of_ours() -> None:
    environ = {
        "XLLM_PLATFORM": "xllm",
        "XLLM_PLATFORM_REASON": "xllm: because",
        "XLLM_DEVICE": "cpu",
        "XLLM_LOAD_PLUGINS": "",
        "XLLM_TRACEBACK": "1",
        "XLLM_CACHE_DIR": "/c",
        "PATH": "/bin",
    }
    assert load_config(None, environ) == XllmConfig()


@pytest.mark.parametrize("name", ["XLLM_CHANEL__ENABLED", "XLLM_CHANNELS", "XLLM_PLATFROM"])
def test_an_unknown_variable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"environment: {name} is not a variable") as caught:
        load_config(None, {name: "1"})
    assert INTERVAL_ENV in str(caught.value)
    assert "XLLM_PLATFORM_REASON" not in str(caught.value)


def test_variables_that_others_make_pass() -> None:
    """Kubernetes adds these to every pod beside a Service called xllm."""
    environ = {"XLLM_SERVICE_HOST": "10.0.0.1", "XLLM_PORT_8000_TCP": "tcp://10.0.0.1:8000"}
    assert load_config(None, environ) == XllmConfig()


def test_an_unknown_setting_in_the_environment() -> None:
    with pytest.raises(ConfigError, match="environment: unknown setting") as caught:
        load_config(None, {"XLLM_CHANNEL__BOGUS": "1"})
    assert "'channel.bogus'" in str(caught.value)
    assert KNOWN in str(caught.value)


def test_an_unknown_setting_in_the_file(tmp_path: Path) -> None:
    environ = config_file(tmp_path, "chanel: {}")
    with pytest.raises(ConfigError, match=r"xllm\.yaml: unknown setting 'chanel'") as caught:
        load_config(None, environ)
    assert KNOWN in str(caught.value)


def test_an_unknown_setting_in_additional_config() -> None:
    with pytest.raises(
        ConfigError, match=r"additional_config\['xllm'\]: unknown setting"
    ) as caught:
        load_config(section(bogus=1), {})
    assert "'channel.bogus'" in str(caught.value)
    assert KNOWN in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({INTERVAL_ENV: "-1"}, f"environment: {INTERVAL}='-1': .*greater than or equal to 0"),
        ({INTERVAL_ENV: "fast"}, f"environment: {INTERVAL}='fast': .*valid number"),
        ({"XLLM_CHANNEL__ENABLED": "maybe"}, "channel.enabled='maybe': .*valid boolean"),
        ({"XLLM_CHANNEL__INSTANCE_ID": "../x"}, r"channel.instance_id='\.\./x': "),
        ({"XLLM_CHANNEL": "not json"}, "environment: .*channel"),
    ],
)
def test_a_bad_value_in_the_environment(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, environ)


def test_a_bad_value_in_a_lower_source_is_reported_though_it_is_overridden() -> None:
    with pytest.raises(ConfigError, match="environment"):
        load_config(section(snapshot_interval_ms=5), {INTERVAL_ENV: "-1"})


@pytest.mark.parametrize(
    "registration",
    [
        {"url": "ftp://a", "token": "hush"},
        {"token": ["hush"]},
        {"etcd": {"password": "hush"}},
        {"etcd": {"user": "root", "password": ["hush"]}},
    ],
)
def test_a_secret_is_never_in_a_message(registration: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="registration") as caught:
        load_config({"xllm": {"registration": registration}}, environ={})
    assert "hush" not in str(caught.value)


def test_a_value_out_of_range_in_additional_config() -> None:
    with pytest.raises(ConfigError, match=rf"additional_config\['xllm'\]: {INTERVAL}=-3"):
        load_config(section(snapshot_interval_ms=-3), {})


@pytest.mark.parametrize("value", [None, 3, "channel", [1]])
def test_a_section_that_is_no_object(value: object) -> None:
    with pytest.raises(ConfigError, match="it has to be an object"):
        load_config({"xllm": value}, {})


def test_settings_named_by_something_else_than_text() -> None:
    with pytest.raises(ConfigError, match="settings are named by text"):
        load_config({"xllm": {1: 2}}, {})


@pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, [1], object()])
def test_additional_config_without_our_section(additional_config: object) -> None:
    assert load_config(additional_config, {}) == XllmConfig()


def test_a_json_file(tmp_path: Path) -> None:
    environ = config_file(tmp_path, json.dumps({"channel": {"enabled": False}}), "xllm.json")
    assert load_config(None, environ).channel.enabled is False


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert load_config(None, config_file(tmp_path, text)) == XllmConfig()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("channel: [unclosed", id="syntax"),
        pytest.param("a: b: c", id="two colons"),
        pytest.param("channel: \x00", id="control character"),
        pytest.param("channel: 2026-13-45", id="no date"),
        pytest.param("!!python/object:os.system {}", id="tag"),
    ],
)
def test_a_file_that_is_not_yaml(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"--xllm-config .*xllm.yaml: is neither YAML nor JSON"):
        load_config(None, config_file(tmp_path, text))


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("hello", "str"), ("3", "int")])
def test_a_file_that_holds_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"holds {kind}, not a mapping"):
        load_config(None, config_file(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read .*No such file"):
        load_config(None, {"XLLM_CONFIG": str(tmp_path / "absent.yaml")})
    with pytest.raises(ConfigError, match=r"cannot be read .*Is a directory"):
        load_config(None, {"XLLM_CONFIG": str(tmp_path)})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary: cannot be read .*utf-8"):
        load_config(None, {"XLLM_CONFIG": str(tmp_path / "binary")})


def test_settings_of_the_service_are_its_own() -> None:
    """A pod may run both; the engine's side reads none of the service's and refuses none."""
    environ = {"XLLM_SERVICE_LISTEN__PORT": "1", "XLLM_SERVICE_ADMIN__TOKEN": "t"}
    assert load_config(environ=environ) == load_config(environ={})
