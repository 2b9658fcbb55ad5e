"""What does the exact prefix index cost in time and in memory?  See README.md beside this file."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import click
import msgspec
from rich.console import Console

from xllm_plugin.bench import schema
from xllm_plugin.bench.commands import conclude
from xllm_plugin.bench.options import command_line, common_options
from xllm_plugin.bench.schema import Check, Figure, Row
from xllm_plugin.instance.chat_form import ChatForm, TemplateForm
from xllm_plugin.models import prepare
from xllm_plugin.service.kv_index.chats import ChatRenderer
from xllm_plugin.service.kv_index.index import Cache, Chains, PrefixIndex, packed
from xllm_plugin.service.kv_index.local import Tokenizer
from xllm_plugin.service.kv_index.wire import Batch, BlockHash, BlockStored, decode

NAME = "kv_index"
QUESTION = "What does the exact prefix index cost in time and in memory?"
PROMPT_TOKENS: Final = 100_000
AT_MOST_MS: Final = 2.0
BLOCK_SIZE: Final = 16
BLOCKS_AN_EVENT: Final = 64
HASH_BYTES: Final = 32
INSTANCES, INSTANCES_QUICK = (1, 16, 64), (1, 2)
MODEL: Final = "smollm2"
CHAT_CHARACTERS: Final = 8_000
ENGLISH: Final = "\n".join(topics.values())
"""The manual of Python, as its interpreter has it."""
TURNS: Final = (1, 21)
REPEATS, REPEATS_QUICK = 51, 3
NUM_BLOCKS, NUM_BLOCKS_QUICK = 100_000, 2_000
NOTES: Final = (
    (
        f"Processor time of this machine. Blocks have {BLOCK_SIZE} tokens; every instance holds "
        "the whole chain, which is the longest walk."
    ),
    (
        "Memory is what Python has allocated (tracemalloc): hashes of 32 bytes, as vLLM "
        "publishes them unless told otherwise, and one key and one set of holders a block."
    ),
    (
        f"Chats are pieces of Python's manual, with template and tokenizer of {MODEL}, each new. "
        "Until rendering is known to agree, an instance is asked for each instead."
    ),
)


def payloads(num_blocks: int) -> Iterator[bytes]:
    """One long chain as vLLM publishes it: hashes of 32 bytes, so many blocks an event."""
    parent: BlockHash | None = None
    for start in range(0, num_blocks, BLOCKS_AN_EVENT):
        blocks = range(start, min(num_blocks, start + BLOCKS_AN_EVENT))
        hashes: list[BlockHash] = [block.to_bytes(HASH_BYTES, "big") for block in blocks]
        tokens = list(range(blocks.start * BLOCK_SIZE, blocks.stop * BLOCK_SIZE))
        event = BlockStored(hashes, parent, tokens, BLOCK_SIZE, medium="GPU")
        yield msgspec.msgpack.encode(Batch(0.0, [event]))
        parent = hashes[-1]


def fill(index: PrefixIndex, cache: Cache, num_blocks: int) -> None:
    """Have `cache` hold the chain."""
    for payload in payloads(num_blocks):
        for event in decode(payload).events:
            index.apply(cache, event)


def filled(num_instances: int, num_blocks: int) -> PrefixIndex:
    """An index of instances that all hold the chain."""
    index = PrefixIndex()
    for _ in range(num_instances):
        fill(index, index.add(), num_blocks)
    return index


def lookup_rows(instances: Sequence[int], repeats: int) -> list[Row]:
    """A prompt that every instance holds, so that its whole chain is walked."""
    found, tokens = [], packed(range(PROMPT_TOKENS))
    for num_instances in instances:
        index = filled(num_instances, PROMPT_TOKENS // BLOCK_SIZE)
        chains: Chains = {}
        asked: dict[str, Callable[[], object]] = {
            "a prompt that is new": partial(index.holders, tokens),
            "one that was asked before": partial(index.holders, tokens, chains=chains),
        }
        figures = tuple(
            Figure.of(name, "ms", _cpu_ms(function, repeats)) for name, function in asked.items()
        )
        (one,) = index.holders(tokens)
        assert one.caches.bit_count() == num_instances
        assert one.num_tokens == (PROMPT_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
        labels = {"instances that hold it": str(num_instances)}
        found.append(
            Row(table=f"Lookup of {PROMPT_TOKENS:,} tokens", labels=labels, figures=figures)
        )
    return found


def _cpu_ms(function: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of processor time; the first call warms up."""
    found = []
    for repeat in range(-1, repeats):
        began_s = time.process_time()
        function()
        if repeat >= 0:
            found.append((time.process_time() - began_s) * 1e3)
    return found


def event_row(num_blocks: int, repeats: int) -> Row:
    """Reading and applying what one instance publishes."""
    sent = list(payloads(num_blocks))
    spent_us = []
    for _ in range(repeats):
        index = PrefixIndex()
        cache = index.add()
        began_s = time.process_time()
        for payload in sent:
            for event in decode(payload).events:
                index.apply(cache, event)
        spent_us.append((time.process_time() - began_s) * 1e6 / num_blocks)
    return Row(
        table="Events",
        labels={"blocks an event": str(BLOCKS_AN_EVENT)},
        figures=(Figure.of("a stored block", "us", spent_us),),
    )


def memory_row(num_instances: int, num_blocks: int) -> Row:
    """What Python has allocated for the index, by blocks that an instance holds."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        index = filled(num_instances, num_blocks)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    index.check_integrity()
    held = num_blocks * num_instances
    return Row(
        table="Memory",
        labels={
            "instances that hold the same": str(num_instances),
            "blocks of each": f"{num_blocks:,}",
        },
        figures=(
            Figure.of("a block of an instance", "bytes", [(after - before) / held]),
            Figure.of("all", "MiB", [(after - before) / 2**20]),
        ),
    )


def chat_questions(num_turns: int, count: int) -> Iterator[bytes]:
    """New chats of English text as an instance would be asked for them."""
    draw, size = random.Random(num_turns), CHAT_CHARACTERS // num_turns
    for _ in range(count):
        messages = []
        for turn in range(num_turns):
            begin = draw.randrange(len(ENGLISH) - size)
            role = ("user", "assistant")[turn % 2]
            messages.append({"role": role, "content": ENGLISH[begin : begin + size]})
        yield json.dumps({"model": MODEL, "messages": messages}).encode()


def chat_row(folder: Path, num_turns: int, repeats: int) -> Row:
    """What the service does itself instead of asking an instance."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    side = TemplateForm(source=config["chat_template"], content_format="string")
    renderer = ChatRenderer(ChatForm(plain=side, with_tools=side, special_tokens={}))
    tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
    chats = iter(list(chat_questions(num_turns, 2 * (repeats + 1))))
    asked: dict[str, Callable[[], object]] = {
        "rendered": lambda: renderer.render(next(chats)),
        "rendered and tokenised": lambda: packed(tokenizer.ids(renderer.render(next(chats)).text)),
    }
    return Row(
        table=f"A new chat of {CHAT_CHARACTERS:,} characters, about 2,000 tokens",
        labels={"turns": str(num_turns)},
        figures=tuple(
            Figure.of(name, "ms", _cpu_ms(function, repeats)) for name, function in asked.items()
        ),
    )


@click.command(NAME)
@common_options(NAME)
def command(*, quick: bool, json_path: Path) -> None:
    """Time lookups and events of the prefix index, and weigh it."""
    run = schema.begin(NAME, question=QUESTION, command=command_line())
    repeats = REPEATS_QUICK if quick else REPEATS
    num_blocks = NUM_BLOCKS_QUICK if quick else NUM_BLOCKS
    lookups = lookup_rows(INSTANCES_QUICK if quick else INSTANCES, repeats)
    rows = [*lookups, event_row(num_blocks, max(1, repeats // 10))]
    rows += [memory_row(num_instances, num_blocks) for num_instances in (1, 16)]
    folder = prepare(MODEL)
    rows += [chat_row(folder, num_turns, repeats) for num_turns in TURNS]
    checks = [
        Check(
            name=f"{figure.name}, {row.labels['instances that hold it']} instances: about a "
            f"millisecond, at most {AT_MOST_MS:g}",
            passed=figure.median <= AT_MOST_MS,
            detail=f"median {figure.median:.2f} ms",
        )
        for row in lookups
        for figure in row.figures
    ]
    result = run.finish(
        rows=rows,
        checks=checks,
        notes=NOTES,
        not_shown=(
            "Asking an instance for tokens, ZMQ, several memories (device, host, disk) of a block.",
        ),
    )
    conclude(result, json_path, Console())
