"""The real SmolLM2, when it was prepared before: whole, and able to add."""

from __future__ import annotations

import importlib

import pytest

from xllm_plugin.models import ModelCache, prepare
from xllm_plugin.models.libraries import load_transformers

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not ModelCache.at().model("smollm2").is_dir(),
        reason="not in the cache; `xllm model smollm2` puts it there",
    ),
]


def test_greedy_answer_is_sensible() -> None:
    tf, torch = load_transformers(), importlib.import_module("torch")
    folder = prepare("smollm2", verify=True)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 7 + 5?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**question, max_new_tokens=40, do_sample=False)
    assert "12" in tokenizer.decode(made[0][question["input_ids"].shape[1] :])
