"""The policy slo with what changes requests, batches and KV: one engine, one scenario.

``python slo_combinations_driver.py MODEL COMBINATION``; `test_slo_combinations` compares.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from slo_driver import CLASSES, LONG, Driver, compare, promised
from vllm.lora.request import LoRARequest

NUM_ADAPTERS = 3
RANK = 8


def make_adapter(model: Path, folder: Path, seed: int) -> LoRARequest:
    """An adapter of random weights, large enough to change the answers."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {"q_proj": config["num_attention_heads"] * head}
    rows["v_proj"] = config["num_key_value_heads"] * head
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in rows.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(RANK, hidden, generator=random) / 3
            weights[f"{prefix}.lora_B.weight"] = torch.randn(size, RANK, generator=random) / 3
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"target_modules": list(rows), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest(f"a{seed}", seed, str(folder))


class Lora(Driver):
    """More adapters than one step has room for.

    Every request has one: on a CPU, vLLM 0.32's own order computes rows without an adapter with
    that of the last slot where others in the step have one.  The policy gives them steps of their
    own (`xllm_plugin/scheduler/adapters.py`), so that their answers would differ, ours being right.
    """

    def __init__(self, model: str, folder: Path) -> None:
        rooms = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": NUM_ADAPTERS}
        super().__init__(model, max_lora_rank=RANK, **rooms)
        numbers = range(1, NUM_ADAPTERS + 1)
        self._adapters = [make_adapter(Path(model), folder / f"{i}", i) for i in numbers]

    def lora(self) -> list[Any]:
        """Classes and adapters in every combination."""
        return self._run(
            [f"{i} " + LONG * (i % 4) for i in range(24)],
            [promised(CLASSES[i % 4]) for i in range(24)],
            adapters=[self._adapters[i // 4 % NUM_ADAPTERS] for i in range(24)],
        )


class Multimodal(Driver):
    """Images in prompts that are read in chunks."""

    def __init__(self, model: str, folder: Path) -> None:
        del folder
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
        return self._run(prompts, [promised(CLASSES[i % 4]) for i in range(16)])


class Speculation(Driver):
    """Drafts of several tokens, and prompts of one."""

    def __init__(self, model: str, folder: Path) -> None:
        del folder
        drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
        super().__init__(model, speculative_config={**drafts, "prompt_lookup_min": 1})

    def speculation(self) -> list[Any]:
        """Long answers repeat themselves, so that drafts are made and taken."""
        prompts = [
            {"prompt_token_ids": [40 + i]} if i % 3 == 0 else f"{i} " + LONG * (i % 4)
            for i in range(20)
        ]
        return self._run(prompts, [promised(CLASSES[i % 4], max_tokens=40) for i in range(20)])


class Connector(Driver):
    """Tokens that somebody else has computed, there at once or a while later."""

    def __init__(self, model: str, folder: Path) -> None:
        del folder
        connector = {"kv_connector": "LaterConnector", "kv_role": "kv_both"}
        connector["kv_connector_module_path"] = "slo_connector"
        super().__init__(model, kv_transfer_config=connector, enable_prefix_caching=False)

    def connector(self) -> list[Any]:
        """Prompts of all lengths; a preempted request computes its tokens itself."""
        return self._run(
            [f"{i} " + LONG * (i % 5) for i in range(20)],
            [promised(CLASSES[i % 4], max_tokens=24) for i in range(20)],
        )


COMBINATIONS = {
    "lora": Lora,
    "multimodal": Multimodal,
    "speculation": Speculation,
    "connector": Connector,
}

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    asked_model, asked = sys.argv[1:]
    with tempfile.TemporaryDirectory() as made:
        compare(COMBINATIONS[asked](asked_model, Path(made)))
