"""The items of the benchmark's tasks, read from the checkout: lm-eval calls these, no hub is asked.

The task files name these functions (`custom_dataset: !function items.arc_easy`), because lm-eval
resolves `data_files` against the working folder, and the benchmark must run from any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "data"

Split = dict[str, Any]


def read(name: str) -> list[dict[str, Any]]:
    """The items of one data file, in file order."""
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def arc_easy(**_: object) -> Split:
    """ARC-Easy: a question, its choices, the index of the right one."""
    return _splits(test=read("arc_easy"))


def lambada(**_: object) -> Split:
    """LAMBADA: a passage, split into all but the last word, and the last word."""
    return _splits(test=[_split_last_word(item["text"]) for item in read("lambada")])


def hellaswag(**_: object) -> Split:
    """HellaSwag: the beginning of a text, possible endings, the index of the real one."""
    return _splits(test=read("hellaswag"))


def gsm8k(**_: object) -> Split:
    """GSM8K: word problems with worked answers; a split of its own for the prompt's examples."""
    return _splits(test=read("gsm8k"), fewshot=read("gsm8k_fewshot"))


def _splits(**items: list[dict[str, Any]]) -> Split:
    from datasets import Dataset  # type: ignore[import-untyped]  # comes with lm-eval

    return {split: Dataset.from_list(rows) for split, rows in items.items()}


def _split_last_word(passage: str) -> dict[str, str]:
    context, _, word = passage.rpartition(" ")
    return {"context": context, "word": word}
