"""What every process of the service sets up before its event loop runs."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable

from xllm_plugin.errors import PlatformError
from xllm_plugin.service import access_log, exchange
from xllm_plugin.service.config import LogConfig

__all__ = ["is_compiled", "loop_factory", "prepare_process"]


def prepare_process(config: LogConfig, name: str = "") -> None:
    """Set up logs and the limit of open files.

    Args:
        config: of the logs.
        name: stands in every line.

    Raises:
        ConfigError: the access log cannot be opened.
    """
    form = f"%(asctime)s %(levelname)s {name}%(message)s"
    logging.basicConfig(format=form, stream=sys.stderr)
    access_log.open_log(config.access_file)
    logging.getLogger("xllm_plugin").setLevel(config.level.upper())
    _raise_file_limit()


def is_compiled() -> bool:
    """Whether what requests run through is machine code (`make wheel`) and not Python's."""
    return not str(exchange.__file__).endswith(".py")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop.  Raises `PlatformError`: uvloop should be here and is not."""
    if sys.platform == "win32":  # uvloop is not made for it
        return None
    try:
        import uvloop
    except ImportError as error:
        raise PlatformError(
            f"uvloop is not installed ({error}): pip install 'xllm-plugin[service]'."
        ) from error
    return uvloop.new_event_loop


def _raise_file_limit() -> None:
    """A stream takes two descriptors; shells give 1,024, and allow more if asked."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
