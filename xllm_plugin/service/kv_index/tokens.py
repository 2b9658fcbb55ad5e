"""The token ids of a request's prompt, as its instance will see them.

Prompts of ids are taken as they are.  Texts are tokenised and chats rendered here, on threads (the
tokenizer releases the interpreter's lock), with what an instance of ours hands out, once that has
given the ids of this instance for every sample (`local.py`).  All else (chats with more than text,
texts and chats for plain servers) is asked of an instance: `POST /tokenize`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeGuard

import aiohttp
import msgspec

from xllm_plugin.service.body import PromptFields
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.kv_index.asking import Asker
from xllm_plugin.service.kv_index.chats import CannotRenderError
from xllm_plugin.service.kv_index.index import NO_EXTRA, Extra, packed, prompt_extra
from xllm_plugin.service.kv_index.local import LocalCopies, LocalCopy
from xllm_plugin.service.kv_index.prompts import Prompt, PromptMemory

__all__ = ["PromptReader", "Unread"]

logger = logging.getLogger(__name__)

_NUM_THREADS: Final = 2
_COMPARE_EVERY: Final = 100
"""Chats that were rendered here, until one is compared with what its instance makes of it."""
_PATHS: Final = ("/v1/completions", "/v1/chat/completions")
_TEXT_FIELDS: Final = ("add_special_tokens",)
_CHAT_FIELDS: Final = (
    *("tools", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "chat_template", "mm_processor_kwargs", "messages"),
)
"""The messages last: turns of a chat differ at its end, which is where `PromptMemory` looks."""


class Unread(NamedTuple):
    """A prompt whose tokens are not known yet."""

    wanted: PromptFields
    prompt: str | None
    """Of a completion."""
    question: bytes
    """To an instance's `/tokenize`, and under which the answer is remembered."""
    extra: Extra


_decode_prompt: Final = msgspec.json.Decoder(str | list[int]).decode
_decode_kwargs: Final = msgspec.json.Decoder(dict[str, msgspec.Raw] | None).decode


class PromptReader:
    """Finds token ids, and remembers them.

    Args:
        session: asks instances.
        config: in force; replaced by a reload.
    """

    def __init__(self, session: aiohttp.ClientSession, config: ServiceConfig) -> None:
        self.config = config
        self.num_failures = 0
        self._asker = Asker(session, lambda: self.config)
        self._copies = LocalCopies(self._asker)
        self._num_rendered = 0
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenize")
        self._known = PromptMemory()
        self._turn = 0

    @property
    def num_misread(self) -> int:
        """Chats whose tokens were others than their instance's, of those that were compared."""
        return self._copies.num_misread

    def look(
        self, path: str, wanted: PromptFields, model: str, candidates: Sequence[Instance]
    ) -> Prompt | Unread | None:
        """The prompt of a request, if it can be told at once.

        Args:
            path: of the request.
            wanted: of its body.
            model: named in it.
            candidates: who can take it.

        Returns:
            What `read` takes if somebody has to be asked or text to be tokenised; None if its
            tokens cannot be known.
        """
        salt = wanted.cache_salt
        if path not in _PATHS or not (salt is None or isinstance(salt, str)):
            return None
        extra = prompt_extra(_adapter(model, candidates), salt)
        prompt = None
        try:
            if wanted.prompt is not msgspec.UNSET:
                read = _decode_prompt(wanted.prompt)
                if isinstance(read, list):
                    return Prompt(packed(read), extra) if read else None
                prompt = read
            is_cut = wanted.truncate_prompt_tokens is not None
            asked = None if is_cut else _question(wanted, prompt, model)
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError):
            return None  # a wrong one, or several prompts: the instance's to answer
        if asked is None:
            return None
        known = self._known.get(asked)
        if known is None:
            return Unread(wanted, prompt, asked, extra)
        return known._replace(extra=extra) if known.tokens else None

    async def read(
        self, unread: Unread, model: str, candidates: Sequence[Instance]
    ) -> Prompt | None:
        """The prompt of a request; None if its tokens cannot be known in time.

        Args:
            unread: from `look`.
            model: named in the request.
            candidates: who can be asked.
        """
        try:
            async with asyncio.timeout(self.config.kv_index.tokenize_timeout_s):
                tokens = await self._tokens(unread, model, candidates)
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError):
            return None  # the instance's to answer, or no answer of one that tokenises
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.num_failures += 1
            logger.debug("a prompt is routed without its tokens: %s", error)
            return None
        self._remember(unread.question, tokens)
        return Prompt(tokens, unread.extra) if tokens else None

    def _remember(self, question: bytes, tokens: bytes) -> None:
        self._known.put(question, Prompt(tokens, NO_EXTRA, {}))
        self._known.shrink(self.config.kv_index.token_cache_bytes)

    def close(self) -> None:
        """End the threads."""
        self._copies.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _tokens(self, unread: Unread, model: str, candidates: Sequence[Instance]) -> bytes:
        instance = candidates[self._turn % len(candidates)]
        self._turn += 1
        copy = self._copies.of(instance, model)
        if unread.prompt is None:
            tokens = await self._rendered(copy, instance, unread.question)
        else:
            tokens = await self._tokenised(copy, unread.wanted, unread.prompt)
        if tokens is not None:
            return tokens
        return packed(await self._asker.tokens(instance, unread.question))

    async def _tokenised(self, copy: LocalCopy, wanted: PromptFields, text: str) -> bytes | None:
        """A text's tokens, if they can be found here."""
        if copy.tokenizer is None:
            return None
        special = wanted.add_special_tokens is msgspec.UNSET or (
            bytes(wanted.add_special_tokens) == b"true"
        )
        return await self._on_thread(partial(copy.tokenizer.ids, text, add_special_tokens=special))

    async def _rendered(self, copy: LocalCopy, instance: Instance, question: bytes) -> bytes | None:
        """A chat's tokens, if they can be found here."""
        if copy.renderer is None:
            return None
        try:
            tokens = await self._on_thread(partial(copy.chat_ids, question))
        except CannotRenderError as reason:
            logger.debug("a chat is left to its instance: %s", reason)
            return None
        self._num_rendered += 1
        if self._num_rendered % _COMPARE_EVERY == 0:
            self._copies.compare(copy, instance, question, tokens)
        return tokens

    async def _on_thread(self, find: Callable[[], list[int]]) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: packed(find()))


def _question(wanted: PromptFields, prompt: str | None, model: str) -> bytes | None:
    """The body of a request to `/tokenize`."""
    is_chat = prompt is None
    fields: dict[str, Any] = {"model": model}
    if prompt is not None:
        fields["prompt"] = prompt
    elif wanted.messages is msgspec.UNSET:
        return None
    if is_chat and (variables := _template_variables(wanted)):
        fields["chat_template_kwargs"] = variables
    for name in _CHAT_FIELDS if is_chat else _TEXT_FIELDS:
        value = getattr(wanted, name)
        if _is_given(value):
            fields[name] = value
    return msgspec.json.encode(fields)


def _template_variables(wanted: PromptFields) -> dict[str, Any]:
    """What a request gives to the template of its chat.

    `/tokenize` takes all of it as `chat_template_kwargs`, where the chat
    route has fields of their own.

    Raises msgspec's errors.
    """
    given = wanted.chat_template_kwargs
    found: dict[str, Any] = (_decode_kwargs(given) if _is_given(given) else None) or {}
    if _is_given(wanted.documents):
        found["documents"] = wanted.documents
    effort = wanted.reasoning_effort
    if effort is not None:
        found["reasoning_effort"] = effort
        found.setdefault("enable_thinking", effort != "none")
    return found


def _is_given(value: msgspec.Raw | msgspec.UnsetType) -> TypeGuard[msgspec.Raw]:
    return value is not msgspec.UNSET and bytes(value) != b"null"


def _adapter(model: str, candidates: Sequence[Instance]) -> str | None:
    """The model's name if it is a LoRA adapter: vLLM lists its base as its parent."""
    record = candidates[0].models.get(model, {}) if candidates else {}
    return model if record.get("parent") else None
