"""What a trial sends: recorded lengths, made shorter, with made-up content, at bursty moments.

It depends on the rate and the seed alone, so that every side gets the same requests at the same
moments.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.open_loop import Sending
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import Side
from xllm_plugin.bench.traces import Lengths, Vocabulary
from xllm_plugin.errors import ConfigError

__all__ = ["GIVE_UP_MARGIN_S", "Traffic"]

GIVE_UP_MARGIN_S = 0.5
"""A request is ended so long after it has broken its promise for certain."""
WARM_UP_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent: requests with recorded lengths, made shorter, at bursty moments.

    Attributes:
        traces: lengths by the trace's name; the requests take them in turn.
        vocabulary: what random prompts are made of.
        shorten: recorded lengths are divided by this, prompts and outputs alike.
        max_input: no prompt is longer than this afterwards.
        max_output: no output is longer than this afterwards.
        bursts: how arrivals bunch.
        window_s: arrivals fall into [0, window_s).
        seed: of everything; repeats differ in a seed made of it.
    """

    traces: Mapping[str, Sequence[Lengths]]
    vocabulary: Vocabulary
    shorten: float
    max_input: int
    max_output: int
    bursts: Bursts
    window_s: float
    seed: int

    def sendings(
        self,
        side: Side,
        requests_per_s: float,
        repeat: int,
        promises: Sequence[Promise],
        *,
        salt: str,
    ) -> tuple[Sending, ...]:
        """The requests of a trial, told to `side` as it understands it.

        The n-th has the same moment and lengths at every rate.  Its tokens are new for every
        `salt`: give each trial of a server its own, so that none finds another's prompts in the
        prefix cache.  A request may be ended once it has broken all `promises`; a side that hears
        one hears the first.  Raises `ConfigError` if there would be no request.
        """
        moments = self.bursts.arrivals(requests_per_s, self.window_s, f"{self.seed}:{repeat}")
        if not moments:
            raise ConfigError(
                f"{requests_per_s:g} req/s make no request in {self.window_s:g} s; give a higher "
                "rate or more --seconds"
            )
        prompts = self._prompts(f"{repeat}", salt, len(moments))
        return tuple(
            Sending(
                due_s=due_s,
                trace=trace,
                prompt=prompt,
                output_tokens=output_tokens,
                give_up_s=due_s
                + GIVE_UP_MARGIN_S
                + max(promise.latest_end_s(output_tokens) for promise in promises),
                extra=side.fields(promises[0], len(prompt)),
            )
            for due_s, (trace, prompt, output_tokens) in zip(moments, prompts, strict=True)
        )

    def offline(self, side: Side, promise: Promise, salt: str) -> Callable[[int], Sending]:
        """The n-th request of a backlog for `side`: the same lengths, other tokens."""

        def request(number: int) -> Sending:
            rng = self._rng(f"offline:{number}")
            trace, lengths = self._lengths(rng, number)
            prompt = self._tokens(f"offline:{salt}:{number}", lengths.input_tokens)
            fields = side.fields(promise, len(prompt), is_offline=True)
            return Sending(0.0, trace, prompt, lengths.output_tokens, 0.0, fields)

        return request

    def at_once(self, side: Side, promise: Promise, count: int) -> tuple[Sending, ...]:
        """`count` requests due immediately, to warm a server up."""
        return tuple(
            Sending(0.0, trace, prompt, n, WARM_UP_LIMIT_S, side.fields(promise, len(prompt)))
            for trace, prompt, n in self._prompts("warm-up", "warm-up", count)
        )

    def describe(self, model: str) -> str:
        """A note for the result: what was sent."""
        return (
            f"Model {model}; lengths of {' and '.join(self.traces)}"
            f"{', in turn' if len(self.traces) > 1 else ''}, prompts and outputs divided by "
            f"{self.shorten:g} (at most {self.max_input} and {self.max_output} tokens), so that "
            "two cores can answer even long prompts within the promise; random token ids, greedy, "
            f"`ignore_eos`. Open loop, {self.window_s:g} s of arrivals a trial: Poisson with "
            f"{self.bursts}; seed {self.seed}. A request is ended, at the earliest when arrivals "
            "are over, once it has broken every promise it is judged by."
        )

    def _prompts(
        self, lengths_seed: str, tokens_seed: str, count: int
    ) -> list[tuple[str, tuple[int, ...], int]]:
        rng = self._rng(f"lengths:{lengths_seed}")
        found = []
        for number in range(count):
            trace, lengths = self._lengths(rng, number)
            prompt = self._tokens(
                f"tokens:{lengths_seed}:{tokens_seed}:{number}", lengths.input_tokens
            )
            found.append((trace, prompt, lengths.output_tokens))
        return found

    def _lengths(self, rng: random.Random, number: int) -> tuple[str, Lengths]:
        trace = list(self.traces)[number % len(self.traces)]
        recorded = rng.choice(self.traces[trace])
        return trace, recorded.shortened(self.shorten).clipped(self.max_input, self.max_output)

    def _tokens(self, purpose: str, count: int) -> tuple[int, ...]:
        rng = self._rng(purpose)
        special, size = self.vocabulary.special, self.vocabulary.size
        drawn: list[int] = []
        while len(drawn) < count:
            token = rng.randrange(size)
            if token not in special:
                drawn.append(token)
        return tuple(drawn)

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"xllm-bench:{self.seed}:{purpose}")  # noqa: S311 - no secrets
