"""What of a request decides whether its stream can be continued here."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.accelerator.platform import SCHEDULER
from xllm_plugin.instance.promises import RequestContext, current_request
from xllm_plugin.instance.resumption import Finish, Resumption
from xllm_plugin.worker.resumed import RESUMED_ARG

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module")
def replay() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.instance import replay

    return replay


def make_params(**extra_args: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra_args or None)


def test_promises_can_be_continued_and_other_extra_arguments_not(replay: Any) -> None:
    def refusal(**extra_args: Any) -> str | None:
        found: str | None = replay.refusal(make_params(**extra_args), has_seeds=True)
        return found

    assert refusal() is None
    assert refusal(xllm_ttft_ms=5, xllm_class="offline") is None
    assert refusal(xllm_ttft_ms=5, other=1) == "extra arguments"


@pytest.mark.parametrize(
    ("wishes", "has_seeds", "reason"),
    [
        ({"seed": 1, "temperature": 1.0}, True, None),
        ({"seed": 1, "temperature": 1.0}, False, "a seed with a temperature"),
        ({"seed": 1, "temperature": 0.0}, False, None),
        ({"temperature": 1.0}, False, None),
        ({"n": 2}, True, "n > 1"),
        ({"thinking_token_budget": 5}, True, "a thinking token budget"),
        ({"watermarking": True}, True, "watermarking"),
        ({"prompt_logprobs": 1}, True, "prompt log probabilities"),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.5, "bad_words": ["x"]}, False, None),
    ],
)
def test_what_follows_from_the_tokens_can_be_continued(
    replay: Any, wishes: dict[str, Any], has_seeds: bool, reason: str | None
) -> None:
    from vllm import SamplingParams

    assert replay.refusal(SamplingParams(**wishes), has_seeds=has_seeds) == reason


@pytest.mark.parametrize(
    ("speculative", "use_fp64_gumbel", "keeps"),
    [(None, False, True), ("drafts", False, False), (None, True, False)],
)
def test_draws_are_known_of_a_sampler_that_draws_once_a_token(
    replay: Any,
    monkeypatch: pytest.MonkeyPatch,
    speculative: Any,
    use_fp64_gumbel: bool,
    keeps: bool,
) -> None:
    platform = SimpleNamespace(
        xllm_skips_draws=True, get_cpu_architecture=lambda: replay.CpuArchEnum.X86
    )
    monkeypatch.setattr(replay, "current_platform", platform)
    made = config(speculative=speculative, use_fp64_gumbel=use_fp64_gumbel)
    assert replay.keeps_seeds(made) is keeps
    platform.xllm_skips_draws = False
    assert not replay.keeps_seeds(made)


def test_another_scheduler_takes_no_tokens(replay: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    resumption = Resumption(path="/v1/completions", body=b"{}", id="x", created=1, chunks=[])
    engine = SimpleNamespace(vllm_config=config(scheduler="mine.Scheduler"))
    with pytest.raises(VLLMValidationError, match=r"--scheduler-cls mine\.Scheduler"):
        replay.ReplayingEngine(engine, resumption).generate({"type": "token"}, make_params())


@pytest.mark.parametrize(
    ("chunks", "is_finished", "says"),
    [
        ([[99], [0, 1]], False, None),
        ([[100]], False, "not all below 100"),
        ([[-1]], False, "not all below 100"),
        ([[1] * 5], False, "no room for another"),
        ([[1] * 5], True, None),
    ],
)
def test_tokens_that_would_end_the_engine_are_refused(
    replay: Any, chunks: list[list[int]], is_finished: bool, says: str | None
) -> None:
    from vllm.exceptions import VLLMValidationError

    finish = Finish(finish_reason="length") if is_finished else None
    resumption = Resumption(
        path="/v1/completions", body=b"{}", id="x", created=1, chunks=chunks, finish=finish
    )
    engine = replay.ReplayingEngine(SimpleNamespace(vllm_config=config()), resumption)
    expected = pytest.raises(VLLMValidationError, match=says) if says else nullcontext()
    with expected:
        engine.generate({"type": "token", "prompt_token_ids": [1, 2, 3]}, make_params())


def test_the_engine_gets_the_tokens_beside_the_promise(replay: Any) -> None:
    request = SimpleNamespace(sampling_params=make_params(xllm_ttft_ms=5))
    sent = replay._continued(request, [[1, 2], [3]])
    assert sent.sampling_params.extra_args == {"xllm_ttft_ms": 5, RESUMED_ARG: [1, 2, 3]}
    assert request.sampling_params.extra_args == {"xllm_ttft_ms": 5}


def config(
    scheduler: str = SCHEDULER, speculative: Any = None, use_fp64_gumbel: bool = False
) -> Any:
    """As much of vLLM's as is read here."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        speculative_config=speculative,
        model_config=SimpleNamespace(
            use_fp64_gumbel=use_fp64_gumbel, get_vocab_size=lambda: 100, max_model_len=8
        ),
    )


def test_the_promise_in_the_headers_holds_for_the_continuation(replay: Any) -> None:
    resumption = Resumption(path="/v1/completions", body=b"{}", id="x", created=1, chunks=[])
    engine = replay.ReplayingEngine(SimpleNamespace(vllm_config=config()), resumption)
    params = make_params(xllm_ttft_ms=5)
    token = current_request.set(RequestContext({"xllm_ttft_ms": "900", "xllm_tenant": "a"}))
    try:
        engine.generate({"type": "token", "prompt_token_ids": [1]}, params)
    finally:
        current_request.reset(token)
    assert params.extra_args == {"xllm_ttft_ms": 5, "xllm_tenant": "a"}
