"""The token ids of a request's prompt, as its instance will see them.

Prompts of ids are taken as they are.  Texts are tokenised here, on threads (the tokenizer releases
the interpreter's lock), once a tokenizer that an instance of ours hands out (`GET /xllm/tokenizer`)
has given the same ids as that instance for every probe.  All else (chats, whose template only the
instance applies, and texts for plain servers) is asked of an instance: `POST /tokenize`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import aiohttp
import msgspec
import tokenizers

from xllm_plugin.service.body import PromptFields
from xllm_plugin.service.config import ServiceConfig
from xllm_plugin.service.fleet import Instance
from xllm_plugin.service.kv_index.index import NO_EXTRA, Chains, Extra, packed, prompt_extra

__all__ = ["PROBES", "Prompt", "PromptReader", "Unread"]

logger = logging.getLogger(__name__)

PROBES: Final = (
    "Once upon a time, there were 12,345 dragons.\n\n\tThey said: “naïve façade”",
    "你好, мир! 🐉👩‍👩‍👧",
    "def f(x):\n    return x**2  # a   b\r\n\r\n<|im_start|>user</s><s>[INST] <unk>",
    " leading and trailing ",
    "",
)
_NUM_THREADS = 2
_PATHS = ("/v1/completions", "/v1/chat/completions")
_CHAT_FIELDS = (
    *("messages", "tools", "add_generation_prompt", "continue_final_message"),
    *("add_special_tokens", "chat_template", "chat_template_kwargs", "mm_processor_kwargs"),
)


class Prompt(NamedTuple):
    """A prompt as the index takes it."""

    tokens: bytes
    extra: Extra
    chains: Chains | None = None
    """Of one that is asked again: its keys in the index, as far as known."""

    @property
    def num_tokens(self) -> int:
        """Its length."""
        return len(self.tokens) // 4


class Unread(NamedTuple):
    """A prompt whose tokens are not known yet."""

    wanted: PromptFields
    prompt: str | None
    """Of a completion."""
    question: bytes
    """To an instance's `/tokenize`, and under which the answer is remembered."""
    extra: Extra


class _Answer(msgspec.Struct):
    tokens: list[int]


_decode_prompt = msgspec.json.Decoder(str | list[int]).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Loaded:
    """A tokenizer that can be referred to weakly, which the library's own cannot."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer


class _Local(NamedTuple):
    incarnation: str
    loaded: _Loaded | None = None
    """None: not there (yet), or not the instance's."""


class PromptReader:
    """Finds token ids, and remembers them.

    Args:
        session: asks instances.
        config: in force; replaced by a reload.
    """

    def __init__(self, session: aiohttp.ClientSession, config: ServiceConfig) -> None:
        self.config = config
        self.num_failures = 0
        self._session = session
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tokenize")
        self._known: OrderedDict[bytes, Prompt] = OrderedDict()
        """By the question; hashing it as a key costs a quarter of a digest."""
        self._known_bytes = 0
        self._local: WeakKeyDictionary[Instance, dict[str, _Local]] = WeakKeyDictionary()
        """By model: each instance has to agree with it by itself.  Gone with the instance."""
        self._shared: WeakValueDictionary[bytes, _Loaded] = WeakValueDictionary()
        """By digest of its text: instances of one model share one, and it goes with the last."""
        self._loading: set[asyncio.Task[None]] = set()
        self._turn = 0

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
        if wanted.prompt is not msgspec.UNSET:
            try:
                read = _decode_prompt(wanted.prompt)
                if isinstance(read, list):
                    return Prompt(packed(read), extra) if read else None
            except (msgspec.DecodeError, UnicodeDecodeError, OverflowError):
                return None  # a wrong one, or several prompts: the instance's to answer
            prompt = read
        is_cut = wanted.truncate_prompt_tokens is not None
        asked = None if is_cut else _question(wanted, prompt, model)
        if asked is None:
            return None
        known = self._known.get(asked)
        if known is None:
            return Unread(wanted, prompt, asked, extra)
        self._known.move_to_end(asked)
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

    def close(self) -> None:
        """End the threads."""
        for task in self._loading:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _tokens(self, unread: Unread, model: str, candidates: Sequence[Instance]) -> bytes:
        wanted = unread.wanted
        instance = candidates[self._turn % len(candidates)]
        self._turn += 1
        local = self._local_tokenizer(model, instance)
        if local is None or unread.prompt is None:
            return packed(await self._ask(instance, unread.question))
        special = wanted.add_special_tokens is msgspec.UNSET or (
            bytes(wanted.add_special_tokens) == b"true"
        )
        return await self._encode(local, unread.prompt, add_special_tokens=special)

    async def _encode(
        self, local: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool
    ) -> bytes:
        def encode() -> bytes:
            return packed(local.encode(text, add_special_tokens=add_special_tokens).ids)

        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    async def _ask(self, instance: Instance, question: bytes) -> list[int]:
        """Raises `ValueError` (aiohttp's errors, TimeoutError) if the instance cannot say."""
        headers = {"Content-Type": "application/json", **self._authorization()}
        url = f"{instance.entry.url.rstrip('/')}/tokenize"
        async with self._session.post(url, data=question, headers=headers) as reply:
            if reply.status != 200:  # noqa: PLR2004
                raise ValueError(f"/tokenize of {instance.name} answers {reply.status}")
            return _decode_answer(await reply.read()).tokens

    def _authorization(self) -> dict[str, str]:
        key = self.config.instances.api_key
        return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}

    def _local_tokenizer(self, model: str, instance: Instance) -> tokenizers.Tokenizer | None:
        """The model's tokenizer, if it is here; else it is fetched for the next request."""
        incarnation = instance.life.incarnation
        models = self._local.setdefault(instance, {})
        for gone in models.keys() - instance.models.keys():  # an adapter that was unloaded
            del models[gone]
        local = models.get(model)
        if local is None or local.incarnation != incarnation:
            models[model] = local = _Local(incarnation)
            task = asyncio.get_running_loop().create_task(self._load(model, instance))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        return local.loaded.tokenizer if local.loaded else None

    async def _load(self, model: str, instance: Instance) -> None:
        incarnation = instance.life.incarnation
        url = f"{instance.entry.url.rstrip('/')}/xllm/tokenizer"
        try:
            async with self._session.get(url, headers=self._authorization()) as reply:
                if reply.status != 200:  # noqa: PLR2004
                    return  # a plain server, or a tokenizer that has no such form
                text = await reply.read()
            digest = hashlib.blake2b(text, digest_size=16).digest()
            loaded = self._shared.get(digest)
            if loaded is None:
                read = await asyncio.to_thread(tokenizers.Tokenizer.from_str, text.decode())
                loaded = self._shared.setdefault(digest, _Loaded(read))
            for probe in PROBES:
                question = msgspec.json.encode({"model": model, "prompt": probe})
                expected = await self._ask(instance, question)
                if loaded.tokenizer.encode(probe).ids != expected:
                    logger.warning(
                        "tokenizer of %s differs from what its server does; it is asked instead",
                        model,
                    )
                    return
        except (aiohttp.ClientError, OSError, ValueError) as error:
            logger.info("no tokenizer of %s from %s: %s", model, instance.name, error)
            return
        except Exception as error:  # noqa: BLE001 - the library raises bare ones for what it cannot read
            logger.info("the tokenizer of %s cannot be read: %s", model, error)
            return
        self._local.setdefault(instance, {})[model] = _Local(incarnation, loaded)

    def _remember(self, question: bytes, tokens: bytes) -> None:
        # Two requests with the same new prompt both ask.
        self._forget(question, self._known.pop(question, None))
        known = self._known[question] = Prompt(tokens, NO_EXTRA, {})
        self._known_bytes += _size(question, known)
        while self._known_bytes > self.config.kv_index.token_cache_bytes:
            self._forget(*self._known.popitem(last=False))

    def _forget(self, question: bytes, known: Prompt | None) -> None:
        if known is not None:
            self._known_bytes -= _size(question, known)


def _size(question: bytes, known: Prompt) -> int:
    """Bytes that are kept of a prompt, about, and with a chain of keys for every block size.

    Each of them is for 16 tokens or more (`PrefixIndex`), so together they take less than 8 bytes a
    token where sizes are powers of two.
    """
    return len(question) + 3 * len(known.tokens)


def _question(wanted: PromptFields, prompt: str | None, model: str) -> bytes | None:
    """The body of a request to `/tokenize`."""
    names: tuple[str, ...] = ("add_special_tokens",)
    fields: dict[str, Any] = {"model": model}
    if prompt is not None:
        fields["prompt"] = prompt
    elif wanted.messages is not msgspec.UNSET:
        names = _CHAT_FIELDS
    else:
        return None
    for name in names:
        value = getattr(wanted, name)
        if value is not msgspec.UNSET and bytes(value) != b"null":
            fields[name] = value
    return msgspec.json.encode(fields)


def _adapter(model: str, candidates: Sequence[Instance]) -> str | None:
    """The model's name if it is a LoRA adapter: vLLM lists its base as its parent."""
    record = candidates[0].models.get(model, {}) if candidates else {}
    return model if record.get("parent") else None
