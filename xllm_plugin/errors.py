"""Every exception this package raises on purpose.

::

    XllmError
      MisuseError         what was asked for cannot be done as asked; the user changes something
        ConfigError       a setting is unknown, of the wrong type or out of range
        PlatformError     the platform, device or vLLM version does not fit
        ModelError        a model name or folder is unknown, absent or damaged
        PromiseError      a request's latency target, class, priority or tenant is wrong
      NotNowError         right request, wrong moment; trying again later may work
        DownloadError     a registry did not deliver, or not all of it
        ChannelError      an engine's socket is not there, closed, or did not answer in time
        EtcdError         etcd did not answer, or refused what it was asked
        PagesExhaustedError  no physical page of KV memory is free at this moment
      InternalError       our bug; please report it
        SeamError         a vLLM internal this package leans on is not what it was

A message gives the value seen, what is accepted, and the next step.  The command line prints the
message alone and exits with `exit_code`; set ``XLLM_TRACEBACK=1`` to see where it was raised.
"""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = [
    "ChannelError",
    "ConfigError",
    "DownloadError",
    "EtcdError",
    "InternalError",
    "MisuseError",
    "ModelError",
    "NotNowError",
    "PagesExhaustedError",
    "PlatformError",
    "PromiseError",
    "SeamError",
    "XllmError",
]


class XllmError(Exception):
    """Root of the tree; catch this to catch everything raised on purpose."""

    exit_code = 1

    def stop(self) -> NoReturn:
        """End the program with this message and exit code, and without a traceback."""
        sys.stderr.write(f"xllm: {self}\n")
        sys.exit(self.exit_code)


class MisuseError(XllmError):
    """The request itself has to change.  Exit code 2, as for argparse and click."""

    exit_code = 2


class ConfigError(MisuseError):
    """A setting is unknown, of the wrong type or out of range."""


class PlatformError(MisuseError):
    """The platform, device or vLLM version asked for or found does not fit."""


class ModelError(MisuseError):
    """A model name or folder is unknown, absent or damaged."""


class PromiseError(MisuseError):
    """A request's latency target, class, priority or tenant is wrong.

    Attributes:
        field: the key at fault; empty once the error has travelled.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotNowError(XllmError):
    """The request was right, the moment was not.  Exit code 75, `EX_TEMPFAIL` of sysexits.h."""

    exit_code = 75


class DownloadError(NotNowError):
    """A registry did not deliver, or not all of it."""


class ChannelError(NotNowError):
    """An engine's control socket is not there, closed, or did not answer in time."""


class EtcdError(NotNowError):
    """No member of etcd has answered in time, or one has refused what it was asked.

    Attributes:
        code: etcd's own (of gRPC); None if what came is no answer of etcd.
    """

    def __init__(self, message: str, *, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class PagesExhaustedError(NotNowError):
    """No physical page of KV memory is free at this moment."""


class InternalError(XllmError):
    """A state that cannot be; please file a bug.  Exit code 70, `EX_SOFTWARE` of sysexits.h."""

    exit_code = 70


class SeamError(InternalError):
    """A vLLM internal this package leans on is not what it was.

    Raised at start-up, never in traffic; the message names the vLLM version and the attribute.
    """
