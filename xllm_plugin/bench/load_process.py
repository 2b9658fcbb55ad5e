"""The load generator's process: vLLM's own benchmark client, one load point a line.

`python -m xllm_plugin.bench.load_process` reads one JSON object a line from standard input, runs
`vllm.benchmarks.serve.benchmark` (the function behind `vllm bench serve`) with it, and answers with
one JSON line.  One process serves a whole run, because importing vLLM costs ten seconds and 600 MB,
which as a new `vllm bench serve` for every load point would take longer than the load.

What it does not use of `vllm bench serve`: the warm-up and the ready check, both of which send the
first request of the set and so leave it in the prefix cache; and the percentiles, which the parent
computes from the raw times so that it can also pool them.

It runs with ``XLLM_PLATFORM=native``: nothing of ours but this file is in it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

from xllm_plugin.bench.replies import reply, take_stdout


def main() -> None:
    """Serve load points until standard input ends."""
    replies = take_stdout()
    # Discovers platforms first: the plugin's entry point repairs what else would fail to import.
    import vllm.platforms

    _ = vllm.platforms.current_platform
    import vllm.benchmarks.serve

    reply(replies, {"ready": True})
    for line in sys.stdin:
        reply(replies, _measure(json.loads(line)))


def _measure(point: dict[str, Any]) -> dict[str, Any]:
    """Run one load point; see `xllm_plugin.bench.load.LoadClient.measure` for its fields."""
    import numpy as np
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    np.random.seed(point["seed"])  # noqa: NPY002 - what benchmark() draws its arrivals from
    requests = [
        SampleRequest(
            prompt=request["prompt"],
            prompt_len=len(request["prompt"]),
            expected_output_len=request["output_tokens"],
        )
        for request in point["requests"]
    ]
    gc.collect()
    cpu_before_s = time.process_time()
    result = asyncio.run(
        benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{point['base_url']}/v1/completions",
            base_url=point["base_url"],
            model_id=point["model"],
            model_name=point["model"],
            tokenizer=None,
            input_requests=requests,
            logprobs=None,
            request_rate=point["request_rate"] or float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=[],
            selected_percentiles=[],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=point["clients"],
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0.0},
            ready_check_timeout_sec=0,
        )
    )
    wanted = ("duration", "output_lens", "input_lens", "ttfts", "latencies", "itls", "errors")
    return {
        **{name: result[name] for name in wanted},
        "client_cpu_s": time.process_time() - cpu_before_s,
    }


if __name__ == "__main__":
    main()
