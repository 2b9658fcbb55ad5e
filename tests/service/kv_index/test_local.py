"""Copies of what instances hand out: none of it can keep a process from its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from xllm_plugin.service.kv_index.local import LocalCopies, LocalCopy
from xllm_plugin.service.lifecycle import State

HANGS = """
import asyncio, threading
from xllm_plugin.service.kv_index.local import LocalCopies

started = threading.Event()

def never(body):
    started.set()
    while True:
        pass

async def main():
    copies = LocalCopies(None)
    copies._start(copies._made(never, b""))
    while not started.is_set():
        await asyncio.sleep(0.01)
    copies.close()

asyncio.run(main())
print("ended")
"""


def test_a_copy_that_is_never_done_keeps_no_process_from_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_what_a_copy_raises_is_raised_where_it_is_awaited() -> None:
    async def made(make: Callable[[bytes], Any]) -> Any:
        copies: LocalCopies = LocalCopies(SimpleNamespace())  # type: ignore[arg-type]
        return await copies._made(make, b"7")

    with pytest.raises(ValueError, match="no number"):
        asyncio.run(made(fail))
    assert asyncio.run(made(SimpleBody)).body == b"7"


class SimpleBody:
    """Can be referred to weakly."""

    def __init__(self, body: bytes) -> None:
        self.body = body


def fail(body: bytes) -> None:
    raise ValueError(f"no number: {body!r}")


def test_copies_go_when_their_instance_has_gone_and_another_one_comes() -> None:
    async def check() -> None:
        copies = LocalCopies(SimpleNamespace())  # type: ignore[arg-type]
        copies._start = lambda running: running.close()  # type: ignore[method-assign]
        one, two, new_one = (instance(name) for name in ("one", "two", "one"))
        of_one, of_two = copies.of(one, "m"), copies.of(two, "m")
        assert copies.of(one, "m") is of_one
        assert copies.of(new_one, "m") is not of_one  # replaced under its name
        new_one.life = SimpleNamespace(state=State.GONE, incarnation="a")
        copies.of(instance("three"), "m")
        assert list(copies._copies) == ["two", "three"]
        assert copies.of(two, "m") is of_two

    asyncio.run(check())


def instance(name: str) -> Any:
    life = SimpleNamespace(state=State.READY, incarnation="a")
    return SimpleNamespace(name=name, models={"m": {}}, life=life)


@pytest.mark.parametrize("error", [msgspec.DecodeError("{"), OSError("gone"), ValueError("500")])
def test_an_instance_that_cannot_say_is_not_compared(error: Exception) -> None:
    async def tokens(*_: object) -> list[int]:
        raise error

    assert compared(tokens) == (0, True)


@pytest.mark.parametrize(
    ("ids", "expected"), [([1], (0, True)), ([2], (1, False)), ([-1], (0, True))]
)
def test_a_copy_that_differs_is_not_used_again(ids: list[int], expected: tuple[int, bool]) -> None:
    async def tokens(*_: object) -> list[int]:
        return ids

    assert compared(tokens) == expected


def compared(tokens: Callable[..., Any]) -> tuple[int, bool]:
    """How many are misread, and whether the copy is still used."""

    async def run() -> tuple[int, bool]:
        copies = LocalCopies(SimpleNamespace(tokens=tokens))  # type: ignore[arg-type]
        copy = LocalCopy("i")
        renderer: Any = object()
        copy.renderer = renderer
        instance: Any = SimpleNamespace(name="a")
        await copies._compare(copy, instance, b"{}", b"\x01\x00\x00\x00")
        return copies.num_misread, copy.renderer is renderer

    return asyncio.run(run())
