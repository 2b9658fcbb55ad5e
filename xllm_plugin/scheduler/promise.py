"""What a request was promised: how soon, how steadily, for whom.

A promise travels in the request's ``vllm_xargs`` (`SamplingParams.extra_args` in the engine), which
take text, whole numbers, fractions and lists.  Headers are turned into the same keys by the API
server.  Imports neither torch nor vLLM.
"""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any, Final

from xllm_plugin.errors import PromiseError

__all__ = [
    "CLASS_KEY",
    "KEYS",
    "PRIORITY_KEY",
    "TENANT_KEY",
    "TPOT_KEY",
    "TTFT_KEY",
    "Promise",
    "ServiceClass",
    "read_promise",
]

TTFT_KEY: Final = "xllm_ttft_ms"
TPOT_KEY: Final = "xllm_tpot_ms"
CLASS_KEY: Final = "xllm_class"
PRIORITY_KEY: Final = "xllm_priority"
TENANT_KEY: Final = "xllm_tenant"

# A day: longer waits are what the offline class is for, and it keeps the arithmetic finite.
MAX_TARGET_MS: Final = 86_400_000.0
MAX_PRIORITY: Final = 2**31 - 1
# To compare names takes time, and a body may be full of them.
_MAX_MISSPELT: Final = 64
_MAX_KEY_CHARS: Final = 64
_MAX_NUMBER_CHARS: Final = 64
TENANT_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,63}"


class ServiceClass(StrEnum):
    """Who is waiting for the answer."""

    ONLINE = "online"
    """Somebody; both targets are to be kept."""
    OFFLINE = "offline"
    """Nobody; it is served in what online requests leave over, and its targets do not count."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What one request was promised.

    Attributes:
        ttft_ms: from arrival to the first token.
        tpot_ms: from one token to the next, on average from the first token on.
        service_class: online or offline.
        priority: in vLLM's sense: lower is served earlier.
        tenant: whose request it is; requests without one share "default".
    """

    ttft_ms: float = 1000.0
    tpot_ms: float = 50.0
    service_class: ServiceClass = ServiceClass.ONLINE
    priority: int = 0
    tenant: str = "default"

    @property
    def is_online(self) -> bool:
        """Whether its targets count."""
        return self.service_class is ServiceClass.ONLINE


def read_promise(extra_args: Mapping[str, Any] | None, defaults: Promise) -> Promise:
    """The promise in a request's extra arguments; what they do not say is taken from `defaults`.

    Numbers may also be given as text, as headers have them.

    Raises:
        PromiseError: a value is of the wrong type or out of range, or a name is nearly one of
            ours; the message names field, value and what is accepted, `.field` the key.
    """
    if not extra_args:
        return defaults
    _refuse_misspelt(extra_args)
    given = {
        name: read(key, extra_args[key])
        for key, (name, read) in _READERS.items()
        if key in extra_args
    }
    return replace(defaults, **given) if given else defaults


def _refuse_misspelt(extra_args: Mapping[str, Any]) -> None:
    ours = (
        key
        for key in extra_args
        if key.startswith("xllm_") and len(key) <= _MAX_KEY_CHARS and key not in _READERS
    )
    for key in islice(ours, _MAX_MISSPELT):
        if close := difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8):
            known = ", ".join(KEYS)
            raise PromiseError(
                f"{key} is no field of a request; did you mean {close[0]}? Known are {known}.",
                field=key,
            )


def _target_ms(key: str, value: Any) -> float:
    number = _number(value)
    if number is None or not 0 < number <= MAX_TARGET_MS:
        raise _wrong(key, value, f"a number of milliseconds over 0, at most {MAX_TARGET_MS:.0f}")
    return number


def _service_class(key: str, value: Any) -> ServiceClass:
    names = [member.value for member in ServiceClass]
    if not isinstance(value, str) or value.strip().lower() not in names:
        raise _wrong(key, value, " or ".join(names))
    return ServiceClass(value.strip().lower())


def _priority(key: str, value: Any) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or abs(number) > MAX_PRIORITY:
        raise _wrong(
            key,
            value,
            f"a whole number between {-MAX_PRIORITY} and {MAX_PRIORITY}; lower is earlier",
        )
    return int(number)


def _tenant(key: str, value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(TENANT_PATTERN, value) is None:
        raise _wrong(key, value, "1 to 64 letters, digits and _.:@/-, the first a letter or digit")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and len(value) > _MAX_NUMBER_CHARS:
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _wrong(key: str, value: Any, accepted: str) -> PromiseError:
    return PromiseError(f"{key} is {reprlib.repr(value)}; accepted is {accepted}.", field=key)


_READERS: Final[dict[str, tuple[str, Callable[[str, Any], Any]]]] = {
    TTFT_KEY: ("ttft_ms", _target_ms),
    TPOT_KEY: ("tpot_ms", _target_ms),
    CLASS_KEY: ("service_class", _service_class),
    PRIORITY_KEY: ("priority", _priority),
    TENANT_KEY: ("tenant", _tenant),
}
KEYS: Final = tuple(_READERS)
