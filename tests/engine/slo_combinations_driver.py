"""The policy slo with what changes requests, batches and KV: one engine, one scenario.

``python slo_combinations_driver.py MODEL COMBINATION``; `test_slo_combinations` compares.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from PIL import Image
from slo_driver import CLASSES, LONG, Driver, compare, greedy


class Multimodal(Driver):
    """Images in prompts that are read in chunks."""

    def __init__(self, model: str) -> None:
        super().__init__(model, limit_mm_per_prompt={"image": 1})

    def multimodal(self) -> list[Any]:
        """Every other request shows a picture of its own, or one that was shown before."""
        prompts: list[Any] = []
        for i in range(16):
            text = f"{i} " + LONG * (i % 3)
            if i % 2:
                prompts.append(text)
                continue
            random = np.random.default_rng(i % 6)
            pixels = random.integers(0, 255, (112, 112, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            prompts.append({"prompt": f"<image>{text}", "multi_modal_data": {"image": image}})
        return self._run(prompts, [greedy(CLASSES[i % 4]) for i in range(16)])


class Speculation(Driver):
    """Drafts of several tokens, and prompts of one."""

    def __init__(self, model: str) -> None:
        drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
        super().__init__(model, speculative_config={**drafts, "prompt_lookup_min": 1})

    def speculation(self) -> list[Any]:
        """Long answers repeat themselves, so that drafts are made and taken."""
        prompts = [
            {"prompt_token_ids": [40 + i]} if i % 3 == 0 else f"{i} " + LONG * (i % 4)
            for i in range(20)
        ]
        return self._run(prompts, [greedy(CLASSES[i % 4], max_tokens=40) for i in range(20)])


class Connector(Driver):
    """Tokens that somebody else has computed, there at once or a while later."""

    def __init__(self, model: str) -> None:
        connector = {"kv_connector": "LaterConnector", "kv_role": "kv_both"}
        connector["kv_connector_module_path"] = "slo_connector"
        super().__init__(model, kv_transfer_config=connector, enable_prefix_caching=False)

    def connector(self) -> list[Any]:
        """Prompts of all lengths; a preempted request computes its tokens itself."""
        return self._run(
            [f"{i} " + LONG * (i % 5) for i in range(20)],
            [greedy(CLASSES[i % 4], max_tokens=24) for i in range(20)],
        )


COMBINATIONS = {
    "multimodal": Multimodal,
    "speculation": Speculation,
    "connector": Connector,
}

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    asked_model, asked = sys.argv[1:]
    compare(COMBINATIONS[asked](asked_model))
