"""User mistakes met inside vLLM, as one message without a traceback.

vLLM reports some mistakes (a port in use, a path that is no model) as whatever exception came up.
For its commands an exception hook turns those that are known into a message with the next step.
Everything else keeps its traceback: it may be a bug.  ``XLLM_TRACEBACK=1`` shows all of them.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from xllm_plugin.errors import InternalError, MisuseError, ModelError, NotNowError, XllmError

__all__ = ["explain", "install"]


def install() -> None:
    """Set `sys.excepthook`, unless the program has one of its own.  Safe to repeat."""
    if sys.excepthook is sys.__excepthook__ and not os.environ.get("XLLM_TRACEBACK"):
        sys.excepthook = _hook


def _hook(
    exc_type: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    known = explain(error, sys.argv)
    if known is None:
        sys.__excepthook__(exc_type, error, traceback)
        return
    # A hook may end the program so; Python takes the exit code and runs the exit handlers.
    known.stop()


def explain(error: BaseException, argv: list[str]) -> XllmError | None:
    """Find the known mistake in an exception or what caused it.

    Returns:
        The error to show, or None when this exception is not a known mistake.
    """
    for cause in _chain(error):
        if isinstance(cause, XllmError):
            return cause
        if (ended := _engine_ended(cause)) is not None:
            return ended
        if _is_server(argv) and isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            return _port_in_use(argv)
    model = _model_argument(argv)
    if model is None:
        return None
    reason = _reason(error, model)
    if reason is None and not (_hub_is_out_of_reach(error) and _is_absent(model)):
        return None
    return _not_a_model(model, reason)


def _is_server(argv: list[str]) -> bool:
    return argv[1:2] == ["serve"] or "api_server" in "".join(argv[:1])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _option(argv: list[str], name: str) -> str | None:
    """Return the value of an option; of several the last, as argparse does."""
    found = None
    for index, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key == name:
            found = value if equals else next(iter(argv[index + 1 :]), None)
    return found


_ENGINE_ENDED = re.compile(
    r"Engine core initialization failed\..*Failed core proc\(s\): (\{[^}]*\})", re.DOTALL
)
_KINDS = {kind.exit_code: kind for kind in (MisuseError, NotNowError, InternalError)}


def _engine_ended(error: BaseException) -> XllmError | None:
    """An engine's process that has said what was wrong and ended with the exit code of ours."""
    found = _ENGINE_ENDED.search(str(error)) if isinstance(error, RuntimeError) else None
    codes = {int(code) for code in re.findall(r": (-?\d+)", found[1])} if found else set()
    kinds = [_KINDS.get(code) for code in codes]
    if len(kinds) != 1 or kinds[0] is None:
        return None
    return kinds[0]("the engine could not start; its own message is above.")


def _port_in_use(argv: list[str]) -> XllmError:
    port = f"port {_option(argv, '--port') or 8000}"
    if _option(argv, "--port") is None and _option(argv, "--config") is not None:
        port = "the port that --config names (8000 if it names none)"
    return XllmError(
        f"{port} is in use by another program. Stop that one, or choose another with "
        "--port (any free one from 1024 to 65535)."
    )


def _model_argument(argv: list[str]) -> str | None:
    model = _option(argv, "--model")
    if model is None and len(argv) > 2 and argv[1] == "serve" and not argv[2].startswith("-"):  # noqa: PLR2004
        return argv[2]
    return model


# Where in vLLM and its libraries a model's folder is first read, and what they say about it.
MODEL_SIGNS = (
    "is not a valid model identifier",
    "is not a local folder",
    "Repo id must",
    "Invalid repository ID",
    "Can't load the configuration",
    "does not appear to have a file named",
    "Unrecognized model in",
    "is not a valid JSON file",
)


def _reason(error: BaseException, model: str) -> str | None:
    """Find the line that says what is wrong with this very model.

    A tokenizer, a data set or a draft model that is not there is met in the same words, so the
    line has to name the model; pydantic's dump of all arguments, which follows, does not count.
    """
    named = re.compile(rf"(?<![\w./-]){re.escape(model)}(?![\w/-])")
    for cause in _chain(error):
        for line in str(cause).splitlines():
            said = line.partition("[type=")[0]
            if any(sign in said for sign in MODEL_SIGNS) and named.search(said):
                return said.strip()
    return None


# What the hub's client says, naming no model, when it is offline by choice or by accident.
UNREACHABLE_SIGNS = (
    "outgoing traffic has been disabled",
    "couldn't find them in the cached files",
)


def _hub_is_out_of_reach(error: BaseException) -> bool:
    return any(sign in str(cause) for cause in _chain(error) for sign in UNREACHABLE_SIGNS)


def _is_absent(model: str) -> bool:
    """Whether the model is neither a folder on this machine nor in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(model).exists():
        return False
    try:
        return not isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return True


def _not_a_model(model: str, reason: str | None) -> ModelError:
    if reason is not None and Path(model).is_dir():
        return ModelError(
            f"model {model!r}: the folder is there but is not a Hugging Face model folder: "
            f"{reason} It needs config.json, a tokenizer and *.safetensors; `xllm model --list` "
            "names models that can be built here."
        )
    return ModelError(
        f"model {model!r}: not a folder on this machine, and no model hub answered for it. Give "
        "the path of a Hugging Face model folder, or build one: xllm model smollm2."
    )
