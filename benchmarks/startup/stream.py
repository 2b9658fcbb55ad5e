"""One streamed completion, with the time at which each token arrived."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import httpx

from xllm_plugin.errors import NotNowError

__all__ = ["Arrival", "Streamed", "complete", "read_events"]

TIMEOUT_S = 300.0
MAX_SHOWN = 300
"""Characters of an unexpected event."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Some tokens that came together."""

    at_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """What came, in order; never empty."""

    arrivals: tuple[Arrival, ...]

    @property
    def first_at_s(self) -> float:
        """When the first token was there."""
        return self.arrivals[0].at_s

    @property
    def num_tokens(self) -> int:
        """How many tokens came."""
        return sum(arrival.tokens for arrival in self.arrivals)

    @property
    def tpot_ms(self) -> float:
        """Time after the first arrival by the tokens after it; 0 if there are none."""
        after = self.num_tokens - self.arrivals[0].tokens
        return (self.arrivals[-1].at_s - self.first_at_s) / after * 1e3 if after else 0.0


def complete(url: str, model: str, prompt: Sequence[int], num_tokens: int) -> Streamed:
    """Ask the vLLM server at `url` (without `/v1`) for exactly `num_tokens` greedy tokens.

    Raises `NotNowError` when it answers with anything else.
    """
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    try:
        # trust_env=False: a proxy from the environment is never meant for loopback.
        with (
            httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client,
            client.stream("POST", f"{url}/v1/completions", json=body) as answer,
        ):
            answer.raise_for_status()
            streamed = Streamed(tuple(read_events(answer.iter_lines())))
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
        raise NotNowError(
            f"{url} did not stream a completion: {error!r}; it must be a vLLM server"
        ) from error
    if streamed.num_tokens != num_tokens:
        raise NotNowError(
            f"{url} streamed {streamed.num_tokens} tokens and was asked for {num_tokens}"
        )
    return streamed


def read_events(
    lines: Iterable[str], clock: Callable[[], float] = time.monotonic
) -> Iterable[Arrival]:
    """The tokens in the lines of a server-sent event stream, timed as the lines come."""
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        at_s = clock()
        event = json.loads(line.removeprefix("data: "))
        if "choices" not in event:  # vLLM reports an error in the middle of a stream like this
            raise ValueError(line[:MAX_SHOWN])
        for choice in event["choices"]:
            if choice["token_ids"]:
                yield Arrival(at_s, len(choice["token_ids"]))
