"""A server on the emulated device answers what clients ask for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_plugin.bench.servers import Server, clean_environment, find_free_port
from xllm_plugin.models import prepare
from xllm_plugin.testing import dialogues
from xllm_plugin.testing.cann import Emulator
from xllm_plugin.testing.dialogues import Talk

pytestmark = [
    pytest.mark.npu,
    pytest.mark.e2e,
    pytest.mark.full,
    pytest.mark.timeout(4000),
]

ROOT = Path(__file__).parents[2]
MODEL = "tiny-llama"
PATIENCE_S = 3000.0


@pytest.fixture(scope="module")
def talk(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    from openai import DefaultHttpxClient, OpenAI

    port = find_free_port()
    command = [sys.executable, "-m", "xllm_plugin.cli", "serve", str(prepare(MODEL))]
    flags = [
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL),
        *("--max-model-len", "1024", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
        *("--kv-cache-memory-bytes", str(2**27)),
    ]
    environment = emulator.environment({"PYTHONPATH": str(ROOT), "XLLM_DEVICE": "npu"})
    with (
        Server(
            MODEL,
            [*command, *flags],
            port=port,
            log_path=tmp_path_factory.mktemp("server") / "log",
            environment=clean_environment({"HF_HUB_OFFLINE": "1", **environment}),
            ready_timeout_s=PATIENCE_S,
        ) as server,
        DefaultHttpxClient(trust_env=False, timeout=PATIENCE_S) as transport,
        OpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=transport
        ) as client,
    ):
        yield Talk(client, server.url, MODEL)


def test_a_stream_says_what_a_whole_answer_says(talk: Talk) -> None:
    whole = dialogues.completion(talk)["choices"][0]
    stream = dialogues.completion_stream(talk)
    assert (stream["text"], stream["finish_reason"]) == (whole["text"], whole["finish_reason"])


def test_sampling_follows_its_seed(talk: Talk) -> None:
    first, again, other = dialogues.seeds(talk)
    assert first == again
    assert first != other


def test_penalties_and_truncated_sampling(talk: Talk) -> None:
    (choice,) = dialogues.penalties(talk)["choices"]
    assert choice["finish_reason"] == "length"


def test_an_answer_follows_its_schema(talk: Talk) -> None:
    """As far as it goes: a random model writes blanks, which JSON allows, until it is cut."""
    (choice,) = dialogues.guided_json(talk)["choices"]
    assert re.match(r'\{\s*"name"\s*:\s*"', choice["message"]["content"])


def test_log_probs_of_a_prompt(talk: Talk) -> None:
    (choice,) = dialogues.log_probs(talk)["prompt"]["choices"]
    first, *others = choice["logprobs"]["token_logprobs"]
    assert first is None
    assert all(score < 0 for score in others)


def test_several_at_once(talk: Talk) -> None:
    answers = dialogues.several_at_once(talk)
    assert all(answer["usage"]["completion_tokens"] > 0 for answer in answers)
