"""Which platform this process runs on, decided once and handed to child processes.

vLLM resolves its platform on the first import, before it parses any argument, so the decision is
read from the command line here and exported to the environment, which spawned processes inherit.
In order of precedence:

1. ``--platform xllm|native`` on the command line of vLLM's own commands;
2. ``XLLM_PLATFORM`` in the environment;
3. the plugin is installed, so: xllm.

The options of ours are taken off the command line: they then work for every vLLM command, also for
those whose parser no platform can extend (`vllm bench latency`), and under `native`, where none of
our code extends any parser.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from xllm_plugin.errors import ConfigError, PlatformError

__all__ = [
    "CONFIG_ENV",
    "DEVICE_ENV",
    "PLATFORMS",
    "PLATFORM_ENV",
    "REGISTER_ENV",
    "Selection",
    "is_server_command",
    "is_vllm_command",
    "select",
]

PLATFORM_ENV = "XLLM_PLATFORM"
CONFIG_ENV = "XLLM_CONFIG"
DEVICE_ENV = "XLLM_DEVICE"
REGISTER_ENV = "XLLM_REGISTRATION__URL"
# "PLATFORM: REASON" of the process that decided, for its children.
REASON_ENV = "XLLM_PLATFORM_REASON"

PLATFORMS = ("xllm", "native")


@dataclass(frozen=True, slots=True)
class Selection:
    """The platform chosen and why; `inherited` when a parent process decided."""

    platform: str
    reason: str
    inherited: bool = False

    @property
    def is_native(self) -> bool:
        """True when vLLM is to run untouched."""
        return self.platform == "native"


def select(argv: list[str], orig_argv: list[str], environ: MutableMapping[str, str]) -> Selection:
    """Decide the platform and export the decision.

    Args:
        argv: `sys.argv`; our own options are removed from it in place when it is the command line
            of one of vLLM's commands.  Any other program's arguments are left alone.
        orig_argv: `sys.orig_argv`, which tells `python -m vllm...` from other programs.
        environ: `os.environ`; receives `XLLM_PLATFORM` (and `XLLM_CONFIG`,
            `XLLM_REGISTRATION__URL`) for child processes.

    Raises:
        PlatformError: the platform is not one of `PLATFORMS`.
        ConfigError: an option lacks its value, or is not for this platform.
    """
    reason = None
    if is_vllm_command(argv, orig_argv):
        config_file = _take_option(argv, "--xllm-config")
        if config_file is not None:
            environ[CONFIG_ENV] = str(Path(config_file).absolute())
        platform = _take_option(argv, "--platform")
        if platform is not None:
            environ[PLATFORM_ENV] = _checked(platform, "--platform")
            reason = f"--platform {platform}"
        service_url = _take_option(argv, "--register")
        if service_url is not None:
            environ[REGISTER_ENV] = service_url
            if (environ.get(PLATFORM_ENV) or PLATFORMS[0]) == "native":
                raise ConfigError(
                    f"--register {service_url}: a server without this plugin cannot register; "
                    "leave --platform native out, or name it in the service's instances.static."
                )
    decided = _checked(environ.get(PLATFORM_ENV) or PLATFORMS[0], PLATFORM_ENV)
    if reason is None and environ.get(REASON_ENV, "").startswith(f"{decided}: "):
        return Selection(decided, environ[REASON_ENV].removeprefix(f"{decided}: "), inherited=True)
    if reason is None:
        given = environ.get(PLATFORM_ENV)
        reason = f"{PLATFORM_ENV}={given}" if given else "the plugin is installed and no flag given"
    environ[PLATFORM_ENV] = decided
    environ[REASON_ENV] = f"{decided}: {reason}"
    return Selection(decided, reason)


def select_here() -> Selection:
    """`select` for this very process."""
    return select(sys.argv, sys.orig_argv, os.environ)


def is_vllm_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Say whether the command line is one of vLLM's (or ours), so that its options may be read.

    True for the scripts `vllm` and `xllm` and for `python -m vllm...` (or `xllm_plugin...`); false
    for a user's own program, whose `--platform` means something else.
    """
    if argv and Path(argv[0]).name in {"vllm", "xllm"}:
        return True
    return _module_run(orig_argv).split(".")[0] in {"vllm", "xllm_plugin"}


def is_server_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Say whether the command line is `vllm serve`, `xllm serve` or vLLM's API server module."""
    return is_vllm_command(argv, orig_argv) and (
        argv[1:2] == ["serve"] or _module_run(orig_argv).endswith(".api_server")
    )


def _module_run(orig_argv: list[str]) -> str:
    """Return MODULE of `python [OPTIONS] -m MODULE ...`, else nothing.

    Only the interpreter's own options count: in `lm_eval -m vllm` the flag is the program's.
    """
    words = iter(orig_argv[1:])
    for word in words:
        if not word.startswith("-") or word == "-":
            return ""
        if word == "--check-hash-based-pycs":
            next(words, "")
        if word.startswith("--"):
            continue
        for index, letter in enumerate(word[1:], start=2):
            if letter in "cmWX":  # its value is the rest of the word, or the next one
                value = word[index:] or next(words, "")
                if letter in "cm":
                    return value if letter == "m" else ""
                break
    return ""


def _take_option(argv: list[str], option: str) -> str | None:
    """Remove every `option VALUE` and `option=VALUE` from `argv`; return the last value."""
    value = None
    index = 1
    while index < len(argv):
        name, equals, inline = argv[index].partition("=")
        if name != option:
            index += 1
            continue
        value = inline if equals else next(iter(argv[index + 1 :]), "")
        if not value:
            raise ConfigError(f"{option} needs a value, for example {option} {_example(option)}.")
        del argv[index : index + (1 if equals else 2)]
    return value


def _example(option: str) -> str:
    examples = {"--platform": "xllm", "--register": "http://service:8001"}
    return examples.get(option, "xllm.yaml")


def _checked(platform: str, source: str) -> str:
    if platform not in PLATFORMS:
        raise PlatformError(
            f"{source}: unknown platform {platform!r}; accepted are "
            f"{' and '.join(repr(name) for name in PLATFORMS)} ('native' is vLLM without this "
            "plugin)."
        )
    return platform
