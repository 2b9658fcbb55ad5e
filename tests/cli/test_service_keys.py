"""`xllm service keys`: what it writes, and what it says when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xllm_plugin.cli.service import service
from xllm_plugin.errors import ConfigError, MisuseError
from xllm_plugin.service.key_file import hash_of, read


def invoke(file: Path, command: str, *arguments: str, stdin: str | None = None) -> Result:
    given = ["keys", command, *arguments, "--file", str(file)]
    return CliRunner().invoke(service, given, input=stdin)


def test_a_key_from_its_making_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "1e5", "--max-concurrency", "4")
    made = invoke(file, "add", "ann", *limits, "--tenant", "team", "--first-priority", "-1")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert "not shown again" in made.stderr
    (one,) = read(file)
    assert one.sha256 == hash_of(key)
    assert key not in file.read_text()
    assert (one.requests_per_minute, one.tokens_per_minute) == (60, 100_000)
    assert (one.max_concurrency, one.tenant, one.first_priority) == (4, "team", -1)
    assert invoke(file, "add", "bob", "--stdin", stdin=f"{key}-another\n").exit_code == 0
    assert read(file)[1].sha256 == hash_of(f"{key}-another")
    listed = invoke(file, "list").output
    assert "team" in listed
    assert one.sha256[:8] not in listed
    assert "is removed" in invoke(file, "remove", "ann").output
    assert [left.name for left in read(file)] == ["bob"]


def test_the_file_may_be_named_as_for_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLLM_SERVICE_KEYS__FILE", str(tmp_path / "keys"))
    assert CliRunner().invoke(service, ["keys", "add", "ann"]).exit_code == 0
    assert len(read(tmp_path / "keys")) == 1


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    invoke(file, "add", "ann")
    for arguments, stdin, error, says in (
        (("add", "ann"), None, MisuseError, "has a key 'ann' already"),
        (("add", "a b"), None, ConfigError, "name='a b'"),
        (("add", "bob", "--max-concurrency", "0"), None, ConfigError, "max_concurrency=0"),
        (("add", "bob", "--stdin"), "short\n", MisuseError, "5 characters; give 20 or more"),
        (("add", "bob", "--stdin"), "with a space in it, long enough\n", MisuseError, "spaces"),
        (("remove", "bob"), None, MisuseError, "it has ann"),
    ):
        failed = invoke(file, *arguments, stdin=stdin)
        assert isinstance(failed.exception, error), failed.output
        assert says in str(failed.exception)
    failed = invoke(tmp_path / "no" / "keys", "add", "ann")
    assert isinstance(failed.exception, ConfigError)
    assert "cannot be written" in str(failed.exception)
    assert len(read(file)) == 1
