"""Known mistakes met inside vLLM become one message; everything else stays what it was."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from xllm_plugin.cli.explain import explain, install
from xllm_plugin.errors import ConfigError, MisuseError, ModelError, NotNowError, XllmError

SERVE = ["vllm", "serve", "some/model"]


def chained(*errors: BaseException, implicitly: bool = False) -> BaseException:
    """The first error, caused by the second, caused by the third..."""
    for error, cause in itertools.pairwise(errors):
        if implicitly:
            error.__context__ = cause
        else:
            error.__cause__ = cause
    return errors[0]


def bind_twice() -> OSError:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="in use") as caught:
            second.bind(first.getsockname())
        return caught.value


def test_an_error_of_ours_is_shown_whatever_is_around_it() -> None:
    ours = ConfigError("channel.enabled=3")
    assert explain(ours, SERVE) is ours
    assert explain(chained(RuntimeError("engine"), ValueError("x"), ours), SERVE) is ours
    assert explain(chained(RuntimeError("engine"), ours, implicitly=True), SERVE) is ours


@pytest.mark.parametrize(
    ("arguments", "port"),
    [
        ([], "8000"),
        (["--port", "81"], "81"),
        (["--port=82"], "82"),
        (["--port", "81", "--port=82"], "82"),
        (["--port"], "8000"),
    ],
)
def test_a_port_in_use(arguments: list[str], port: str) -> None:
    for error in (bind_twice(), OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))):
        known = explain(chained(RuntimeError("start"), error), [*SERVE, *arguments])
        assert known is not None
        assert str(known).startswith(f"port {port} is in use by another program.")
        assert "--port" in str(known)
        assert known.exit_code == 1


def test_a_port_of_a_config_file_is_not_guessed() -> None:
    known = explain(bind_twice(), [*SERVE, "--config", "serve.yaml"])
    assert str(known).startswith("the port that --config names (8000 if it names none) is in use")


@pytest.mark.parametrize(
    "message",
    [
        "some/model is not a local folder and is not a valid model identifier listed on 'hub'",
        "Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'some/model'.",
        "1 error\n  Value error, Invalid repository ID or local directory specified: 'some/model'",
    ],
)
@pytest.mark.parametrize(
    "argv",
    [
        SERVE,
        ["vllm", "serve", "--model", "some/model"],
        ["api_server.py", "--port", "1", "--model=some/model"],
    ],
)
def test_a_model_that_is_not_there(message: str, argv: list[str]) -> None:
    known = explain(chained(RuntimeError("config"), OSError(message)), argv)
    assert isinstance(known, ModelError)
    assert "model 'some/model': not a folder on this machine" in str(known)
    assert "xllm model" in str(known)


OFFLINE = (
    "Cannot find an appropriate cached snapshot folder for the specified revision on the local "
    "disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, "
    "pass 'local_files_only=False' as input."
)
NO_NETWORK = (
    "We couldn't connect to 'https://hub' to load the files, and couldn't find them in the cached "
    "files."
)


@pytest.mark.parametrize("message", [OFFLINE, NO_NETWORK])
def test_a_hub_out_of_reach_means_the_model_unless_that_one_is_here(
    message: str, tmp_path: Path
) -> None:
    error = chained(RuntimeError("config"), OSError(message))
    known = explain(error, SERVE)
    assert isinstance(known, ModelError)
    assert str(known).startswith("model 'some/model': not a folder on this machine")
    assert isinstance(explain(error, ["vllm", "serve", "some/very/long"]), ModelError)
    assert explain(error, ["vllm", "serve", str(tmp_path)]) is None


def test_a_hub_out_of_reach_is_no_reason_to_blame_a_cached_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    assert explain(OSError(OFFLINE), SERVE) is None


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    reason = f"{tmp_path} does not appear to have a file named config.json."
    error = ValueError(f"Invalid model.\n  {reason}\nSee the documentation.")
    known = explain(error, ["vllm", "serve", str(tmp_path)])
    assert isinstance(known, ModelError)
    assert "the folder is there but is not a Hugging Face model folder" in str(known)
    assert reason in str(known)


def test_the_reason_may_be_further_down_the_chain(tmp_path: Path) -> None:
    reason = f"Can't load the configuration of '{tmp_path}'."
    error = chained(RuntimeError("engine failed"), OSError(reason))
    known = explain(error, ["vllm", "serve", str(tmp_path)])
    assert reason in str(known)


def test_something_else_that_is_missing_is_not_blamed_on_the_model() -> None:
    error = ValueError(
        "Value error, Can't load the configuration of '/bad/tokenizer'. "
        "[type=value_error, input_value=ArgsKwargs((), {'model': 'some/model'})]"
    )
    assert explain(error, SERVE) is None


def test_a_port_of_another_command_is_not_the_server_s() -> None:
    assert explain(bind_twice(), ["vllm", "bench", "latency"]) is None


# vLLM's words.
ENDED = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.mark.parametrize(
    ("codes", "kind"), [({"EngineCore": 2}, MisuseError), ({"EngineCore_DP0": 75}, NotNowError)]
)
def test_an_engine_that_has_said_what_was_wrong_is_not_said_to_be_a_bug(
    codes: dict[str, int], kind: type[XllmError]
) -> None:
    known = explain(RuntimeError(ENDED.format(codes)), SERVE)
    assert type(known) is kind
    assert "its own message is above" in str(known)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        RuntimeError(ENDED.format({"EngineCore": 1})),
        RuntimeError(ENDED.format({"EngineCore_DP0": 2, "EngineCore_DP1": -9})),
        RuntimeError(ENDED.format({})),
        ValueError(ENDED.format({"EngineCore": 2})),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("is not what it was"),
        chained(RuntimeError("outer"), ZeroDivisionError("inner")),
    ],
)
def test_anything_else_may_be_a_bug(error: BaseException) -> None:
    assert explain(error, SERVE) is None


@pytest.mark.parametrize(
    "argv", [["vllm"], ["vllm", "serve"], ["vllm", "serve", "--port", "1"], []]
)
def test_without_a_model_on_the_command_line_none_is_blamed(argv: list[str]) -> None:
    assert explain(OSError("x is not a local folder"), argv) is None


def test_a_chain_in_a_ring_ends() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__context__ = second
    second.__context__ = first
    assert explain(first, SERVE) is None


def test_a_hook_of_the_program_s_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: Any) -> None: ...

    monkeypatch.setattr(sys, "excepthook", own)
    install()
    assert sys.excepthook is own


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("XLLM_TRACEBACK", "1")
    install()
    assert sys.excepthook is sys.__excepthook__


def test_a_known_mistake_ends_the_process_with_its_message_and_code(run_python: Any) -> None:
    done = run_python(
        "-c",
        "from xllm_plugin.cli.explain import install; from xllm_plugin.errors import ConfigError;"
        "install(); install(); print('so far'); raise ConfigError('x=3; give 4')",
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "so far\n", "xllm: x=3; give 4\n")


def test_an_unknown_error_keeps_its_traceback(run_python: Any) -> None:
    done = run_python("-c", "from xllm_plugin.cli.explain import install; install(); {}['x']")
    assert done.returncode == 1
    assert "KeyError: 'x'" in done.stderr
    assert "Traceback" in done.stderr


def test_exit_code_of_the_root() -> None:
    assert XllmError.exit_code == 1
