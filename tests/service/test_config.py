"""Settings: where they come from, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.config import load


def test_flags_beat_variables_beat_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("listen: {port: 1, backlog: 5}\ninstances: {static: ['http://a:1']}\n")
    monkeypatch.setenv("XLLM_SERVICE_LISTEN__PORT", "2")
    monkeypatch.setenv("XLLM_SERVICE_LISTEN__HOST", "::1")
    config = load({"listen": {"host": "127.0.0.1"}}, file)
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 2)
    assert config.listen.backlog == 5
    assert config.instances.static[0].name == "a:1"


def test_what_kubernetes_sets_beside_a_service_called_xllm_is_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XLLM_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("XLLM_SERVICE_PORT", "80")
    monkeypatch.setenv("XLLM_SERVICE_PORT_HTTP", "80")
    assert load({}, None).listen.port == 8000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"listen": {"prt": 1}}, "unknown setting 'listen.prt'"),
        ({"listne": {}}, "unknown setting 'listne'"),
        ({"listen": {"port": 70000}}, "listen.port=70000"),
        ({"listen": {"ssl_cert_reqs": 2}}, "give ssl_ca_certs"),
        ({"instances": {"static": ["ftp://a"]}}, "write http://host:port"),
        ({"instances": {"static": ["http://a/v1"]}}, "only scheme, host and port"),
        ({"instances": {"static": ["http://a:x"]}}, "http://a:x"),
        (
            {"instances": {"api_key": "hush\n"}},
            "instances.api_key: Value error, it has a line break",
        ),
        ({"routing": {"session_header": "x-\u4f1a"}}, "routing.session_header='x-\u4f1a'"),
        ({"instances": {"static": ["http://a:1", "http://a:1"]}}, "two instances are named a:1"),
    ],
)
def test_wrong_settings_are_named(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match="settings of the service") as caught:
        load(flags, None)
    assert says in str(caught.value)


def test_a_secret_is_never_in_a_message() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"admin": {"token": ["hush"]}, "instances": {"api_key": {"a": "hush"}}}, None)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match="user and password are given together") as caught:
        load({"etcd": {"url": "etcd://a", "password": "hush"}}, None)
    assert "hush" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load({}, tmp_path / "absent.yaml")
    file = tmp_path / "service.yaml"
    for text in ("listen: [", "- a\n- b\n", "text"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="settings of the service"):
            load({}, file)
