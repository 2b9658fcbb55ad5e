"""Prompts that are remembered: found again only for the very same question."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.service.kv_index import prompts
from xllm_plugin.service.kv_index.index import NO_EXTRA, PrefixIndex, packed
from xllm_plugin.service.kv_index.prompts import Prompt, PromptMemory
from xllm_plugin.service.kv_index.wire import BlockStored


def prompt(number: int) -> Prompt:
    return Prompt(packed([number]), NO_EXTRA, {})


@pytest.mark.parametrize("length", [10, 8 * 1024, 8 * 1024 + 1, 220_000])
@given(st.data())
def test_a_question_that_differs_anywhere_is_another_one(length: int, data: st.DataObject) -> None:
    memory = PromptMemory()
    question = b"a" * length
    memory.put(question, prompt(1))
    at = data.draw(st.integers(0, length - 1))
    other = question[:at] + b"b" + question[at + 1 :]
    assert memory.get(other) is None
    assert memory.get(bytes(bytearray(question))) == prompt(1)
    memory.put(other, prompt(2))
    assert memory.get(other) == prompt(2)
    assert memory.get(question) in (None, prompt(1))


def test_of_two_with_the_same_parts_the_later_one_is_kept_and_counted_once() -> None:
    memory = PromptMemory()
    one, two = (b"a" * 9_000 + middle + b"a" * 211_000 for middle in (b"x", b"y"))
    assert prompts._key(one) == prompts._key(two)
    memory.put(one, prompt(1))
    num_bytes = memory.num_bytes
    memory.put(two, prompt(2))
    assert (len(memory), memory.num_bytes) == (1, num_bytes)
    assert (memory.get(one), memory.get(two)) == (None, prompt(2))
    memory.shrink(0)
    assert (len(memory), memory.num_bytes) == (0, 0)


def test_a_remembered_prompt_is_counted_with_its_keys() -> None:
    """Of whatever block sizes: those of the smallest would take most."""
    index = PrefixIndex()
    for size in (1, 8, 16, 32, 64):
        index.apply(index.add(), BlockStored([b"a"], None, [1] * size, size))
    known = Prompt(packed([1] * 1000), NO_EXTRA, {})
    assert index.holders(*known) == index.holders(known.tokens)
    assert known.chains is not None
    keys = [key for chain in known.chains.values() for key in chain]
    assert len(keys) == 999 // 16 + 999 // 32 + 999 // 64
    num_bytes = sum(map(sys.getsizeof, (*keys, *known.chains.values())))
    assert prompts._size(b"", known) >= len(known.tokens) + num_bytes
