"""Addresses and options of etcd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from xllm_plugin.errors import ConfigError
from xllm_plugin.etcd.config import EtcdAccess, EtcdConfig, parse_url, tls_context


@pytest.mark.parametrize(
    ("url", "endpoints", "prefix"),
    [
        ("etcd://a", ("http://a:2379",), "/xllm"),
        ("etcd://a:1,b:2/", ("http://a:1", "http://b:2"), "/xllm"),
        ("etcds://a, b/fleets/one/", ("https://a:2379", "https://b:2379"), "/fleets/one"),
        ("etcd://[::1]:9,10.0.0.1", ("http://[::1]:9", "http://10.0.0.1:2379"), "/xllm"),
    ],
)
def test_addresses(url: str, endpoints: tuple[str, ...], prefix: str) -> None:
    address = parse_url(url)
    assert (address.endpoints, address.prefix) == (endpoints, prefix)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://a:2379", "write etcd://host:2379"),
        ("etcd://", "write etcd://host:2379"),
        ("etcd:///x", "write etcd://host:2379"),
        ("etcd://a,,b", "'' is no host"),
        ("etcd://a:port", "a:port"),
        ("etcd://root:hush@a", "set `etcd.user` and `etcd.password`"),
        ("http://root:hush@a", "set `etcd.user` and `etcd.password`"),
    ],
)
def test_what_is_no_address(url: str, says: str) -> None:
    with pytest.raises(ValueError, match="etcd") as caught:
        parse_url(url)
    assert says in str(caught.value)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cert": "c.pem"}, "cert and key are given together"),
        ({"user": "root"}, "user and password are given together"),
        ({"password": "hush"}, "user and password are given together"),
        ({"user": "root:x", "password": "y"}, "only the name"),
        ({"url": "redis://a"}, "write etcd://host:2379"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EtcdConfig(**options)


def test_tls_files_that_cannot_be_read(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for access in (
        EtcdAccess(cacert=tmp_path / "absent.pem"),
        EtcdAccess(cacert=nonsense),
        EtcdAccess(cert=nonsense, key=nonsense),
    ):
        with pytest.raises(ConfigError, match="--cacert, --cert and --key"):
            tls_context(access)
