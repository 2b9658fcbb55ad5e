"""What goes over the socket: frames, requests, replies, the snapshot.  Does no I/O itself.

A frame is eight bytes of header and a msgpack payload::

    0      2         3          4                8
    +------+---------+----------+----------------+-----------------
    | "xL" | version | reserved | payload length | payload ...
    +------+---------+----------+----------------+-----------------

Compatibility rule: structs travel as maps, so a client skips fields it does not know and fills in
defaults for those an older engine does not send.  Add fields with defaults; never change what a
field means; raise `SCHEMA_VERSION` when something was added, `PROTOCOL_VERSION` only when frames,
requests or replies themselves change.
"""

from __future__ import annotations

import struct
from typing import Any, Final, TypeVar

import msgspec

from xllm_plugin import errors
from xllm_plugin.errors import ChannelError, MisuseError, XllmError

__all__ = [
    "MAX_FRAME_BYTES",
    "PROTOCOL_VERSION",
    "SCHEMA_VERSION",
    "CallInfo",
    "EngineIdentity",
    "EngineLoad",
    "Failure",
    "FrameError",
    "FrameReader",
    "Reading",
    "Readings",
    "Reply",
    "Request",
    "Snapshot",
    "decode_request",
    "encode_frame",
    "encode_reply",
    "result_of",
]

T = TypeVar("T")

PROTOCOL_VERSION: Final = 1
SCHEMA_VERSION: Final = 1
# A snapshot has a few hundred bytes; this leaves room for tables (experts, pages) and bounds what
# a broken peer can make the other side buffer.
MAX_FRAME_BYTES: Final = 4 * 1024 * 1024

_MAGIC: Final = b"xL"
_HEADER: Final = struct.Struct(">2sBBI")
_NIL: Final = msgspec.Raw(msgspec.msgpack.encode(None))


class FrameError(ChannelError):
    """The bytes on the socket are no frame of this protocol; the connection is of no more use."""


class EngineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Who is speaking.  Constant while the engine lives.

    Attributes:
        instance_id: shared by all ranks and API servers of one server.
        dp_rank: vLLM's `ParallelConfig.data_parallel_index`, which is also the `engine` label of
            vLLM's metrics (`data_parallel_rank` is reset to 0 for dense models).
        model: name under which the model is served.
        platform: platform in force, for example ``xllm``.
        device: what the model runs on, for example ``cpu``.
        pid: of the engine process.
        parent_pid: of the process that launched it; `EngineChannel` fills it in.
        version: of this package.
    """

    instance_id: str
    model: str
    platform: str
    device: str
    pid: int
    parent_pid: int = 0
    dp_rank: int = 0
    version: str = ""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler has on its hands.  Totals count from the engine's start.

    Attributes:
        num_running: requests in the running queue.
        num_waiting: requests in all waiting queues.
        num_blocks_total: KV blocks that requests can use.
        num_blocks_free: those free, blocks cached but unused included.
        num_scheduled_tokens: of the last step.
        num_steps: total.
        last_step_ms: duration of the last step, measured in the worker.
        smoothed_step_ms: exponentially smoothed.
        num_generated_tokens: total.
        num_preemptions: total.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_total: int = 0
    num_blocks_free: int = 0
    num_scheduled_tokens: int = 0
    num_steps: int = 0
    last_step_ms: float = 0.0
    smoothed_step_ms: float = 0.0
    num_generated_tokens: int = 0
    num_preemptions: int = 0

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0 to 1; 0 for a model without KV cache."""
        if not self.num_blocks_total:
            return 0.0
        return 1.0 - self.num_blocks_free / self.num_blocks_total

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits; an idle engine publishes no further snapshots."""
        return not (self.num_running or self.num_waiting)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable picture of an engine.

    Attributes:
        schema: `SCHEMA_VERSION` of the engine that wrote it.
        sequence: rises by one with each snapshot of this engine, from 1.
        monotonic_s: time of publication on CLOCK_MONOTONIC, shared by all processes of a machine.
        wall_time_s: the same moment in seconds since 1970.
        engine: who is speaking.
        load: what the scheduler has on its hands.
        sections: one entry for each part that adds to the picture (predictor, memory, SLO, ...):
            frozen structs in the engine, plain maps once they have travelled.  Read them with
            `section`; a reader that does not know a name leaves it alone.
    """

    schema: int = SCHEMA_VERSION
    sequence: int
    monotonic_s: float
    wall_time_s: float
    engine: EngineIdentity
    load: EngineLoad
    sections: dict[str, Any] = {}

    def section(self, name: str, kind: type[T]) -> T | None:
        """The section called `name` as a `kind`; None if this engine does not send it.

        Raises:
            ChannelError: the section is there but is no `kind`.
        """
        if name not in self.sections:
            return None
        value = self.sections[name]
        if isinstance(value, kind):
            return value
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise ChannelError(
                f"section {name!r} of the snapshot does not fit {kind.__name__}: {error}. "
                "Engine and reader come from different versions of xllm-plugin; install one."
            ) from error

    def age_s(self, now_monotonic_s: float) -> float:
        """Seconds since publication; meaningful on the machine of the engine."""
        return max(0.0, now_monotonic_s - self.monotonic_s)


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one look at one engine gave: a snapshot and its age, or the reason there is none."""

    dp_rank: int
    snapshot: Snapshot | None = None
    age_s: float | None = None
    error: str | None = None


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """The body of `GET /xllm/snapshot` and of `xllm top --json`."""

    schema: int = SCHEMA_VERSION
    engines: tuple[Reading, ...] = ()


class CallInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `describe`: a call, its parameters, and its thread (server or engine)."""

    name: str
    summary: str = ""
    parameters: tuple[str, ...] = ()
    thread: str = "server"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A call by name.  After `timeout_s` the caller waits no more, and the work can be dropped."""

    id: int
    call: str
    args: dict[str, Any] = {}
    timeout_s: float = 10.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error on its way to the caller: name of a class of `xllm_plugin.errors`, and message."""

    kind: str
    message: str

    @classmethod
    def from_error(cls, error: XllmError) -> Failure:
        """The failure that `raise_in_caller` turns back into `error`."""
        kinds = (kind.__name__ for kind in type(error).__mro__)
        return cls(kind=next(kind for kind in kinds if kind in errors.__all__), message=str(error))

    def as_error(self) -> XllmError:
        """The exception, of the class it had in the engine where this side knows that class."""
        kind = getattr(errors, self.kind, None) if self.kind in errors.__all__ else None
        if isinstance(kind, type) and issubclass(kind, XllmError):
            return kind(self.message)
        return ChannelError(f"{self.kind}: {self.message}")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the request with the same id; id 0 when the request could not be read."""

    id: int
    result: msgspec.Raw = _NIL
    failure: Failure | None = None


class FrameReader:
    """Cuts a stream of bytes back into frames, however the socket has split it."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def receive(self, data: bytes) -> None:
        """Take the next bytes from the socket."""
        self._buffer += data

    def next_payload(self) -> bytes | None:
        """The next whole payload, or None until more bytes have come.

        Raises:
            FrameError: not our protocol, another version of it, or too long a payload.
        """
        self._check_magic()
        if len(self._buffer) < _HEADER.size:
            return None
        _, version, _, length = _HEADER.unpack_from(self._buffer)
        self._check_header(version, length)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        return payload

    def _check_magic(self) -> None:
        start = bytes(self._buffer[: len(_MAGIC)])
        if not _MAGIC.startswith(start):
            raise FrameError(
                f"got bytes that start with {start!r}, where a frame starts with {_MAGIC!r}: the "
                "other side does not speak the xllm channel protocol. Check the socket's path."
            )

    def _check_header(self, version: int, length: int) -> None:
        if version != PROTOCOL_VERSION:
            raise FrameError(
                f"the other side speaks version {version} of the channel protocol, this side "
                f"version {PROTOCOL_VERSION}. Install the same xllm-plugin on both sides."
            )
        if length > self._max_frame_bytes:
            raise FrameError(
                f"a frame of {length} bytes was announced; at most {self._max_frame_bytes} are "
                "accepted. Ask for less in one call."
            )


def encode_frame(message: msgspec.Struct, max_frame_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """`message` as one frame.

    Raises:
        FrameError: longer than `max_frame_bytes`.
        MisuseError: it holds something msgpack has no form for.
    """
    try:
        payload = msgspec.msgpack.encode(message)
    except (TypeError, OverflowError) as error:
        raise MisuseError(
            f"{type(message).__name__} cannot be sent: {error}. Plain values, lists, maps and "
            "msgspec structs can."
        ) from error
    if len(payload) > max_frame_bytes:
        raise FrameError(
            f"a {type(message).__name__} of {len(payload)} bytes is over the limit of "
            f"{max_frame_bytes} bytes a frame. Send less in one call."
        )
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, 0, len(payload)) + payload


def encode_reply(request_id: int, result: Any) -> bytes:
    """The frame that answers `request_id` with `result`; errors as for `encode_frame`."""
    try:
        raw = msgspec.Raw(msgspec.msgpack.encode(result))
    except (TypeError, OverflowError) as error:
        raise MisuseError(f"the call's result cannot be sent: {error}") from error
    return encode_frame(Reply(id=request_id, result=raw))


def decode_request(payload: bytes) -> Request:
    """The request in `payload`; raises FrameError when there is none in it."""
    return _decode(payload, Request)


def result_of(payload: bytes, request_id: int, kind: type[T]) -> T:
    """The result, as a `kind`, in the payload that should answer `request_id`.

    Raises:
        XllmError: the error that the call raised in the engine.
        FrameError: `payload` holds no reply, or one to another request, or another kind of result.
    """
    reply = _decode(payload, Reply)
    if reply.failure is not None:
        raise reply.failure.as_error()
    if reply.id != request_id:
        raise FrameError(f"got the reply to request {reply.id}, expected that to {request_id}.")
    return _decode(reply.result, kind)


def _decode(payload: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        name = getattr(kind, "__name__", str(kind))
        raise FrameError(
            f"a payload of {len(memoryview(payload))} bytes is no {name}: {error}. Engine and "
            "client may come from different versions of xllm-plugin."
        ) from error
