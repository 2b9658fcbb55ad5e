"""What a server answers, collected so that two servers can be compared.

Prompts go out one at a time: every peer then forms the same batches, and greedy outputs may be
held to the strictest judgement that the peers' thread counts allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from xllm_plugin.bench.schema import Check
from xllm_plugin.bench.traces import Lengths, Request, Vocabulary, synthesise
from xllm_plugin.errors import NotNowError
from xllm_plugin.testing.equality import (
    Completion,
    Spread,
    check_bit_equal,
    check_near_ties,
    measure,
)

__all__ = [
    "NUM_CANDIDATES",
    "NUM_OUTPUT_PROMPTS",
    "OUTPUT_PROMPT_TOKENS",
    "OUTPUT_TOKENS",
    "collect",
    "compare",
    "prompts",
    "self_noise",
]

NUM_OUTPUT_PROMPTS, OUTPUT_PROMPT_TOKENS, OUTPUT_TOKENS = 8, 128, 32
NUM_CANDIDATES = 5
TIMEOUT_S = 300.0


def prompts(
    vocabulary: Vocabulary, *, seed: int, max_input: int = OUTPUT_PROMPT_TOKENS
) -> tuple[Request, ...]:
    """Short prompts of random tokens whose greedy outputs are compared between peers."""
    return synthesise(
        (Lengths(OUTPUT_PROMPT_TOKENS, OUTPUT_TOKENS),),
        vocabulary,
        count=NUM_OUTPUT_PROMPTS,
        seed=f"{seed}:outputs",
        max_input=max_input,
    )


def collect(
    base_url: str, model: str, requests: Sequence[Request], *, at_once: int = 1
) -> tuple[Completion, ...]:
    """Greedy completions with log-probs, `at_once` in flight.

    Raises `NotNowError` when the server does not answer as vLLM's completions endpoint does.
    """
    # trust_env=False: a proxy from the environment is never meant for a server under test.
    with (
        httpx.Client(base_url=base_url, trust_env=False, timeout=TIMEOUT_S) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        jobs = [
            pool.submit(_complete, client, model, str(index), request)
            for index, request in enumerate(requests)
        ]
        return tuple(job.result() for job in jobs)


def self_noise(alone: Sequence[Completion], together: Sequence[Completion]) -> Spread:
    """How far a server is from itself when the same prompts share a batch: the yardstick."""
    return measure(alone, together)


def compare(
    name: str,
    reference_name: str,
    reference: Sequence[Completion],
    other: Sequence[Completion],
    noise: Spread,
) -> Check:
    """Judge `other` against `reference`: bit-equal if it is, else every difference a near-tie."""
    report = check_bit_equal(reference, other)
    if not report.equal:
        report = check_near_ties(reference, other, noise)
    return Check(
        name=f"outputs of {name} equal those of {reference_name}",
        passed=report.equal,
        detail="; ".join(line.strip() for line in report.summary().splitlines()),
    )


def _complete(client: httpx.Client, model: str, prompt_id: str, request: Request) -> Completion:
    body = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": NUM_CANDIDATES,
        "return_tokens_as_token_ids": True,
    }
    try:
        answer = client.post("/v1/completions", json=body)
        answer.raise_for_status()
        logprobs = answer.json()["choices"][0]["logprobs"]
        return _completion(prompt_id, logprobs)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        raise NotNowError(
            f"{client.base_url} did not complete prompt {prompt_id} with log-probs: {error!r}; "
            "it must be a vLLM server"
        ) from error


def _completion(prompt_id: str, logprobs: dict[str, Any]) -> Completion:
    chosen = tuple(_token_id(token) for token in logprobs["tokens"])
    scores = tuple(float(value) for value in logprobs["token_logprobs"])
    candidates = [
        {_token_id(token): float(value) for token, value in entry.items()}
        for entry in logprobs["top_logprobs"]
    ]
    for token, score, entry in zip(chosen, scores, candidates, strict=True):
        entry.setdefault(token, score)
    return Completion(prompt_id, chosen, scores, tuple(candidates))


def _token_id(text: str) -> int:
    """`token_id:17` is how vLLM writes 17 with `return_tokens_as_token_ids`."""
    return int(text.removeprefix("token_id:"))
