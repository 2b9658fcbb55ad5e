"""Streams that go on elsewhere, token for token, when their instance dies.

An armed stream is asked for with `return_token_ids`.  Only whole events are passed on, without the
ids unless the client wants them; so the service knows at any time which tokens the client has.  If
the stream breaks, another instance continues after exactly these (`instance/resume.py`).

Almost every event is one more token: its ids are cut out by position and kept as bytes.  Anything
else about a stream (how it opens, ends or fails) is read as JSON.
"""

from __future__ import annotations

from typing import Final

import msgspec

from xllm_plugin.instance.resumption import RESUME_PATH, Finish, Resumption
from xllm_plugin.service.body import StreamWishes
from xllm_plugin.service.chunks import chunk_of
from xllm_plugin.service.routes import Route
from xllm_plugin.service.stream_events import (
    DoubtfulFields,
    StreamChoice,
    StreamEvent,
    StreamFault,
)

__all__ = ["ArmedStream", "arm", "unarmed_reason", "with_body"]

_MAX_EVENT_BYTES: Final = 64 * 2**20
_IDS: Final = b'"token_ids":['
_UNSEEN: Final = b"\n"
"""No chunk has this after its ids: it ends with more."""
_NO_IDS: Final = b'"token_ids":null'
_PROMPT_IDS: Final = b'"prompt_token_ids":['
# What stands before the ids of a choice that goes on: in a chat, and in a completion.
_OPEN: Final = (
    b'"finish_reason":null,',
    b'"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,',
)
_EMPTY: Final = b'"delta":{},"logprobs":null,"finish_reason":null,'
_USUAL: Final = {
    "/v1/chat/completions": b'"},"logprobs":null,"finish_reason":null,',
    "/v1/completions": b'","logprobs":null,' + _OPEN[1],
}
"""By path: what stands between the text of a choice that goes on and its ids."""
_END: Final = b"\n\n"
_DONE: Final = b"data: [DONE]\n\n"
_FAULTS: Final = frozenset({"abort", "error"})
_SERVER_ERROR: Final = 500
_PATHS: Final = frozenset({"/v1/completions", "/v1/chat/completions"})
_NULL: Final = b"null"


_decode: Final = msgspec.json.Decoder(StreamEvent).decode
_decode_doubtful: Final = msgspec.json.Decoder(DoubtfulFields).decode
_decode_chunks: Final = msgspec.json.Decoder(list[list[int]]).decode


def arm(route: Route, body: bytes, wishes: StreamWishes) -> ArmedStream | None:
    """The stream that `body` asks for, or None if its tokens cannot be known (`unarmed_reason`)."""
    if wishes.stream is not True or unarmed_reason(route, wishes):
        return None
    if wishes.return_token_ids is True:
        return ArmedStream(route.path, body, hides_ids=False)
    # The last of two equal names counts, for vLLM as for every common parser.
    end = body.rstrip()[:-1]
    return ArmedStream(route.path, end + b',"return_token_ids":true}', hides_ids=True)


def unarmed_reason(route: Route, wishes: StreamWishes) -> str:
    """Why nobody could continue the stream that is asked for; empty if that may be possible.

    `echo` of a completion and hidden reasoning change with `return_token_ids`; several choices or
    prompts are not continued.
    """
    is_completion = route.path == "/v1/completions"
    return (
        (route.path not in _PATHS and "only completions and chats can be")
        or (wishes.n not in (None, 1) and "`n` is not 1")
        or (wishes.best_of not in (None, 1) and "`best_of` is not 1")
        or (wishes.use_beam_search and "it is a beam search")
        or (wishes.include_reasoning is False and "`include_reasoning` is false")
        or (is_completion and wishes.echo and "it echoes its prompt")
        or (is_completion and not _is_one_prompt(wishes.prompt) and "it has several prompts")
        or ""
    )


def _is_one_prompt(prompt: msgspec.Raw | msgspec.UnsetType) -> bool:
    """A string, or a list of token ids."""
    if prompt is msgspec.UNSET:
        return False
    start = bytes(memoryview(prompt)[:64]).translate(None, b" \t\r\n")
    return start[:1] == b'"' or (start[:1] == b"[" and start[1:2].isdigit())


def with_body(head: bytes, body: bytes, target: bytes | None = None) -> bytes:
    """`head` for another body; it ends with its length, as `client.py` has built it."""
    head = head[: head.rindex(b"content-length: ")] + b"content-length: %d\r\n\r\n" % len(body)
    if target is not None:
        head = b"POST %b HTTP/1.1%b" % (target, head[head.index(b"\r\n") :])
    return head


class ArmedStream:
    """What the client has of one stream.

    Args:
        path: of its request.
        body: as sent to instances.
        hides_ids: whether the client did not ask for token ids.
    """

    __slots__ = (
        "_after",
        "_chunks",
        "_finish",
        "_is_known",
        "_is_lost",
        "_num_opening",
        "_path",
        "_rest",
        "_usual",
        "body",
        "created",
        "failure",
        "hides_ids",
        "id",
        "is_begun",
        "is_done",
        "num_prompt_tokens",
        "num_resumes",
        "parts",
    )

    def __init__(self, path: str, body: bytes, *, hides_ids: bool) -> None:
        self.body = body
        self.hides_ids = hides_ids
        self.parts: list[bytes] = []
        """Of the answer's body; `take` consumes them."""
        self.id = ""
        self.created = 0
        self.is_begun = False
        """Whether the client has the head of the answer."""
        self.is_done = False
        """Whether it has the last event."""
        self.failure = ""
        """Why the instance will not finish the stream, once it has said so."""
        self.num_resumes = 0
        self.num_prompt_tokens = 0
        """As its first event says; 0: not known."""
        self._path = path
        self._usual = _USUAL[path]
        self._after = _UNSEEN
        """What stood after the ids of an event, with the end of its chunk; it hardly changes."""
        self._rest = b""
        self._chunks: list[bytes] = []
        self._num_opening = 0
        self._finish: Finish | None = None
        self._is_known = False
        self._is_lost = False

    @property
    def num_events(self) -> int:
        """Events with tokens that have been taken."""
        return len(self._chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that the client has; those of an opening event without ids are not counted."""
        ids = b",".join(filter(None, self._chunks))
        return ids.count(b",") + 1 if ids else 0

    @property
    def is_known(self) -> bool:
        """Whether the client has an event: another instance has to go on, and cannot begin anew."""
        return self._is_known

    @property
    def can_resume(self) -> bool:
        """Whether all that the client has is known."""
        if self._is_lost:
            return False
        try:
            self._known_chunks()
        except msgspec.DecodeError:  # most are kept unread, and an instance may send anything
            return False
        return True

    @property
    def may_be_refused(self) -> bool:
        """Whether an instance may find that it cannot go on exactly (`instance/replay.py`).

        It reads the body again: for moments when there is a choice, not for each request.
        """
        found = msgspec.structs.astuple(_decode_doubtful(self.body))
        return any(bytes(value) != _NULL for value in found)

    def take(self) -> bytes:
        """The whole events in `parts`, as the client is to get them; sets `failure`."""
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if not data.endswith(_END):
            end = data.rfind(_END) + 2
            self._rest = data[end:] if end > 1 else data
            if end < 2:  # noqa: PLR2004 - none is whole
                if len(data) > _MAX_EVENT_BYTES:
                    self.failure = f"sent an event of over {_MAX_EVENT_BYTES} bytes"
                return b""
            data = data[:end]
        if data.find(b"\n") == len(data) - 2:  # JSON has no line breaks
            return self._event(data)
        shown = []
        for event in data[:-2].split(_END):
            shown.append(self._event(event + _END))
            if self.failure:
                break
        return b"".join(shown)

    def take_token(self, chunk: bytes, start: int) -> bytes:
        """A whole chunk that is the event of one more token, as the client is to get it.

        It says the same as `take`, at a third of the cost.  Nothing if the event differs from the
        one before in more than its text and its ids: `take` has to read it.

        Args:
            chunk: as the instance has framed it.
            start: where the event begins in it.
        """
        # Operators and methods without optional arguments: the others (`find`, `endswith`, ...)
        # take twice as long, most of it to read their arguments.
        before, _, after = chunk.rpartition(_IDS)
        ids, _, after = after.partition(b"]")
        event = before[start:]
        if (
            after != self._after
            or before[-len(self._usual) :] != self._usual
            or b"\n" in event  # JSON has no line breaks: it is more than one event
            or self._rest
        ):
            return b""
        self._chunks.append(ids)
        if not self.hides_ids:
            return chunk
        return chunk_of(len(event) + len(_NO_IDS) + len(after) - 2, event, _NO_IDS, after)

    def restart(self) -> None:
        """Another connection begins: nothing is left of the last one but what the client has."""
        self.parts.clear()
        self._rest = b""
        self.failure = ""
        if not self.is_begun:
            self._chunks.clear()
            self._num_opening = 0
            self._is_known = False
            self._after = _UNSEEN

    def next_request(self, head: bytes, target: bytes) -> tuple[bytes, bytes]:
        """Head and body of what to ask another instance for; `head` is the last one's.

        Args:
            head: as sent before.
            target: of the original request.
        """
        if not self._is_known:
            return with_body(head, self.body, target), self.body
        resumption = Resumption(
            path=self._path,  # type: ignore[arg-type]  # `arm` has checked it
            body=msgspec.Raw(self.body),
            id=self.id,
            created=self.created,
            chunks=self._known_chunks(),
            num_opening_events=self._num_opening,
            finish=self._finish,
        )
        body = msgspec.json.encode(resumption)
        return with_body(head, body, RESUME_PATH.encode()), body

    # -- parts ----------------------------------------------------------------------------------

    def _known_chunks(self) -> list[list[int]]:
        chunks = self._chunks
        return _decode_chunks(b"[[" + b"],[".join(chunks) + b"]]") if chunks else []

    def _event(self, event: bytes) -> bytes:
        start = event.rfind(_IDS)
        end = event.find(b"]", start)
        if (
            start > 0
            and end > 0
            and self._is_known
            and event.endswith(_OPEN, 0, start)
            and not event.endswith(_EMPTY, 0, start)
        ):
            self._chunks.append(event[start + len(_IDS) : end])
            after = event[end + 1 :]
            self._after = after + b"\r\n"
            return event[:start] + _NO_IDS + after if self.hides_ids else event
        return self._read(event)

    def _read(self, event: bytes) -> bytes:
        """One event as the client is to get it; nothing if it is not for the client."""
        if event == _DONE:
            self.is_done = True
            return event
        if not event.startswith(b"data: {"):
            return event  # a comment that keeps connections alive
        try:
            content = _decode(memoryview(event)[6:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.failure = f"sent an event that is no JSON: {error}"
            return b""
        if content.error is not None:
            return self._read_error(event, content.error)
        if not self._is_known:
            self.id, self.created, self._is_known = content.id, content.created, True
        if content.choices:
            return self._read_choice(event, content.choices[0])
        if self._finish is not None:  # usage
            self._finish = msgspec.structs.replace(
                self._finish, num_events=self._finish.num_events + 1
            )
        return event

    def _read_error(self, event: bytes, fault: StreamFault) -> bytes:
        if isinstance(fault.code, int) and fault.code >= _SERVER_ERROR:
            self.failure = f"failed: {fault.message}"
            return b""
        self._is_lost = True
        return event

    def _read_choice(self, event: bytes, choice: StreamChoice) -> bytes:
        if choice.finish_reason in _FAULTS:
            self.failure = f"ended the stream with finish reason {choice.finish_reason!r}"
            return b""
        if not self.num_prompt_tokens:
            self.num_prompt_tokens = _count_ids(event, _PROMPT_IDS)
        if choice.token_ids is not None:
            self._chunks.append(b",".join(b"%d" % token for token in choice.token_ids))
        elif self._chunks:
            self._is_lost = True  # tokens that nobody names
        else:
            self._num_opening += 1
        if choice.finish_reason is not None:
            self._finish = Finish(
                finish_reason=choice.finish_reason, stop_reason=choice.stop_reason
            )
        if not self.hides_ids:
            return event
        if choice.delta == {} and choice.finish_reason is None and choice.logprobs is None:
            return b""  # there only because ids were asked for
        return _without(_without(event, _PROMPT_IDS), _IDS)


def _count_ids(event: bytes, key: bytes) -> int:
    """How many ids the list after `key` has; 0 without one."""
    start = event.find(key)
    if start < 0:
        return 0
    start += len(key)
    end = event.index(b"]", start)
    return event.count(b",", start, end) + 1 if end > start else 0


def _without(event: bytes, key: bytes) -> bytes:
    """`event` with null in place of the list that follows `key`."""
    start = event.find(key)
    if start < 0:
        return event
    start += len(key) - 1
    return event[:start] + b"null" + event[event.index(b"]", start) + 1 :]
