"""API keys of the service's clients: who somebody is, and how much they may ask for.

The keys are those of a file (`key_file.py`).  With several services in front of the same instances
each grants its part of every limit.
"""

from __future__ import annotations

import hashlib
import logging
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from xllm_plugin.errors import ConfigError
from xllm_plugin.service.exchange import Exchange, prompt_tokens_of
from xllm_plugin.service.flow.bucket import Bucket
from xllm_plugin.service.flow.usage import UsageMeter
from xllm_plugin.service.flow.wishes import NO_WISHES, TENANT_HEADER, Wishes, for_tenant
from xllm_plugin.service.key_file import KeyRecord, read
from xllm_plugin.service.replies import Refusal

__all__ = ["Account", "Grant", "KeyRing"]

logger = logging.getLogger(__name__)

_RETRY_S: Final = 1.0


class Account:
    """What one key has used of its limits.

    Args:
        record: its limits.
        num_replicas: services that share them.
        now_s: monotonic seconds.
    """

    def __init__(self, record: KeyRecord, num_replicas: int, now_s: float) -> None:
        self.in_flight = 0
        self.num_requests = 0
        self.num_tokens = 0
        self.refused: dict[str, int] = {}
        """By the limit that was reached."""
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.record = record
        self.take_over(record, num_replicas, now_s)

    def take_over(self, record: KeyRecord, num_replicas: int, now_s: float) -> None:
        """Have other limits; what was used of one that stays is kept."""
        self.record = record
        self.tenant_line = b"%b: %b\r\n" % (TENANT_HEADER, record.tenant.encode())
        """Header line that tells an instance whose request it is."""
        self._no_wishes = for_tenant(NO_WISHES, record.tenant)
        self.requests = _bucket(self.requests, record.requests_per_minute, num_replicas, now_s)
        self.tokens = _bucket(self.tokens, record.tokens_per_minute, num_replicas, now_s)
        most = record.max_concurrency
        self.max_concurrency = max(1, most // num_replicas) if most is not None else None

    def admit(self, num_tokens: int, now_s: float) -> None:
        """Let a request of about `num_tokens` in, and count it.

        Raises:
            Refusal: 429, a limit is reached.
        """
        if self.max_concurrency is not None and self.in_flight >= self.max_concurrency:
            raise self._reached("concurrency", f"{self.max_concurrency} at a time", _RETRY_S, now_s)
        requests, tokens = self.requests, self.tokens
        if requests is not None and (wait_s := requests.wait_s(1, now_s)):
            raise self._reached("requests", _per_minute(requests), wait_s, now_s)
        if tokens is not None and (wait_s := tokens.wait_s(num_tokens, now_s)):
            raise self._reached("tokens", _per_minute(tokens), wait_s, now_s)
        if requests is not None:
            requests.take(1, now_s)
        if tokens is not None:
            tokens.take(num_tokens, now_s)
        self.in_flight += 1
        self.num_requests += 1

    def bind(self, wishes: Wishes, priority: Any) -> Wishes:
        """`wishes` for the key's tenant.

        Args:
            wishes: as the request says them.
            priority: of its body, vLLM's own field, which goes to the instance as it is.

        Raises:
            Refusal: 403, it asks for another tenant or an earlier priority; 400, `priority` is what
                an instance may make a number of.
        """
        record, promise = self.record, wishes.promise
        if priority is None:
            priority = promise.priority
        elif not isinstance(priority, int) or isinstance(priority, bool):
            raise Refusal(
                400,
                f"`priority` is {reprlib.repr(priority)}; accepted is a whole number.",
                param="priority",
            )
        first_priority = min(promise.priority, priority)
        if wishes.has_tenant and promise.tenant != record.tenant:
            raise Refusal(
                403, f"Key {record.name!r} is of another tenant than {promise.tenant!r}; name none."
            )
        if first_priority < record.first_priority:
            raise Refusal(
                403,
                f"Key {record.name!r} may not ask for priority {first_priority}; "
                f"{record.first_priority} is its first.",
            )
        return self._no_wishes if wishes is NO_WISHES else for_tenant(wishes, record.tenant)

    def settle(self, reserved_tokens: int, used_tokens: int, now_s: float) -> None:
        """A request that was let in has ended."""
        self.in_flight -= 1
        self.num_tokens += used_tokens
        if self.tokens is not None:
            self.tokens.take(used_tokens - reserved_tokens, now_s)

    def headers(self, now_s: float) -> str:
        """Header lines of what is left of the limits, under OpenAI's names."""
        found = ""
        for limit, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                left, reset_s = bucket.left(now_s)
                before, between = _limit_text(limit, int(bucket.per_minute))
                remaining = int(left) if left > 0 else 0
                found += f"{before}{remaining}{between}{_duration(reset_s)}\r\n"
        return found

    def _reached(self, limit: str, allowed: str, wait_s: float, now_s: float) -> Refusal:
        self.refused[limit] = self.refused.get(limit, 0) + 1
        return Refusal(
            429,
            f"Key {self.record.name!r} has reached its limit of {limit}: {allowed}. "
            f"Try again in {_duration(wait_s)}.",
            retry_after_s=wait_s,
            headers=(
                f"retry-after-ms: {math.ceil(wait_s * 1e3)}",
                *self.headers(now_s).splitlines(),
            ),
        )


class Grant:
    """One request that showed a key.

    `admit` and `settle` are called at most once each; only what was admitted is settled.
    """

    __slots__ = ("_prompt_tokens", "_reserved_tokens", "account", "usage")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.usage = UsageMeter()
        self._prompt_tokens = 0
        self._reserved_tokens = -1

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.account.record.tenant

    def admit(self, exchange: Exchange, now_s: float) -> None:
        """Count the request.  Raises `Refusal` with 429 when a limit is reached."""
        estimated = prompt_tokens_of(len(exchange.body))
        # The size of a recording says nothing about its tokens.
        prompt = 0 if exchange.content_type.startswith(b"multipart/") else estimated
        num_tokens = exchange.cost_tokens - estimated + prompt
        self.account.admit(num_tokens, now_s)
        self._prompt_tokens, self._reserved_tokens = prompt, num_tokens

    def settle(self, exchange: Exchange, now_s: float) -> None:
        """The request has ended: count what it has really used."""
        reserved, self._reserved_tokens = self._reserved_tokens, -1
        if reserved >= 0:
            used = self.usage.num_tokens(exchange, self._prompt_tokens)
            self.account.settle(reserved, used, now_s)

    def with_headers(self, head: bytes, now_s: float) -> bytes:
        """The head of an answer, with what is left of the limits."""
        lines = self.account.headers(now_s)
        return head[:-2] + lines.encode() + b"\r\n" if lines else head


class KeyRing:
    """The keys in force.

    Args:
        path: of their file.
        num_replicas: services that share the limits.
        clock: monotonic seconds.

    Raises:
        ConfigError: the file is not one of keys.
    """

    def __init__(self, path: Path, num_replicas: int, clock: Callable[[], float]) -> None:
        self.path = path
        self._num_replicas = num_replicas
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        """By the hash of the key; another object after every change."""
        self._stamp = self._look()
        self._take(read(path))

    def __iter__(self) -> Iterator[Account]:
        return iter(tuple(self._accounts.values()))

    @property
    def edition(self) -> object:
        """Stands for the keys as they are: another object once they have changed."""
        return self._accounts

    @property
    def num_replicas(self) -> int:
        """Services that share the limits."""
        return self._num_replicas

    @num_replicas.setter
    def num_replicas(self, number: int) -> None:
        if number == self._num_replicas:
            return
        self._num_replicas = number
        self._take([account.record for account in self])

    def account(self, authorization: bytes) -> Account:
        """Who shows this Authorization header.  Raises `Refusal`: 401, nobody we know."""
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise _unauthorized("Send your API key as `Authorization: Bearer KEY`.")
        account = self._accounts.get(hashlib.sha256(key.strip()).hexdigest())
        if account is None:
            raise _unauthorized("The API key is not one of this service, or no longer.")
        return account

    def refresh(self) -> None:
        """Take over the file if it has changed; one that cannot be read changes nothing."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            records = read(self.path)
            self._take(records)
        except ConfigError as error:
            logger.error("%s The keys stay as they are.", error)  # noqa: TRY400 - the user's
            return
        logger.info("%d API keys are in force", len(records))

    def _take(self, records: Iterable[KeyRecord]) -> None:
        now_s = self._clock()
        known = {account.record.name: account for account in self}
        self._accounts = {}
        for record in records:
            account = known.get(record.name)
            if account is None:
                account = self._open(record, now_s)
            else:
                account.take_over(record, self._num_replicas, now_s)
            self._accounts[record.sha256] = account

    def _open(self, record: KeyRecord, now_s: float) -> Account:
        return Account(record, self._num_replicas, now_s)

    def _look(self) -> object:
        try:
            status = self.path.stat()
        except OSError as error:
            return str(error)
        return status.st_mtime_ns, status.st_size, status.st_ino


def _bucket(
    known: Bucket | None, per_minute: float | None, num_replicas: int, now_s: float
) -> Bucket | None:
    if per_minute is None:
        return None
    part = per_minute / num_replicas
    return known if known is not None and known.per_minute == part else Bucket(part, now_s)


@lru_cache
def _limit_text(limit: str, per_minute: int) -> tuple[str, str]:
    """What every answer says before what is left of a limit, and between that and its reset."""
    return (
        f"x-ratelimit-limit-{limit}: {per_minute}\r\nx-ratelimit-remaining-{limit}: ",
        f"\r\nx-ratelimit-reset-{limit}: ",
    )


def _per_minute(bucket: Bucket) -> str:
    """Without an exponent, and without a fraction that is none."""
    return f"{bucket.per_minute:.2f}".rstrip("0").rstrip(".") + " a minute"


def _duration(seconds: float) -> str:
    """As OpenAI writes them: 20ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, message, headers=("www-authenticate: Bearer",), close=True)
