"""What vLLM calls: `platform`, `register` and `endpoints`, through its entry-point groups.

vLLM calls `platform` at least twice in every process, and swallows what it raises
(vllm/platforms/__init__.py), which would quietly start stock vLLM where the user asked for xllm.
So a mistake ends a vLLM command at once with one message, and reaches a user's own program as an
exception from the platform's constructor, which vLLM lets through.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from typing import NoReturn

from xllm_plugin import shims
from xllm_plugin.errors import InternalError, XllmError
from xllm_plugin.selection import Selection, is_server_command, is_vllm_command, select_here

__all__ = ["RefusedPlatform", "endpoints", "platform", "register"]

_logged: set[str] = set()


def platform() -> str | None:
    """Return the class path of the platform to run on, or None for untouched vLLM."""
    try:
        shims.install()
        selection = select_here()
        path, device = _resolved(selection)
    except XllmError as error:
        return _refuse(error)
    except Exception as error:  # noqa: BLE001  vLLM would hide it and run without this plugin
        return _refuse(_unexpected(error))
    message = f"xllm-plugin: platform {selection.platform}{device} ({selection.reason})"
    _log_once(message, logging.DEBUG if selection.inherited else logging.INFO)
    return path


def _log_once(message: str, level: int) -> None:
    if message in _logged:
        return
    _logged.add(message)
    logger = logging.getLogger("vllm.xllm_plugin")
    if logger.hasHandlers():
        logger.log(level, "%s", message)
    elif level >= _wanted_level():
        # vLLM configures its logging after it has chosen its platform.
        sys.stderr.write(f"{logging.getLevelName(level)} {message}\n")


def _wanted_level() -> int:
    name = os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()
    return logging.getLevelNamesMapping().get(name, logging.INFO)


def _resolved(selection: Selection) -> tuple[str | None, str]:
    if selection.is_native:
        return None, ""
    # Nothing of ours but the shims is imported under `native`.
    from xllm_plugin.startup import resolve

    choice = resolve()
    if is_vllm_command(sys.argv, sys.orig_argv):
        from xllm_plugin.cli.explain import install

        install()
    # Not in the children of a server, some of which never call `register`.
    if is_server_command(sys.argv, sys.orig_argv) and multiprocessing.parent_process() is None:
        # vLLM asks in the middle of its imports, and calls `register` when they are done.
        from xllm_plugin.collection import import_pause

        import_pause.begin()
        choice.family.prepare()
    return choice.family.platform_class, f", device {choice.family.name} ({choice.reason})"


def register() -> None:
    """vLLM's general-plugin hook, run in every process; the seams are checked here.

    Raises:
        PlatformError: vLLM did not ask for our platform although it is wanted.
        SeamError: this vLLM is not what this package was written against.
    """
    shims.install()
    if select_here().is_native:
        return
    from xllm_plugin.collection import import_pause
    from xllm_plugin.seams import check_all
    from xllm_plugin.startup import check_platform_is_ours

    try:
        check_platform_is_ours()
        check_all()
    except XllmError as error:
        _stop_vllm_command(error)
        raise
    import_pause.end()


def endpoints() -> object:
    """Return the endpoint plugin that adds `/xllm/*`, our metrics and admission to the API server.

    Raises:
        SeamError: this vLLM is not what this package was written against.
    """
    if select_here().is_native:
        return NoEndpoints()
    from xllm_plugin.instance.endpoints import XllmEndpoints
    from xllm_plugin.seams import Process, check_all

    try:
        check_all(Process.SERVER)
    except XllmError as error:
        _stop_vllm_command(error)  # vLLM would log it and serve without us
        raise

    return XllmEndpoints()


class NoEndpoints:
    """Stands in for our endpoint plugin under `native`: adds nothing."""

    name = "xllm"
    required_tasks: tuple[str, ...] | None = None

    def attach_router(self, app: object) -> None:
        """Add no route."""

    async def init_state(self, engine_client: object, state: object, args: object) -> None:
        """Keep no state."""


_refusal: XllmError | None = None


class RefusedPlatform:
    """A platform that raises why there is none, when vLLM constructs it."""

    def __new__(cls) -> NoReturn:
        """Raise the error that `platform` met."""
        assert _refusal is not None
        raise _refusal


def _unexpected(error: Exception) -> InternalError:
    wrapped = InternalError(
        f"choosing the platform failed: {type(error).__name__}: {error}. Please report it with "
        "what XLLM_TRACEBACK=1 shows; --platform native runs vLLM without this plugin."
    )
    wrapped.__cause__ = error
    return wrapped


def _refuse(error: XllmError) -> str:
    global _refusal  # noqa: PLW0603  vLLM constructs the class by path, without arguments
    _stop_vllm_command(error)
    _refusal = error
    return "xllm_plugin.entrypoints.RefusedPlatform"


def _stop_vllm_command(error: XllmError) -> None:
    if is_vllm_command(sys.argv, sys.orig_argv) and not os.environ.get("XLLM_TRACEBACK"):
        error.stop()
