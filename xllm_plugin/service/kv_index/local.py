"""Copies of the instances' tokenizers and chat templates, each used once its server agrees.

A copy belongs to one model of one incarnation of one instance, and has to give the ids of its
`/tokenize` for every sample.  Copies of the same text share one object.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import aiohttp
import msgspec
import tokenizers

from xllm_plugin.instance.chat_form import CHAT_FORM_PATH
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.kv_index import samples
from xllm_plugin.service.kv_index.asking import Asker, RefusedPromptError
from xllm_plugin.service.kv_index.chats import CannotRenderError, ChatRenderer
from xllm_plugin.service.kv_index.index import packed
from xllm_plugin.service.lifecycle import State

__all__ = ["LocalCopies", "LocalCopy", "Tokenizer"]

logger = logging.getLogger(__name__)

_TOKENIZER_PATH: Final = "/xllm/tokenizer"
_NUM_ASIDE: Final = 2
"""Copies that are made or tried at once."""
_NO_IDS: Final = (
    aiohttp.ClientError,
    OSError,
    ValueError,
    msgspec.DecodeError,
    OverflowError,
)
"""What asking for ids raises; the last: what came is none."""
_T = TypeVar("_T")


class Tokenizer:
    """A tokenizer of the library, which can be referred to weakly; its own cannot.

    Args:
        body: as an instance hands it out.

    Raises whatever the library raises.
    """

    def __init__(self, body: bytes) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(body.decode())
        # vLLM says both with every prompt; what the model's folder says of it does not count.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return found


class LocalCopy:
    """What one instance has handed out of one model, as far as it agrees with the instance."""

    def __init__(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.tokenizer: Tokenizer | None = None
        self.renderer: ChatRenderer | None = None

    def chat_ids(self, question: bytes) -> list[int]:
        """The token ids of a chat.

        Args:
            question: the body of a request to `/tokenize`.

        Raises:
            CannotRenderError: it has to be asked after all.
        """
        tokenizer, renderer = self.tokenizer, self.renderer
        if tokenizer is None or renderer is None:
            raise CannotRenderError("no template that its server agrees with")
        return _chat_ids(tokenizer, renderer, question)


class LocalCopies:
    """The copies of all instances.

    Args:
        asker: fetches and compares them.
    """

    def __init__(self, asker: Asker) -> None:
        self.num_misread = 0
        """Chats whose ids were others than their instance's, of those that were compared."""
        self._asker = asker
        self._copies: dict[str, tuple[Instance, dict[str, LocalCopy]]] = {}
        """By instance and model; of those that have gone, until another one comes."""
        self._shared: WeakValueDictionary[bytes, Any] = WeakValueDictionary()
        """By digest of what was handed out; gone with the last copy."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._aside = asyncio.Semaphore(_NUM_ASIDE)

    def of(self, instance: Instance, model: str) -> LocalCopy:
        """The copy of a model; one that is new is empty, and fetched for the next prompts."""
        models = self._of(instance)
        for gone in models.keys() - instance.models.keys():  # an adapter that was unloaded
            del models[gone]
        copy = models.get(model)
        if copy is None or copy.incarnation != instance.life.incarnation:
            models[model] = copy = LocalCopy(instance.life.incarnation)
            self._start(self._fill(copy, instance, model))
        return copy

    def compare(self, copy: LocalCopy, instance: Instance, question: bytes, tokens: bytes) -> None:
        """See, beside the traffic, whether the instance agrees on a chat; if not, it is asked on.

        Args:
            copy: that `tokens` are from.
            instance: whose copy that is.
            question: the chat.
            tokens: as they were found here.
        """
        self._start(self._compare(copy, instance, question, tokens))

    def close(self) -> None:
        """Stop fetching."""
        for task in self._tasks:
            task.cancel()

    def _of(self, instance: Instance) -> dict[str, LocalCopy]:
        known = self._copies.get(instance.name)
        if known is not None and known[0] is instance:
            return known[1]
        # One has come: those that have gone meanwhile are forgotten.
        self._copies = {
            name: (one, models)
            for name, (one, models) in self._copies.items()
            if one.life.state is not State.GONE
        }
        models: dict[str, LocalCopy] = {}
        self._copies[instance.name] = instance, models
        return models

    def _start(self, running: Any) -> None:
        task = asyncio.get_running_loop().create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fill(self, copy: LocalCopy, instance: Instance, model: str) -> None:
        try:
            copy.tokenizer = await self._tokenizer(instance, model)
            if copy.tokenizer is not None:
                copy.renderer = await self._renderer(copy.tokenizer, instance, model)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            logger.info("prompts of %s are left to %s: %s", model, instance.name, error)
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare ones for what it cannot read
            logger.info("the tokenizer of %s cannot be read: %s", model, error)

    async def _tokenizer(self, instance: Instance, model: str) -> Tokenizer | None:
        body = await self._asker.handed_out(instance, _TOKENIZER_PATH)
        if body is None:
            return None
        tokenizer = await self._made(Tokenizer, body)
        for text in samples.TEXTS:
            question = msgspec.json.encode({"model": model, "prompt": text})
            if tokenizer.ids(text) != await self._asker.tokens(instance, question):
                logger.warning(
                    "tokenizer of %s differs from what its server does; it is asked instead", model
                )
                return None
        return tokenizer

    async def _renderer(
        self, tokenizer: Tokenizer, instance: Instance, model: str
    ) -> ChatRenderer | None:
        body = await self._asker.handed_out(instance, CHAT_FORM_PATH)
        if body is None:
            return None
        renderer = await self._made(ChatRenderer.read, body)
        num_rendered = 0
        for chat in samples.CHATS:
            question = msgspec.json.encode({"model": model, **chat})
            found = await self._found_aside(partial(_ids_or_none, tokenizer, renderer, question))
            if found != await self._ids_or_none(instance, question):
                logger.warning(
                    "chats of %s are rendered otherwise by its server %s than here; it is asked "
                    "instead",
                    model,
                    instance.name,
                )
                return None
            num_rendered += found is not None
        return renderer if num_rendered else None

    async def _made(self, make: Callable[[bytes], _T], body: bytes) -> _T:
        digest = hashlib.blake2b(body, digest_size=16).digest()
        found: _T | None = self._shared.get(digest)
        if found is None:
            made = await self._found_aside(partial(make, body))
            found = self._shared.setdefault(digest, made)
        return found

    async def _found_aside(self, find: Callable[[], _T]) -> _T:
        async with self._aside:
            return await _on_thread_of_its_own(find)

    async def _compare(
        self, copy: LocalCopy, instance: Instance, question: bytes, tokens: bytes
    ) -> None:
        try:
            ids = await self._ids_or_none(instance, question)
            expected = None if ids is None else packed(ids)
        except _NO_IDS as error:
            logger.debug("a chat could not be compared: %s", error)
            return
        if expected is not None and expected != tokens:  # None: its client gets an error
            self.num_misread += 1
            copy.renderer = None
            logger.warning(
                "a chat for %s was rendered otherwise than its server does; it is asked instead",
                instance.name,
            )

    async def _ids_or_none(self, instance: Instance, question: bytes) -> list[int] | None:
        try:
            return await self._asker.tokens(instance, question)
        except RefusedPromptError:
            return None


async def _on_thread_of_its_own(find: Callable[[], _T]) -> _T:
    """What takes long, on a thread that a process does not wait for when it ends.

    A pool's threads are joined at the end, and what an instance hands out may never come to one.
    """
    found: Future[_T] = Future()

    def run() -> None:
        if not found.set_running_or_notify_cancel():
            return
        try:
            found.set_result(find())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised where it is awaited
            found.set_exception(error)

    threading.Thread(target=run, name="copy", daemon=True).start()
    return await asyncio.wrap_future(found)


def _chat_ids(tokenizer: Tokenizer, renderer: ChatRenderer, question: bytes) -> list[int]:
    rendered = renderer.render(question)
    return tokenizer.ids(rendered.text, add_special_tokens=rendered.add_special_tokens)


def _ids_or_none(tokenizer: Tokenizer, renderer: ChatRenderer, question: bytes) -> list[int] | None:
    try:
        return _chat_ids(tokenizer, renderer, question)
    except CannotRenderError:
        return None
