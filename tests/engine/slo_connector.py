"""A KV connector that fills prompts' keys and values with a constant, at once or a step later.

What it fills is the same under every scheduler, so answers can be compared.  What a scheduler sees
is what any connector shows it: tokens that it need not compute, some of them on their way.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import (
    DecodeBenchConnector,
)


class LaterConnector(DecodeBenchConnector):
    """vLLM's connector for benchmarks; every other prompt's fill is a load in the background."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._arrived: set[str] = set()

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """As many tokens as before; of every other request in the background."""
        num, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        is_later = int(request.request_id.split("-")[0]) % 2 == 1
        return num, bool(num) and is_later

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Fill, and remember whose load that ends."""
        super().start_load_kv(forward_context, **kwargs)
        self._arrived.update(self._connector_metadata.reqs_to_fill)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """What has been loaded in the background."""
        del finished_req_ids
        arrived, self._arrived = self._arrived, set()
        return None, {name for name in arrived if int(name.split("-")[0]) % 2 == 1} or None
