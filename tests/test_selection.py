"""The platform choice: command line before environment before default, and children follow."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.config import load_config
from xllm_plugin.errors import ConfigError, PlatformError
from xllm_plugin.selection import (
    CONFIG_ENV,
    PLATFORM_ENV,
    Selection,
    is_server_command,
    is_vllm_command,
    select,
)

VLLM = "/usr/bin/vllm"
NATIVE = ("--platform", "native")


def chosen(argv: list[str], environ: dict[str, str] | None = None) -> Selection:
    return select(argv, ["python", *argv], {} if environ is None else environ)


def test_installed_and_nothing_said_means_xllm() -> None:
    selection = chosen([VLLM, "serve", "m"])
    assert selection == Selection("xllm", "the plugin is installed and no flag given")
    assert not selection.is_native


@pytest.mark.parametrize(
    "options", [["--platform=native"], ["--platform", "native"]], ids=["one word", "two words"]
)
def test_the_option_is_read_and_taken_off(options: list[str]) -> None:
    argv = [VLLM, "serve", *options, "m", "--port", "1"]
    environ: dict[str, str] = {}
    selection = chosen(argv, environ)
    assert selection == Selection("native", "--platform native")
    assert selection.is_native
    assert argv == [VLLM, "serve", "m", "--port", "1"]
    assert environ[PLATFORM_ENV] == "native"


def test_the_option_beats_the_environment() -> None:
    environ = {PLATFORM_ENV: "native"}
    assert chosen([VLLM, "serve", "--platform", "xllm"], environ).platform == "xllm"
    assert environ[PLATFORM_ENV] == "xllm"


def test_the_environment_beats_the_default() -> None:
    selection = chosen([VLLM, "serve"], {PLATFORM_ENV: "native"})
    assert selection == Selection("native", "XLLM_PLATFORM=native")


def test_an_empty_variable_is_no_choice() -> None:
    assert chosen([VLLM, "serve"], {PLATFORM_ENV: ""}).platform == "xllm"


def test_the_last_of_several_wins_and_all_are_taken_off() -> None:
    argv = [VLLM, "--platform=native", "serve", "--platform", "native", "m", "--platform=xllm"]
    assert chosen(argv).platform == "xllm"
    assert argv == [VLLM, "serve", "m"]


@pytest.mark.parametrize("option", ["--platform", "--xllm-config"])
@pytest.mark.parametrize("form", ["{}", "{}="])
def test_an_option_without_its_value(option: str, form: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} needs a value, for example {option} xllm"):
        chosen([VLLM, "serve", "m", form.format(option)])


def test_where_to_register_is_a_setting_like_others() -> None:
    argv, environ = [VLLM, "serve", "--register", "http://service:8001", "m"], {}
    assert chosen(argv, environ).platform == "xllm"
    assert argv == [VLLM, "serve", "m"]
    assert load_config(environ=environ).registration.url == "http://service:8001"


def test_a_native_server_cannot_register() -> None:
    for environ in ({}, {PLATFORM_ENV: "native"}):
        argv = [VLLM, "serve", "--register=http://s:1", *(() if environ else NATIVE)]
        with pytest.raises(ConfigError, match="without this plugin cannot register"):
            chosen(argv, environ)


def test_an_unknown_platform_on_the_command_line() -> None:
    with pytest.raises(PlatformError, match="--platform: unknown platform 'cuda'") as caught:
        chosen([VLLM, "serve", "--platform", "cuda"])
    assert "'xllm' and 'native'" in str(caught.value)


def test_an_unknown_platform_in_the_environment() -> None:
    with pytest.raises(PlatformError, match="XLLM_PLATFORM: unknown platform 'XLLM'"):
        chosen(["program.py"], {PLATFORM_ENV: "XLLM"})


def test_the_config_file_is_exported_as_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [VLLM, "serve", "--xllm-config", "x.yaml", "m"]
    environ: dict[str, str] = {}
    chosen(argv, environ)
    assert environ[CONFIG_ENV] == str(tmp_path / "x.yaml")
    assert argv == [VLLM, "serve", "m"]


def test_a_users_own_program_keeps_its_arguments() -> None:
    argv = ["train.py", "--platform", "android", "--xllm-config", "x"]
    environ: dict[str, str] = {}
    assert chosen(argv, environ).platform == "xllm"
    assert argv == ["train.py", "--platform", "android", "--xllm-config", "x"]
    assert CONFIG_ENV not in environ


def test_a_child_inherits_the_choice_and_its_reason() -> None:
    environ: dict[str, str] = {}
    chosen([VLLM, "serve", "--platform=native"], environ)
    inherited = chosen(["-c"], environ)
    assert inherited == Selection("native", "--platform native", inherited=True)


def test_a_reason_of_another_platform_is_stale() -> None:
    environ: dict[str, str] = {}
    chosen([VLLM, "serve", "--platform=native"], environ)
    environ[PLATFORM_ENV] = "xllm"
    assert chosen(["-c"], environ) == Selection("xllm", "XLLM_PLATFORM=xllm")


def test_asking_again_changes_nothing() -> None:
    environ: dict[str, str] = {}
    argv = [VLLM, "serve", "--platform=native", "m"]
    first = chosen(argv, environ)
    exported = dict(environ)
    again = chosen(argv, environ)
    assert (again.platform, again.reason, again.inherited) == ("native", first.reason, True)
    assert environ == exported


@pytest.mark.parametrize(
    ("argv0", "orig_argv", "expected"),
    [
        ("/usr/bin/vllm", ["python", "/usr/bin/vllm", "serve"], True),
        ("xllm", ["python", "xllm", "doctor"], True),
        ("api_server.py", ["python", "-m", "vllm.entrypoints.openai.api_server"], True),
        ("-m", ["python", "-u", "-m", "xllm_plugin.cli", "serve"], True),
        ("x.py", ["python", "-umvllm.entrypoints.cli.main"], True),
        ("x.py", ["python", "-X", "dev", "-Wignore", "-m", "vllm.x"], True),
        ("x.py", ["python", "--check-hash-based-pycs", "always", "-m", "vllm.x"], True),
        ("x.py", ["python", "-m", "vllmtools.serve"], False),
        ("lm_eval", ["python", "/usr/bin/lm_eval", "-m", "vllm"], False),
        ("__main__.py", ["python", "-m", "lm_eval", "-m", "vllm"], False),
        ("-c", ["python", "-c", "import vllm", "-m", "vllm"], False),
        ("-", ["python", "-", "-m", "vllm"], False),
        ("x.py", ["python", "-W"], False),
        ("", ["python"], False),
    ],
)
def test_whose_command_line_it_is(argv0: str, orig_argv: list[str], expected: bool) -> None:
    assert is_vllm_command([argv0], orig_argv) is expected


def is_not_ours(word: str) -> bool:
    return word.partition("=")[0] not in {"--platform", "--xllm-config"}


words = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["--platforms", "--platform-x=1", "-platform", "--xllm", "native", "--", "="]),
).filter(is_not_ours)


@given(st.lists(words, max_size=8))
def test_a_command_line_without_our_options_is_unchanged(arguments: list[str]) -> None:
    argv = [VLLM, *arguments]
    chosen(argv)
    assert argv == [VLLM, *arguments]


@given(st.lists(words, max_size=6), st.data())
def test_our_options_can_stand_anywhere(arguments: list[str], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(arguments)))
    options = data.draw(st.sampled_from([["--platform=native"], ["--platform", "native"]]))
    argv = [VLLM, *arguments[:at], *options, *arguments[at:]]
    assert chosen(argv).is_native
    assert argv == [VLLM, *arguments]


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/bin/vllm", "serve", "m"], ["python", "/bin/vllm", "serve", "m"], True),
        (["vllm", "bench", "serve"], ["python", "/bin/vllm", "bench", "serve"], False),
        (["vllm"], ["python", "/bin/vllm"], False),
        (["mine.py", "serve"], ["python", "mine.py", "serve"], False),
        (
            ["/site/api_server.py", "--model", "m"],
            ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "m"],
            True,
        ),
        (["run.py"], ["python", "-m", "mine.api_server"], False),
    ],
)
def test_which_commands_serve(argv: list[str], orig_argv: list[str], expected: bool) -> None:
    assert is_server_command(argv, orig_argv) is expected
