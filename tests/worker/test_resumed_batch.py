"""vLLM's own input batch: a resumed request ends up as one that was preempted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xllm_plugin import shims
from xllm_plugin.worker.resumed import take_up

pytestmark = pytest.mark.engine  # imports vLLM, some seconds

PROMPT, OUTPUT = [3, 1, 4, 1, 5], [9, 2, 6]


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    shims.install()
    pytest.importorskip("vllm")


def new_batch() -> Any:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors, MinTokensLogitsProcessor
    from vllm.v1.worker.gpu_input_batch import InputBatch

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=2))
    device = torch.device("cpu")
    minimum = MinTokensLogitsProcessor(config, device, False)  # type: ignore[arg-type]
    return InputBatch(
        max_num_reqs=2,
        max_model_len=16,
        max_num_batched_tokens=16,
        device=device,
        vocab_size=32,
        block_sizes=[4],
        max_num_blocks_per_req=[4],
        logitsprocs=LogitsProcessors([minimum]),
    )


def add(batch: Any, output: list[int], **wishes: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    params = SamplingParams(frequency_penalty=0.5, bad_words=[], **wishes)
    params._all_stop_token_ids = {0}
    state = CachedRequestState(
        req_id="a",
        prompt_token_ids=PROMPT,
        mm_features=[],
        sampling_params=params,
        generator=None,
        block_ids=([0, 1],),
        num_computed_tokens=0,
        output_token_ids=output,
        lora_request=None,
    )
    batch.add_request(state)
    batch.refresh_metadata()
    return state


@pytest.mark.parametrize("min_tokens", [0, 2, 3, 5])
def test_it_is_what_vllm_makes_of_a_preempted_request(min_tokens: int) -> None:
    preempted, resumed = new_batch(), new_batch()
    add(preempted, list(OUTPUT), min_tokens=min_tokens)
    preempted.refresh_metadata()
    state = add(resumed, [], min_tokens=min_tokens)
    runner = SimpleNamespace(requests={"a": state}, input_batch=resumed)
    take_up(runner, {"a": OUTPUT}, {})
    for name in ("token_ids_cpu", "is_token_ids", "num_tokens_no_spec", "num_prompt_tokens"):
        assert (getattr(resumed, name)[0] == getattr(preempted, name)[0]).all(), name
    ours, theirs = resumed.sampling_metadata, preempted.sampling_metadata
    assert ours.output_token_ids == theirs.output_token_ids == [OUTPUT]
    assert ours.prompt_token_ids.tolist() == theirs.prompt_token_ids.tolist()
    pairs = zip(resumed.logitsprocs.all, preempted.logitsprocs.all, strict=True)
    for mine, other in pairs:
        assert mine.min_toks.keys() == other.min_toks.keys()
    assert state.num_tokens == len(PROMPT) + len(OUTPUT)
