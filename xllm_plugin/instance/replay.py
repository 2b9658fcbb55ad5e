"""An engine client that continues a request after tokens that another instance has generated.

vLLM's own serving object writes the whole stream, from its first event on.  For the tokens that the
client has, it is given back what the first instance gave it, event by event; so its parsers,
offsets and counts stand where they stood there.  The engine gets the tokens with the request, as
output of one that was preempted (`worker/resumed.py`).  Events are pulled: once the engine's first
new output is asked for, all that were made from replayed tokens have been yielded, and `is_live`
says so.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.outputs import LogprobsLists

from xllm_plugin.accelerator.platform import OWN_SCHEDULERS
from xllm_plugin.instance.promises import current_request, with_headers
from xllm_plugin.instance.resumption import Finish, Resumption
from xllm_plugin.scheduler.promise import KEYS
from xllm_plugin.worker.resumed import RESUMED_ARG

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
    from vllm.v1.engine.parallel_sampling import ParentRequest

__all__ = ["ReplayingEngine", "keeps_seeds", "refusal"]

# A chat that ends in a tool call says "tool_calls" where the engine said "stop".
_FINISH_REASONS = {str(reason): reason for reason in FinishReason} | {
    "tool_calls": FinishReason.STOP
}


def refusal(params: SamplingParams, *, has_seeds: bool) -> str | None:
    """Why a request cannot be continued exactly, or None if it can.

    What an engine keeps for a request follows from its tokens, but for what is named here.

    Args:
        params: of the request.
        has_seeds: see `keeps_seeds`.
    """
    is_random = params.temperature > 0
    others = (params.extra_args or {}).keys() - set(KEYS)  # promises hold wherever it runs
    reasons = {
        "n > 1": params.n != 1,
        "a seed with a temperature": params.seed is not None and is_random and not has_seeds,
        "a thinking token budget": params.thinking_token_budget is not None,
        "prompt log probabilities": params.prompt_logprobs is not None,
        "extra arguments": bool(others),
        "watermarking": bool(params.watermarking),
    }
    return next((name for name, is_used in reasons.items() if is_used), None)


def keeps_seeds(config: VllmConfig) -> bool:
    """Whether it is known here how many numbers a seeded request has drawn: one a token.

    So it is with the sampler that vLLM has for these CPUs (`TopKTopPSampler.forward_cpu`), not with
    drafts, nor with `--use-fp64-gumbel`; and the family's runner has to draw them.
    """
    return (
        getattr(current_platform, "xllm_skips_draws", False)
        and current_platform.get_cpu_architecture() in (CpuArchEnum.X86, CpuArchEnum.ARM)
        and config.speculative_config is None
        and not config.model_config.use_fp64_gumbel
    )


class ReplayingEngine:
    """Stands before the server's engine client for one request.

    Args:
        engine: the server's own, an `AsyncLLM`.
        resumption: what to replay.
    """

    def __init__(self, engine: Any, resumption: Resumption) -> None:
        self._engine = engine
        self._resumption = resumption
        self._replayed: list[RequestOutput] = []
        self.is_live = not resumption.chunks
        """Whether what the serving object yields now is new to the client."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, *args: Any, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """As `AsyncLLM.generate`, beginning with the replayed outputs.

        Raises:
            VLLMValidationError: this request cannot be continued exactly.
        """
        config = self._engine.vllm_config
        scheduler = config.scheduler_config.scheduler_cls
        if scheduler not in OWN_SCHEDULERS:
            raise VLLMValidationError(
                f"No stream can be continued here: --scheduler-cls {scheduler} takes no request "
                "that comes with tokens."
            )
        reason = refusal(sampling_params, has_seeds=keeps_seeds(config))
        if reason is None and prompt.get("type") not in ("token", "multimodal"):
            reason = f"a prompt of type {prompt.get('type')!r}"
        if reason is not None:
            raise VLLMValidationError(f"A stream with {reason} cannot be continued here.")
        _check_tokens(prompt["prompt_token_ids"], self._resumption, config.model_config)
        # Admission has let it in elsewhere; the promise holds here too.
        sampling_params.extra_args = with_headers(sampling_params.extra_args, current_request.get())
        return self._outputs(prompt, sampling_params, *args, **options)

    async def add_request(self, *args: Any, **options: Any) -> RequestOutputCollector:
        """vLLM's own, run on this object, so that it ends in `_add_request` below."""
        return await type(self._engine).add_request(self, *args, **options)

    async def _outputs(self, *args: Any, **options: Any) -> AsyncIterator[RequestOutput]:
        live = type(self._engine).generate(self, *args, **options)
        try:
            first = await anext(live)
            for output in self._replayed:
                # Reported once, with the first output; of the prompt alone.
                output.num_cached_tokens = min(
                    first.num_cached_tokens or 0, len(first.prompt_token_ids)
                )
                yield output
            if self._resumption.finish is None:
                self.is_live = True
            yield first
            self.is_live = True
            async for output in live:
                yield output
        except Exception:  # what is said about any of them is new to the client; raised again
            self.is_live = True
            raise
        finally:
            await live.aclose()

    async def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent: ParentRequest | None,
        index: int,
        queue: RequestOutputCollector,
    ) -> None:
        """Register the original request; send the engine one that begins after the tokens."""
        processor = self.output_processor
        self.check_admission(request_id=request.request_id)
        params = request.sampling_params
        assert params is not None
        assert params.max_tokens is not None
        finish = self._resumption.finish
        if finish is None and params.max_tokens <= self._resumption.num_tokens:
            raise VLLMValidationError("A stream that has all its tokens has nothing to continue.")
        processor.add_request(request, prompt, parent, index, queue)
        state = processor.request_states[request.request_id]
        try:
            self._replayed = _replay(state, self._resumption.chunks, finish)
        except BaseException:  # also cancelled: nobody would run the request; raised again
            processor.abort_requests([request.request_id], internal=True)
            raise
        if finish is not None:
            state.queue = None
            processor.abort_requests([request.request_id], internal=True)
            queue.put(self._replayed.pop())
            return
        await self.engine_core.add_request_async(_continued(request, self._resumption.chunks))


def _check_tokens(prompt: list[int], resumption: Resumption, model: ModelConfig) -> None:
    """Refuse what would end the engine; vLLM checks the prompt alone."""
    most = model.get_vocab_size()
    if not all(0 <= token < most for chunk in resumption.chunks for token in chunk):
        raise VLLMValidationError(f"The tokens sent so far are not all below {most}.")
    num_tokens = len(prompt) + resumption.num_tokens
    if resumption.finish is None and num_tokens >= model.max_model_len:
        raise VLLMValidationError(
            f"Prompt and tokens sent so far are {num_tokens} tokens, which leaves no room for "
            f"another: --max-model-len is {model.max_model_len}."
        )


def _replay(
    state: RequestState, chunks: list[list[int]], finish: Finish | None
) -> list[RequestOutput]:
    """Bring `state` to where the first instance's was; returns the outputs that led there."""
    outputs: list[RequestOutput] = []
    interval, state.stream_interval = state.stream_interval, 1
    for number, chunk in enumerate(chunks, 1):
        reason = None
        if finish is not None and number == len(chunks):
            reason = _FINISH_REASONS[finish.finish_reason]
        outputs.append(_replay_one(state, list(chunk), reason, finish))
    state.stream_interval = interval
    state.sent_tokens_offset = state.detokenizer.num_output_tokens()
    return outputs


def _replay_one(
    state: RequestState, chunk: list[int], reason: FinishReason | None, finish: Finish | None
) -> RequestOutput:
    stop_reason = finish.stop_reason if reason is not None and finish is not None else None
    by_token = reason is FinishReason.STOP and not isinstance(stop_reason, str)
    stop = state.detokenizer.update(chunk, by_token)
    if stop is not None and reason is None:
        raise VLLMValidationError(
            f"The tokens sent so far contain the stop string {stop!r} as this server reads them; "
            "it is not a copy of the instance that began the stream."
        )
    if state.logprobs_processor.num_logprobs is not None and chunk:
        state.logprobs_processor.update_from_output(_with_log_probs(state.request_id, chunk))
    output = state.make_request_output(chunk, None, reason, stop_reason)
    assert output is not None  # an interval of 1 holds nothing back
    return output


def _with_log_probs(request_id: str, chunk: list[int]) -> EngineCoreOutput:
    """Tokens with a log probability, which nobody sees; their texts count for offsets."""
    size = len(chunk)
    lists = LogprobsLists(
        np.array(chunk).reshape(size, 1), np.zeros((size, 1)), np.ones(size, dtype=np.int64)
    )
    return EngineCoreOutput(request_id=request_id, new_token_ids=chunk, new_logprobs=lists)


def _continued(request: EngineCoreRequest, chunks: list[list[int]]) -> EngineCoreRequest:
    sent = copy.copy(request)
    assert request.sampling_params is not None
    sent.sampling_params = params = request.sampling_params.clone()
    tokens = [token for chunk in chunks for token in chunk]
    params.extra_args = {**(params.extra_args or {}), RESUMED_ARG: tokens}
    return sent
