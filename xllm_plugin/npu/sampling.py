"""Top-k and top-p in one operator, where vLLM sorts the vocabulary and puts it back.

npu_top_k_top_p follows the formula of `apply_top_k_top_p_pytorch`
(vllm/v1/sample/ops/topk_topp_sampler.py), for a k of at most 1024 (torch_npu 2.13.0,
_op_plugin_docs.py).  A request without top-k has the vocabulary's size as its k, so a step in which
some have one and some have not is vLLM's, and so is its trial before there are requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

__all__ = ["NpuTopKTopPSampler", "filter_on_device"]

MAX_K = 1024


class NpuTopKTopPSampler(TopKTopPSampler):
    """vLLM's sampler, whose filter is the device's (seam "npu-sampler").

    Args:
        logprobs_mode: see vLLM's.
        use_fp64_gumbel: see vLLM's.
        largest_k: the largest top-k of the requests in this step, by the host's own record: to ask
            the tensor would wait for the device.
    """

    def __init__(
        self, logprobs_mode: Any, use_fp64_gumbel: bool, largest_k: Callable[[], float]
    ) -> None:
        super().__init__(logprobs_mode, use_fp64_gumbel)
        self.largest_k = largest_k

    def forward_native(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See vLLM's sampler.

        Args:
            logits: [requests, vocabulary] float32.
            generators: of the requests with a seed.
            k: [requests] int32.
            p: [requests] float32.
        """
        is_filtered = k is not None or p is not None
        if is_filtered and (k is None or self.largest_k() <= MAX_K):
            logits, k, p = torch_npu.npu_top_k_top_p(logits.contiguous(), p, k), None, None
        return super().forward_native(logits, generators, k, p)


def filter_on_device(runner: Any) -> None:
    """Put it into a runner's sampler.

    Args:
        runner: vLLM's V1 runner.
    """

    def largest_k() -> float:
        batch = runner.input_batch
        return float(batch.top_k_cpu[: batch.num_reqs].max()) if batch.num_reqs else math.inf

    theirs = runner.sampler.topk_topp_sampler
    runner.sampler.topk_topp_sampler = NpuTopKTopPSampler(
        theirs.logprobs_mode, theirs.use_fp64_gumbel, largest_k
    )
