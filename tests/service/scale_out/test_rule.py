"""Which streams go on at a server without this plugin, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from xllm_plugin.service.scale_out.messages import AskedFields, Rendered
from xllm_plugin.service.scale_out.rule import refusal

# As vLLM renders a request that asks for nothing special.
USUAL = {"stop": [], "stop_token_ids": [], "bad_words": [], "output_kind": 1, "skip_clone": True}


def why(asked: dict[str, Any], params: dict[str, Any], rendered: dict[str, Any]) -> str:
    made = Rendered(token_ids=[1], sampling_params={**USUAL, **params}, **rendered)
    return refusal(AskedFields(**asked), made)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0, "max_tokens": 20},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1},
        {"temperature": 0.0, "seed": 7},  # greedy: no number is drawn
        {"seed": None},
        {"stop_token_ids": [30], "min_tokens": 4, "ignore_eos": True},
        {"include_stop_str_in_output": True, "stop_token_ids": [30]},
        {"logprobs": 3},
        {"logit_bias": {"30": 4.0}, "allowed_token_ids": [1, 2]},
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        {"stream_interval": 4},
        {"skip_reading_prefix_cache": False},
        {"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "n": 1},
        {"watermarking": False, "structured_outputs": None, "extra_args": None},
        {"extra_args": {"xllm_tpot_ms": 90}},
    ],
)
def test_what_looks_at_one_token_alone_goes_on(params: dict[str, Any]) -> None:
    assert not why({}, params, {})


@pytest.mark.parametrize(
    ("asked", "params", "rendered", "reason"),
    [
        ({}, {"seed": 0}, {}, "a seed"),
        ({}, {"seed": 7, "temperature": 0.5}, {}, "a seed"),
        ({}, {"stop": ["x"]}, {}, "stop strings"),
        ({}, {"frequency_penalty": 0.1}, {}, "a frequency penalty"),
        ({}, {"presence_penalty": -0.1}, {}, "a presence penalty"),
        ({}, {"repetition_penalty": 1.05}, {}, "a repetition penalty"),
        ({}, {"bad_words": ["no"]}, {}, "bad words"),
        ({}, {"repetition_detection": {"min_count": 2}}, {}, "repetition detection"),
        ({}, {"structured_outputs": {"regex": "a"}}, {}, "structured outputs"),
        ({}, {"thinking_token_budget": 0}, {}, "a thinking token budget"),
        ({}, {"watermarking": True}, {}, "watermarking"),
        ({}, {"prompt_logprobs": 0}, {}, "prompt log probabilities"),
        ({}, {"n": 2}, {}, "`n` over 1"),
        ({}, {"extra_args": {"other": 1}}, {}, "extra arguments"),
        ({}, {"invented_later": 1}, {}, "`invented_later`"),
        ({}, {"invented_later": False}, {}, "`invented_later`"),
        ({"tools": [{}]}, {}, {}, "tools"),
        ({"echo": True}, {}, {}, "an echo of its prompt"),
        ({"prompt_embeds": "AA=="}, {}, {}, "a prompt of embeddings"),
        (
            {"return_tokens_as_token_ids": True},
            {"logprobs": 1},
            {},
            "tokens written as ids",
        ),
        ({}, {}, {"features": {"mm_hashes": {}}}, "media in its prompt"),
        ({}, {}, {"reasoning_parser_kwargs": {}}, "a reasoning parser"),
    ],
)
def test_what_remembers_output_does_not(
    asked: dict[str, Any], params: dict[str, Any], rendered: dict[str, Any], reason: str
) -> None:
    assert why(asked, params, rendered) == reason
