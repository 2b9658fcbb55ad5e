"""Drive the load generator process, and turn its raw times into the figures of a load point.

Definitions are those of `vllm bench serve`: TTFT is from sending to the first token; TPOT is, for
one request, the time after the first token divided by the tokens after it; throughput is tokens
over the time from the first request sent to the last token received.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from xllm_plugin.bench.curve import percentile
from xllm_plugin.bench.json_process import JsonProcess
from xllm_plugin.bench.peers import COMMON_ENVIRONMENT
from xllm_plugin.bench.traces import Request
from xllm_plugin.errors import ConfigError, NotNowError

__all__ = ["Load", "LoadClient", "LoadResult", "parse_loads"]

START_TIMEOUT_S = 300.0


class Load(BaseModel):
    """A load: `clients` that send their next request when the last is answered, or a rate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clients: int | None = None
    requests_per_s: float | None = None

    def __str__(self) -> str:
        if self.clients is not None:
            return f"{self.clients} client{'s' if self.clients > 1 else ''}"
        return f"{self.requests_per_s:g} req/s"

    @property
    def size(self) -> float:
        """Clients or requests a second: what loads are ordered by."""
        return float(self.clients or self.requests_per_s or 0)


class LoadResult(BaseModel):
    """What one load on one server gave, in one repeat."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: Load
    duration_s: float
    requests: int
    failed: int
    short: int
    """Requests that got fewer tokens than they asked for."""
    input_tokens: int
    output_tokens: int
    output_tok_s: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p90_ms: float
    tpot_p95_ms: float
    tpot_p99_ms: float
    itl_p99_ms: float
    client_cpu_s: float
    first_error: str = ""

    @classmethod
    def of(cls, load: Load, asked: Sequence[Request], raw: dict[str, Any]) -> LoadResult:
        """Summarise a reply of `load_process`.  Raises `NotNowError` when no request succeeded."""
        answers = [
            (request, length, ttft, latency)
            for request, length, ttft, latency in zip(
                asked, raw["output_lens"], raw["ttfts"], raw["latencies"], strict=True
            )
            if length > 0
        ]
        errors = [str(error) for error in raw["errors"] if error]
        if not answers:
            raise NotNowError(f"all {len(asked)} requests failed at {load}: {errors[:1]}")
        ttfts = [ttft * 1e3 for _, _, ttft, _ in answers]
        tpots = [(total - ttft) * 1e3 / (n - 1) for _, n, ttft, total in answers if n > 1] or [0.0]
        gaps = [gap * 1e3 for gaps in raw["itls"] for gap in gaps] or [0.0]
        output_tokens = sum(length for _, length, _, _ in answers)
        return cls(
            load=load,
            duration_s=raw["duration"],
            requests=len(asked),
            failed=len(asked) - len(answers),
            short=sum(length < request.output_tokens for request, length, _, _ in answers),
            input_tokens=sum(raw["input_lens"]),
            output_tokens=output_tokens,
            output_tok_s=output_tokens / raw["duration"],
            ttft_p50_ms=percentile(ttfts, 50),
            ttft_p90_ms=percentile(ttfts, 90),
            ttft_p99_ms=percentile(ttfts, 99),
            tpot_p50_ms=percentile(tpots, 50),
            tpot_p90_ms=percentile(tpots, 90),
            tpot_p95_ms=percentile(tpots, 95),
            tpot_p99_ms=percentile(tpots, 99),
            itl_p99_ms=percentile(gaps, 99),
            client_cpu_s=raw["client_cpu_s"],
            first_error=errors[0].strip().splitlines()[-1] if errors else "",
        )


class LoadClient:
    """The load generator process, for the length of a `with` block.

    Args:
        log_path: gets what vLLM's client prints.
        command: for tests; by default this interpreter running `load_process`.
    """

    def __init__(self, log_path: Path, *, command: Sequence[str] | None = None) -> None:
        self._process = JsonProcess(
            "the load client",
            command or (sys.executable, "-m", "xllm_plugin.bench.load_process"),
            # One thread a library: the client must not take the cores that it measures.
            {"XLLM_PLATFORM": "native", "OMP_NUM_THREADS": "1", **COMMON_ENVIRONMENT},
            log_path,
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(self._process).receive(START_TIMEOUT_S)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(
        self,
        base_url: str,
        model: str,
        load: Load,
        requests: Sequence[Request],
        *,
        seed: int = 0,
        timeout_s: float = 900.0,
        on_wait: Callable[[], None] | None = None,
    ) -> LoadResult:
        """Send `requests` to the server at `base_url` under `load`, and wait for all answers.

        Args:
            base_url: without `/v1`.
            model: the name that the server serves.
            load: at most so many at once, or Poisson arrivals of that rate.
            requests: sent in order, with `ignore_eos` and temperature 0.
            seed: of the arrival times.
            timeout_s: raises `NotNowError` after that.
            on_wait: called twice a second; may raise, e.g. when the server has died.
        """
        point = {
            "base_url": base_url,
            "model": model,
            "clients": load.clients,
            "request_rate": load.requests_per_s,
            "seed": seed,
            "requests": [{"prompt": r.prompt, "output_tokens": r.output_tokens} for r in requests],
        }
        self._process.send(point)
        return LoadResult.of(load, requests, self._process.receive(timeout_s, on_wait=on_wait))


def parse_loads(text: str) -> tuple[Load, ...]:
    """Read `1,8,16` (clients) or `0.5/s,2/s` (requests a second), in rising order.

    Raises `ConfigError` for anything else, and for a mixture: one curve has one kind of load.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        loads = [_parse_load(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"loads {text!r}: {error}; write 1,8,16 or 0.5/s,2/s") from error
    if not loads or len({load.clients is None for load in loads}) != 1:
        raise ConfigError(f"loads {text!r}: write only clients (1,8,16) or only rates (0.5/s,2/s)")
    return tuple(sorted(set(loads), key=lambda load: load.size))


def _parse_load(part: str) -> Load:
    load = (
        Load(requests_per_s=float(part.removesuffix("/s")))
        if part.endswith("/s")
        else Load(clients=int(part))
    )
    if not 0 < load.size < float("inf"):
        raise ValueError(f"{part} is not above 0")
    return load
