"""One request on its way: choose an instance, send, retry before the first byte, relay the answer.

::

    new --dispatch--> connecting --> waiting for the answer --begin_answer--> relaying --> done
                          |  attempt failed: another instance, while nothing was sent to the client
                          +--------- none left: an error in OpenAI's form

    relaying --broken--> connecting to another instance, if the stream is armed (`continuation.py`)

    waiting for the answer --for too long--> waiting for that of a second one too (`hedging.py`)

The load that was booked at an instance is released in exactly one place, `_leave`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

import msgspec

from xllm_plugin.instance.resumption import REASON_HEADER
from xllm_plugin.service import lifecycle
from xllm_plugin.service.body import Peek
from xllm_plugin.service.continuation import ArmedStream, arm, unarmed_reason, with_body
from xllm_plugin.service.flow.wishes import NO_WISHES, read_wishes
from xllm_plugin.service.hedging import Hedging, Leg, hedge_wait_s
from xllm_plugin.service.lifecycle import DRAINED, LEFT, State
from xllm_plugin.service.replies import Refusal, error_body
from xllm_plugin.service.routes import Kind, Route
from xllm_plugin.service.telemetry import Ending

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from xllm_plugin.service.client import ClientConnection
    from xllm_plugin.service.decision import Decision, Sent
    from xllm_plugin.service.fleet import Instance
    from xllm_plugin.service.flow.control import Waiting
    from xllm_plugin.service.keys import Grant
    from xllm_plugin.service.kv_index.prompts import Prompt
    from xllm_plugin.service.proxy import Proxy
    from xllm_plugin.service.scale_out.resumer import Resumer
    from xllm_plugin.service.upstream import Pool, UpstreamConnection

__all__ = ["Exchange", "cost_tokens_of", "peek", "prompt_tokens_of"]

logger = logging.getLogger(__name__)

_BYTES_PER_TOKEN: Final = 4
_DEFAULT_OUTPUT_TOKENS: Final = 128
_MAX_OUTPUT_TOKENS: Final = 512
_MAX_PROMPT_TOKENS: Final = 100_000
_RETRYABLE_STATUS: Final = 503
_OK: Final = 200
_GENERATE: Final = "/inference/v1/generate"
_SWITCHED: Final = 101
_LAST_CHUNK: Final = b"0\r\n\r\n"
_COMPLETION_TOKENS: Final = b'"completion_tokens":'
_PROMPT_TOKENS: Final = b'"prompt_tokens":'
_NUMBER: Final = re.compile(rb"\d{1,12}")
_MAX_TAIL_BYTES: Final = 1024
_CLIENT_GONE: Final = 499  # nginx's, for the access log alone
_IDEMPOTENT: Final = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
# Each step is bounded and none is taken back, so that no body costs more than it is long.
_MODEL_FIELD: Final = re.compile(
    rb"\r\n(?i:content-disposition):[^\r\n]{0,256}?[; \t]name=(?:\"model\"|model)(?=[;\s])"
    rb"[^\r\n]{0,256}+\r\n(?:[^\r\n]{1,512}+\r\n){0,4}+\r\n([^\r\n]{0,256}+)\r\n"
)
_RESPONSE_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[^"]{1,200})"')
_REASON: Final = re.compile(rb"\r\n%b: *([^\r\n]{1,999})" % REASON_HEADER.encode(), re.IGNORECASE)
_NO_HEADERS: dict[bytes, bytes] = {}
_HOP_BY_HOP: Final = (b"connection:", b"keep-alive:", b"proxy-connection:", b"upgrade:")


_decode: Final = msgspec.json.Decoder(Peek).decode
_NOTHING: Final = Peek()


def peek(body: bytes, content_type: bytes) -> Peek:
    """Read what routing needs.  Bodies that are not understood are the instance's to answer."""
    if content_type.startswith(b"multipart/"):
        found = _MODEL_FIELD.search(body)
        return Peek(model=found[1].decode("utf-8", "replace") if found else None)
    try:
        return _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NOTHING


class Exchange:
    """A request and its answer.  A `RequestView` for policies.

    `client` parses the request and fills the fields; `prepare` finishes it, `dispatch` sends it.
    """

    __slots__ = (
        "_armed",
        "_awaits_first",
        "_booked_tokens",
        "_connecting",
        "_connection",
        "_last_relayed",
        "_lower_head",
        "_num_counted_bytes",
        "_write",
        "body",
        "body_bytes",
        "client",
        "content_type",
        "cost_tokens",
        "decision",
        "draw",
        "early",
        "grant",
        "head",
        "hedging",
        "instance",
        "is_answering",
        "is_done",
        "keep_alive",
        "method",
        "model",
        "noted",
        "num_bytes",
        "num_output_tokens",
        "promised",
        "prompt",
        "proxy",
        "refusal",
        "response_id",
        "route",
        "seen",
        "sent",
        "sent_s",
        "sequence",
        "session_key",
        "span",
        "stalled_reads",
        "stalled_since_s",
        "started_s",
        "status",
        "stream",
        "tried",
        "ttft_s",
        "unframes",
        "upgrades",
        "visited",
        "waiting",
        "wants_reason",
        "wants_stream",
        "wishes",
    )

    def __init__(  # noqa: PLR0915 - a record, a line a field
        self, client: ClientConnection, method: bytes, route: Route
    ) -> None:
        self.client = client
        self.proxy: Proxy = client.proxy
        self.method = method
        self.route = route
        self.head = b""
        self.body = b""
        self.body_bytes = 0
        """Its length as announced; 0 if it comes in chunks."""
        self.content_type = b""
        self.noted: dict[bytes, bytes] = _NO_HEADERS
        """Headers that were read here, by lower-case name."""
        self.keep_alive = True
        self.unframes = False
        self.upgrades = False
        self.wants_reason = False
        self.wants_stream = False
        self.refusal: Refusal | None = None
        self.grant: Grant | None = None
        """The key that was shown, if keys are asked for."""
        self.promised: dict[str, str] | None = None
        """What headers promise, where they have been read."""
        self.wishes = NO_WISHES
        self.waiting: Waiting | None = None
        """Its time in the queue, if it had to wait."""
        self.early = b""
        """What a client sent after its request to upgrade, before the answer."""
        self.model: str | None = None
        self.session_key = ""
        self.response_id = ""
        self.cost_tokens = self.sequence = self.draw = 0
        self.tried: tuple[Instance, ...] = ()
        self.visited: tuple[Instance, ...] = ()
        """Every instance that it was sent to, in order."""
        self.decision: Decision | None = None
        self.seen: Peek | None = None
        """What was read of its body, until that is of no more use."""
        self.prompt: Prompt | None = None
        """Its token ids, if they were read."""
        self.sent: Sent | None = None
        self.instance: Instance | None = None
        self.started_s = self.sent_s = 0.0
        self.ttft_s = -1.0
        self.status = 0
        self.num_bytes = 0
        """Of the answer, as sent to the client."""
        self.num_output_tokens = 0
        """Once it has ended; 0 where they are not known."""
        self.span: Span | None = None
        self.stream: ArmedStream | None = None
        """What the client has of an answer that another instance could continue."""
        self.hedging: Hedging | None = None
        """If another instance may be asked while one is silent."""
        self.is_answering = self.is_done = False
        self.stalled_reads = -1
        self.stalled_since_s = 0.0
        self._armed: ArmedStream | None = None
        """The stream that was asked for, whatever an instance has answered with."""
        self._awaits_first = True
        self._booked_tokens = 0
        self._connecting: asyncio.Task[None] | None = None
        self._connection: UpstreamConnection | None = None
        self._last_relayed = b""
        self._lower_head = b""
        self._num_counted_bytes = 0
        self._write = client.transport.write

    @property
    def num_prompt_tokens(self) -> int:
        """As counted to route it, else as its answer says; 0 where they are not known."""
        if self.sent is not None and self.sent.is_exact:
            return self.sent.prompt_tokens
        if self.stream is not None and self.stream.num_prompt_tokens:
            return self.stream.num_prompt_tokens
        is_told = self.is_answering and self.route.kind is Kind.INFERENCE
        return _usage(self._last_relayed, _PROMPT_TOKENS) if is_told else 0

    # -- the way there --------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read what routing needs out of the body and the path."""
        body, seen = self.body, _NOTHING
        if body:
            self.seen = seen = peek(body, self.content_type)
            if seen is _NOTHING and self.grant is not None:
                # An instance may read what is not understood here, and another tenant in it.
                self.refusal = Refusal(400, "The body is not JSON in UTF-8 (RFC 8259).")
            if isinstance(seen.model, str):
                self.model = seen.model
            if not self.session_key:
                key = seen.prompt_cache_key or seen.user
                self.session_key = key if isinstance(key, str) else ""
            if isinstance(seen.previous_response_id, str):
                self.response_id = seen.previous_response_id
            self.cost_tokens = cost_tokens_of(len(body), seen)
            self.wants_stream = seen.stream is True
            if self.wants_stream and self.proxy.config.continuation.enabled:
                self._arm(seen)
        elif b"?" in self.route.target and b"model=" in self.route.target:
            query = self.route.target.partition(b"?")[2].decode("latin-1")
            self.model = next(iter(parse_qs(query).get("model", ())), None)
        if self.route.kind is Kind.RESPONSES and not self.response_id:
            self.response_id = (
                self.route.path.removeprefix("/v1/responses").strip("/").split("/")[0]
            )
        self.draw = random.getrandbits(64)
        if (
            self.promised
            or seen.vllm_xargs is not None
            or seen.sampling_params is not None
            or self.proxy.reads_promises
        ):
            self._read_wishes(self.promised or {}, seen)

    def _read_wishes(self, headers: dict[str, str], seen: Peek) -> None:
        try:
            found = seen.vllm_xargs
            if self.route.path == _GENERATE and isinstance(seen.sampling_params, dict):
                found = seen.sampling_params.get("extra_args")
            self.wishes = read_wishes(headers, found, seen.priority)
            if self.grant is not None:
                self.wishes = self.grant.account.bind(self.wishes, seen.priority)
        except Refusal as refusal:
            if self.proxy.reads_promises:  # else they only help to choose; an instance refuses it
                self.refusal = refusal

    def _arm(self, seen: Peek) -> None:
        if self.unframes or self.method != b"POST":
            return
        self.stream = self._armed = arm(self.route, self.body, seen)
        if self.stream is not None:
            self.body = self.stream.body
            self.head = with_body(self.head, self.body)

    def dispatch(self) -> None:
        """Choose an instance and send; answers with an error when there is none."""
        try:
            instance = self.proxy.router.choose(self)
        except Refusal as refusal:
            self.refuse(refusal)
            return
        self._send(instance)
        if self.proxy.hedge_after_s is not None:
            self._may_be_hedged(self.proxy.hedge_after_s)

    def _may_be_hedged(self, after_s: float) -> None:
        if self.hedging is None:
            wait_s = hedge_wait_s(self, after_s)
            if wait_s is None:
                return
            self.hedging = Hedging(self, wait_s)
        self.hedging.wait()

    def _send(self, instance: Instance, resumer: Resumer | None = None) -> None:
        """To `instance`, or to what stands in for it."""
        self._enter(instance)
        # A pooled connection may be closing as we use it; only what can be sent twice risks that.
        connection = instance.pool.take() if resumer is None and self._may_repeat() else None
        if connection is None:
            self._connecting = self.proxy.loop.create_task(self._connect(instance, resumer))
            return
        self._begin(connection)

    async def _connect(self, instance: Instance, resumer: Resumer | None = None) -> None:
        try:
            if resumer is None:
                connection = await instance.pool.connect()
            else:
                connection = await instance.pool.adopt(await resumer.open(instance))
        except OSError as error:
            self._turn_to(instance.pool)
            self._connecting = None
            reason = "refused" if isinstance(error, ConnectionError) else "unreachable"
            self.attempt_failed(reason, f"cannot be reached ({error or 'timeout'})", is_sent=False)
            return
        if self.is_done:
            connection.transport.abort()
            return
        self._turn_to(instance.pool)
        self._connecting = None
        self._begin(connection)

    def _begin(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        self.sent_s = self.proxy.loop.time()
        connection.begin(self)

    # -- one of two legs (`hedging.py`) ---------------------------------------------------------

    def leg(self) -> Leg:
        """The sending that its fields are about."""
        assert self.instance is not None
        return Leg(
            instance=self.instance,
            booked_tokens=self._booked_tokens,
            sent=self.sent,
            sent_s=self.sent_s,
            decision=self.decision,
            connection=self._connection,
            connecting=self._connecting,
        )

    def put(self, leg: Leg) -> None:
        """Have its fields be about another sending."""
        self.instance = leg.instance
        self._booked_tokens = leg.booked_tokens
        self.sent, self.sent_s = leg.sent, leg.sent_s
        self.decision = leg.decision
        self._connection, self._connecting = leg.connection, leg.connecting

    def send_too(self, instance: Instance) -> None:
        """Send it once more; the sending that its fields were about goes on."""
        self._connection = self._connecting = None
        self._send(instance)

    def give_up(self) -> None:
        """End the sending that its fields are about; its instance is to stop at once."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._connection is not None:
            self._connection.abandon()
        self._leave()

    def _turn_to(self, pool: Pool) -> None:
        """Have its fields be about the sending to the instance with that pool."""
        if self.hedging is not None:
            self.hedging.turn_to(pool)

    # -- the way back ---------------------------------------------------------------------------

    def begin_answer(
        self,
        status: int,
        head: bytes,
        lower: bytes,
        *,
        until_close: bool,
        connection: UpstreamConnection,
    ) -> bytes | None:
        """The head of an answer as the client is to get it; empty if it has one already.

        None if the answer is not wanted: another instance is asked instead, or was.
        """
        if self.hedging is not None and self.hedging.is_overruled(connection, status):
            return None
        assert self.instance is not None
        stream = self.stream
        if stream is not None:
            is_stream = status == _OK and _is_chunked_stream(lower)
            if stream.is_begun:
                return self._begin_continuation(status, head, is_stream=is_stream)
            if not is_stream:
                self.stream = None
        if status == _RETRYABLE_STATUS and self._refused():
            self.instance.stats.count_error("unavailable")
            self._retry()
            return None
        if self.hedging is not None and self.stream is None:
            self.hedging.won()  # a stream that is read has won when its first events are understood
        self.status = status
        self.is_answering = True
        self._lower_head = lower
        if until_close or self.upgrades:
            self.keep_alive = False
        if self.wants_reason or not self.keep_alive or self._is_hop_by_hop(lower):
            head = self._rewritten(head)
        return head if self.grant is None else self.grant.with_headers(head, self.proxy.loop.time())

    def relay_head(self, head: bytes) -> None:
        """Pass the head of an answer on by itself."""
        if self.stream is not None:
            self._begin_stream(self.stream)
        self.num_bytes += len(head)
        self._write(head)

    def relay(self, data: bytes, head: bytes = b"") -> None:
        """Pass bytes of an answer's body on, after `head` if it was not sent yet."""
        if self._awaits_first:
            self._first_bytes(data)
        self.num_bytes += len(head) + len(data)
        self._last_relayed = data
        if self.grant is not None:
            self.grant.usage.observe(data)
        self._write(head + data if head else data)

    def relay_token(self, chunk: bytes, start: int) -> bool:
        """Pass the event of one more token of an armed stream on; False if it is any other event.

        Args:
            chunk: of the answer, whole.
            start: where its content begins.
        """
        assert self.stream is not None
        shown = self.stream.take_token(chunk, start)
        if not shown:
            return False
        if self._awaits_first:
            self._first_bytes(shown)
        self.num_bytes += len(shown)  # of usage it says nothing that `take` has not read
        self._write(shown)
        return True

    def relay_events(self, head: bytes, *, is_last: bool) -> str:
        """Pass the whole events of an armed stream on, after `head` if it was not sent yet.

        Args:
            head: of the answer.
            is_last: whether the answer ends with what was read.

        Returns:
            Why the instance will not finish the stream, or nothing.
        """
        stream = self.stream
        assert stream is not None
        events = stream.take()
        if is_last and not stream.is_done and not stream.failure:
            stream.failure = "ended the stream before its last event"
        data = b"%x\r\n%b\r\n" % (len(events), events) if events else b""
        if is_last and not stream.failure:
            data += _LAST_CHUNK
        if not data and stream.failure:
            return stream.failure  # the head may still be another instance's
        if head:
            self._begin_stream(stream)
            data = head + data
        if events and self._awaits_first:
            self._first_bytes(events)
        if self.grant is not None:
            self.grant.usage.observe_events(events)
        if data:
            self.num_bytes += len(data)
            self._write(data)
        return stream.failure

    def answered(self, *, close: bool) -> None:
        """The answer is complete."""
        assert self.instance is not None
        answered = self.instance.stats.answered
        answered[self.status] = answered.get(self.status, 0) + 1
        self._leave()
        if close:
            self.keep_alive = False
        self._finish(Ending.COMPLETE)

    def attempt_failed(
        self,
        reason: str,
        detail: str,
        *,
        is_stale: bool = False,
        is_sent: bool = True,
        connection: UpstreamConnection | None = None,
    ) -> None:
        """The instance gave no answer: try another one, or answer with an error.

        Args:
            reason: short, for metrics.
            detail: for people; continues "instance X ...".
            is_stale: an idle connection was closed as we used it, which says nothing of the
                instance.
            is_sent: whether the instance may have seen the request.
            connection: that it has failed on, where there may be two.
        """
        if connection is not None:
            self._turn_to(connection.pool)
        instance = self.instance
        assert instance is not None
        if is_stale and self._may_repeat():
            self._connection = None
            self._connecting = self.proxy.loop.create_task(self._connect(instance))
            return
        instance.stats.count_error(reason)
        is_certain = reason not in ("timeout", "garbage")
        self.proxy.fleet.report(instance, lifecycle.Failed(detail, certain=is_certain))
        if self.hedging is not None and self.hedging.go_on():
            return
        if self.stream is not None and self.stream.is_begun:
            self._try_next(f"Instance {instance.name} {detail}.")
            return
        if (
            (not is_sent or self._may_repeat())
            and self._may_retry()
            and (reason != "timeout" or (self._has_alternative() and self._take_retry()))
        ):
            self._retry()
            return
        self._leave()
        status = 504 if reason == "timeout" else 502
        self.refuse(Refusal(status, f"Instance {instance.name} {detail}."))

    def broken(
        self, connection: UpstreamConnection, why: str, *, is_instances_fault: bool = True
    ) -> None:
        """An answer that had begun cannot be finished: say so, never end in silence."""
        instance = self.instance
        assert instance is not None
        is_at_border = connection.is_at_border
        connection.abandon()
        if is_instances_fault:
            instance.stats.count_error("broken")
            self.proxy.fleet.report(instance, lifecycle.Failed(why, certain=True))
        else:
            instance.stats.count_error("drained")
        if self.stream is not None and self.stream.is_begun:
            self._go_on_elsewhere(self.stream, f"Instance {instance.name}: {why}.")
            return
        self._leave()
        self.keep_alive = False
        is_stream = b"text/event-stream" in self._lower_head
        if is_stream and (self._is_between_events() if self.unframes else is_at_border):
            message = f"Instance {instance.name}: {why}. {self._unarmed_reason()}"
            event = b"data: " + error_body(502, message) + b"\n\n"
            self._write(event if self.unframes else b"%x\r\n%b\r\n0\r\n\r\n" % (len(event), event))
            self._finish(Ending.BROKEN)
            return
        # Half an answer with a length: only a cut connection tells the client.
        self._end(Ending.BROKEN)
        self.client.abort()

    def begin_tunnel(self, data: bytes) -> None:
        """Both sides have switched protocols: from here on bytes are carried, nothing is read."""
        assert self._connection is not None
        assert self.instance is not None
        self.status = _SWITCHED
        self.is_answering = True
        answered = self.instance.stats.answered
        answered[_SWITCHED] = answered.get(_SWITCHED, 0) + 1
        self._awaits_first = False
        self.relay(data)
        self.client.begin_tunnel(self._connection.transport)
        if self.early:
            self._connection.transport.write(self.early)
            self.early = b""

    def tunnel_closed(self) -> None:
        """The instance has closed its end of a tunnel."""
        self._leave()
        self._end(Ending.COMPLETE)
        self.client.close()

    # -- the client's side ----------------------------------------------------------------------

    def client_gone(self) -> None:
        """Cancel at once: nobody reads the answer."""
        if self.is_done:
            return
        self.is_done = True
        if self.waiting is not None and self.proxy.flow is not None:
            self.proxy.flow.leave(self)
        if self.hedging is not None and self.hedging.rival is not None:
            self.hedging.rival.instance.stats.count_error("client gone")
            self.hedging.drop_rival()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None and self.status == _SWITCHED:
            self._connection.exchange = None
            self._connection.transport.close()
        elif self._connection is not None:
            self._connection.abandon()
        if self.instance is not None and self.status == _SWITCHED:
            self._leave()
        elif self.instance is not None:
            self.instance.stats.count_error("client gone")
            self._leave()
        self.status = self.status or _CLIENT_GONE
        self._end(Ending.CLIENT_GONE)

    def pause(self) -> None:
        """The client reads more slowly than the instance writes."""
        for connection in self._connections():
            connection.transport.pause_reading()

    def resume(self) -> None:
        """The client has caught up."""
        for connection in self._connections():
            connection.transport.resume_reading()

    def refuse(self, refusal: Refusal) -> None:
        """Answer with an error of ours."""
        if refusal.close or self.upgrades:
            refusal.close = True
            self.keep_alive = False
        elif not self.keep_alive:
            refusal.close = True
        self.status = refusal.status
        self.proxy.count_refusal(refusal.status)
        self.answer(refusal.reply(), Ending.REFUSED)

    def answer(self, reply: bytes, ending: Ending = Ending.COMPLETE) -> None:
        """Answer with bytes of ours."""
        if self.method == b"HEAD":
            reply = reply[: reply.index(b"\r\n\r\n") + 4]
        self.num_bytes += len(reply)
        self._write(reply)
        self._finish(ending)

    def check_timeouts(
        self, now_s: float, first_byte_s: float | None, stalled_s: float | None
    ) -> None:
        """Give up on an instance that is silent for too long; called about once a second."""
        self._check_leg(now_s, first_byte_s, stalled_s)
        if self.hedging is not None and self.hedging.rival is not None:
            self.hedging.swap()
            self._check_leg(now_s, first_byte_s, stalled_s)

    def _check_leg(self, now_s: float, first_byte_s: float | None, stalled_s: float | None) -> None:
        connection = self._connection
        if connection is None or self.is_done or self.status == _SWITCHED:
            return
        if self.stream is not None and self._has_to_move(self.stream):
            if self.stream.is_begun:
                self.broken(connection, "its time to drain is over", is_instances_fault=False)
                return
            self._connection = None
            connection.abandon()
            self.attempt_failed("drained", "did not answer before its time to drain was over")
            return
        if not self.is_answering:
            is_held = connection.holds_head
            limit_s = stalled_s if is_held else first_byte_s
            since_s = connection.held_since_s if is_held else self.sent_s
            if limit_s is not None and now_s - since_s > limit_s:
                self._connection = None
                connection.abandon()
                self.attempt_failed("timeout", f"did not answer within {limit_s:g} s")
            return
        if connection.num_reads != self.stalled_reads or self.client.is_write_paused:
            self.stalled_reads, self.stalled_since_s = connection.num_reads, now_s
        elif stalled_s is not None and now_s - self.stalled_since_s > stalled_s:
            self.broken(connection, f"nothing was heard from the instance for {stalled_s:g} s")

    # -- another instance goes on ---------------------------------------------------------------

    def _go_on_elsewhere(self, stream: ArmedStream, why: str) -> None:
        """The stream has broken: have another instance continue it, or say that none can."""
        instance = self.instance
        assert instance is not None
        if stream.is_done:
            self._leave()
            self._write(_LAST_CHUNK)
            self._finish(Ending.COMPLETE)
            return
        if stream.num_resumes >= self.proxy.config.continuation.max_resumes:
            self._leave()
            self._end_in_error(f"{why} It was continued {stream.num_resumes} times already.")
            return
        if not stream.can_resume:
            self._leave()
            self._end_in_error(f"{why} Its tokens are not known, so it cannot be continued.")
            return
        stream.num_resumes += 1
        instance.stats.resumes += 1
        self.tried = ()
        self._try_next(why)

    def _try_next(self, why: str) -> None:
        """Ask an instance that has not been asked since the stream broke."""
        assert self.instance is not None
        assert self.stream is not None
        self.tried = (*self.tried, self.instance)
        self._leave()
        self.is_answering = False
        self.stalled_reads = -1
        try:
            instance = self._who_goes_on(self.stream)
        except Refusal as refusal:
            self._end_in_error(f"{why} {refusal}")
            return
        self.head, self.body = self.stream.next_request(self.head, self.route.target)
        stands_in = self.stream.is_known and instance.continues == "scale-out"
        self._send(instance, self.proxy.resumer if stands_in else None)

    def _who_goes_on(self, stream: ArmedStream) -> Instance:
        """Rather one with this plugin, which continues more streams than vLLM's routes do.

        Raises:
            Refusal: as `Router.choose`.
        """
        router = self.proxy.router
        if not stream.is_known:
            return router.choose(self)
        others = [one for one in self.proxy.fleet.candidates(self.model) if one not in self.tried]
        able = [one for one in others if one.resumes] or [one for one in others if one.scales_out]
        return router.choose(self, able or None)

    def _begin_continuation(self, status: int, head: bytes, *, is_stream: bool) -> bytes | None:
        instance = self.instance
        assert instance is not None
        if not is_stream:
            instance.stats.count_error("not continued")
            said = _REASON.search(head)
            why = f"HTTP {status}" + (f": {said[1].decode('latin-1')}" if said else "")
            self._try_next(f"Instance {instance.name} cannot continue the stream ({why}).")
            return None
        self.is_answering = True
        return b""

    def _has_to_move(self, stream: ArmedStream) -> bool:
        """Whether its instance's time to drain is over, and another one will probably take it.

        Who is gone has stopped, or does so.  Who lives finishes what nobody else can.
        """
        if self.instance is None:
            return False
        life, proxy = self.instance.life, self.proxy
        if life.state is State.GONE:
            return life.reason in (DRAINED, LEFT)
        if (
            life.state is not State.DRAINING
            or proxy.fleet.clock() - life.since_s <= proxy.config.instances.drain_s
            or not any(one.resumes for one in self.ready_others())
        ):
            return False
        if not stream.is_begun:
            return self._may_retry() and self._has_alternative()
        is_left = stream.num_resumes < proxy.config.continuation.max_resumes
        return is_left and not stream.may_be_refused and stream.can_resume

    def _unarmed_reason(self) -> str:
        """Why no other instance goes on with a stream that is not armed: a sentence."""
        if not self.proxy.config.continuation.enabled:
            reason = "`continuation.enabled` is off"
        elif self.unframes:
            reason = "its client speaks HTTP/1.0"
        else:
            reason = unarmed_reason(self.route, peek(self.body, self.content_type))
        return f"The stream cannot be continued: {reason or 'its answer is no stream of chunks'}."

    def _end_in_error(self, message: str) -> None:
        """Nobody can continue the stream: its last event says so."""
        event = b"data: " + error_body(502, message) + b"\n\n"
        self._write(b"%x\r\n%b\r\n" % (len(event), event) + _LAST_CHUNK)
        self.keep_alive = False
        self._finish(Ending.BROKEN)

    # -- parts ----------------------------------------------------------------------------------

    def _enter(self, instance: Instance) -> None:
        self.instance = instance
        self._awaits_first = True
        if not self.visited or self.visited[-1] is not instance:  # else it is connected to anew
            self.visited = (*self.visited, instance)
        self._booked_tokens = self.cost_tokens
        is_offline = self.wishes.is_offline
        self.proxy.fleet.book(instance, self._booked_tokens, is_offline=is_offline)

    def _begin_stream(self, stream: ArmedStream) -> None:
        """The client is given the head of an armed stream: whose events these are has won."""
        stream.is_begun = True
        if self.hedging is not None:
            self.hedging.won()

    def _is_between_events(self) -> bool:
        """Whether an HTTP/1.0 client has whole events alone, where that is known."""
        last = self._last_relayed
        return not last or last.endswith((b"\n\n", b"\r\n\r\n"))

    def _connections(self) -> list[UpstreamConnection]:
        found = [self._connection]
        if self.hedging is not None and self.hedging.rival is not None:
            found.append(self.hedging.rival.connection)
        return [connection for connection in found if connection is not None]

    def _leave(self) -> None:
        assert self.instance is not None
        if self.hedging is not None:
            self.hedging.left(self.instance)
        is_offline = self.wishes.is_offline
        self.proxy.fleet.release(self.instance, self._booked_tokens, is_offline=is_offline)
        self.proxy.router.left(self)
        self.instance.stats.bytes_to += len(self.head) + len(self.body)
        self.instance.stats.bytes_from += self.num_bytes - self._num_counted_bytes
        self._num_counted_bytes = self.num_bytes
        if self.proxy.flow is not None:
            self.proxy.flow.freed(self.instance)
        self.instance = None
        self._connection = None

    def _may_retry(self) -> bool:
        return not self.is_done and len(self.tried) < self.proxy.config.routing.num_retries

    def _may_repeat(self) -> bool:
        """Whether a request that an instance may have seen can be sent again."""
        return self.route.kind is not Kind.OTHER or self.method in _IDEMPOTENT

    def _refused(self) -> bool:
        """The instance answers 503; return whether another one is asked."""
        assert self.instance is not None
        self.blame_if_idle(self.instance)
        may_be = self._may_repeat() and self._may_retry() and self._has_alternative()
        return may_be and self._take_retry()

    def blame_if_idle(self, instance: Instance) -> None:
        """It answers 503: who refuses whatever comes looks idle, and would get all that comes.

        Who refuses because it has too much to do has other requests, and is to get on with them.
        """
        if self.route.kind is Kind.INFERENCE and self.ready_others() and instance.in_flight == 1:
            self.proxy.fleet.report(instance, lifecycle.Failed("answers 503 and has nothing to do"))

    def _take_retry(self) -> bool:
        """Whether there is a retry left for what others may be too busy for, too; it is taken."""
        return self.proxy.retry_budget.take(self.proxy.router.num_routed)

    def ready_others(self) -> list[Instance]:
        """Who can take it and is ready, but for the one that has it."""
        return [
            one
            for one in self.proxy.fleet.candidates(self.model)
            if one is not self.instance and one.life.state is State.READY
        ]

    def _has_alternative(self) -> bool:
        return any(
            one is not self.instance and one not in self.tried
            for one in self.proxy.fleet.candidates(self.model)
        )

    def _retry(self) -> None:
        instance = self.instance
        assert instance is not None
        instance.stats.retries += 1
        self._leave()
        self.is_answering = False
        self.stream = self._armed  # what has failed may have answered with something else
        self.tried = (*self.tried, instance)
        self.dispatch()

    def _first_bytes(self, data: bytes) -> None:
        """The first from an instance; from one that continues a stream, not the client's first."""
        assert self.instance is not None
        self._awaits_first = False
        is_first = self.ttft_s < 0
        is_stream = b"text/event-stream" in self._lower_head
        if is_first:
            self.ttft_s = self.proxy.loop.time() - self.started_s
            if is_stream:
                self.proxy.telemetry.first_token(self.instance, self.ttft_s)
        # What a continuation had to compute before them is known too roughly to learn from.
        self.proxy.router.first_byte(self, is_measure=is_first and is_stream)
        if self.route.kind is Kind.RESPONSES:
            found = _RESPONSE_ID.search(data)
            if found:
                self.proxy.router.remember_owner(found[1].decode("latin-1"), self.instance)

    def _is_hop_by_hop(self, lower: bytes) -> bool:
        return b"\nconnection:" in lower or b"\nkeep-alive:" in lower or b"\nupgrade:" in lower

    def _rewritten(self, head: bytes) -> bytes:
        status_line, *lines = head[:-4].split(b"\r\n")
        dropped = _HOP_BY_HOP + ((b"transfer-encoding:",) if self.unframes else ())
        kept = [line for line in lines if not line.lower().startswith(dropped)]
        if not self.keep_alive:
            kept.append(b"connection: close")
        if self.wants_reason and self.decision is not None:
            said = self.decision.described()
            if self.hedging is not None and self.hedging.has_hedged:
                said["asked"] = [one.name for one in self.hedging.visited]
            kept.append(b"x-xllm-explain: " + json.dumps(said).encode())
        return b"\r\n".join((status_line, *kept, b"", b""))

    def _finish(self, ending: Ending) -> None:
        self._end(ending)
        self.client.exchange_done(self)

    def _end(self, ending: Ending) -> None:
        """It is over, and measured; every request comes here once."""
        self.is_done = True
        if self.stream is not None:
            self.num_output_tokens = self.stream.num_tokens
        elif self.is_answering and self.route.kind is Kind.INFERENCE:
            self.num_output_tokens = _usage(self._last_relayed, _COMPLETION_TOKENS)
        if self.grant is not None:
            self.grant.settle(self, self.proxy.loop.time())
        self.proxy.ended(self, ending)
        self.hedging = None  # they know each other, and should go without the garbage collector


def _usage(tail: bytes, name: bytes) -> int:
    """A figure of the usage at the end of an answer; 0 if that is not there.

    Text of the model cannot be taken for it: quotes in a string are escaped.
    """
    start = tail.rfind(name, max(0, len(tail) - _MAX_TAIL_BYTES))
    found = _NUMBER.match(tail, start + len(name)) if start >= 0 else None
    return int(found[0]) if found else 0


def _is_chunked_stream(lower: bytes) -> bool:
    return (
        b"\r\ncontent-type: text/event-stream" in lower
        and b"\r\ntransfer-encoding: chunked" in lower
        and b"\r\ncontent-encoding:" not in lower
    )


def prompt_tokens_of(num_body_bytes: int) -> int:
    """About how many tokens a body of that size has."""
    return min(num_body_bytes // _BYTES_PER_TOKEN, _MAX_PROMPT_TOKENS)


def cost_tokens_of(num_body_bytes: int, seen: Peek) -> int:
    """Estimated work of a request: tokens of its body and those that it is likely to get."""
    wanted = seen.max_completion_tokens or seen.max_tokens or seen.max_output_tokens
    if not isinstance(wanted, int) or wanted < 0:
        wanted = _DEFAULT_OUTPUT_TOKENS
    return prompt_tokens_of(num_body_bytes) + min(wanted, _MAX_OUTPUT_TOKENS)
