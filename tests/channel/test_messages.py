"""Frames, failures and snapshots, without a socket."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin import errors
from xllm_plugin.channel.messages import (
    EngineIdentity,
    EngineLoad,
    Failure,
    FrameError,
    FrameReader,
    Request,
    Snapshot,
    decode_request,
    encode_frame,
    encode_reply,
    result_of,
)
from xllm_plugin.errors import ChannelError, MisuseError, XllmError

IDENTITY = EngineIdentity(instance_id="e", model="m", platform="xllm", device="cpu", pid=1)


def make_snapshot(**changes: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "sequence": 1,
        "monotonic_s": 10.0,
        "wall_time_s": 0.0,
        "engine": IDENTITY,
        "load": EngineLoad(),
    }
    return Snapshot(**(fields | changes))


class Forecast(msgspec.Struct, frozen=True):
    ttft_ms: float
    num_samples: int = 0


@given(
    texts=st.lists(st.text(max_size=300), max_size=8),
    cuts=st.lists(st.integers(min_value=0, max_value=3000), max_size=12),
)
def test_frames_survive_any_split_of_the_stream(texts: list[str], cuts: list[int]) -> None:
    requests = [Request(id=i, call="c", args={"text": text}) for i, text in enumerate(texts)]
    stream = b"".join(encode_frame(request) for request in requests)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    frames, got = FrameReader(), []
    for begin, end in itertools.pairwise(edges):
        frames.receive(stream[begin:end])
        while (payload := frames.next_payload()) is not None:
            got.append(decode_request(payload))
    assert got == requests


@given(garbage=st.binary(min_size=1, max_size=200))
def test_garbage_is_a_frame_error_or_waits_for_more(garbage: bytes) -> None:
    """Nothing but FrameError ever comes out, whatever comes in."""
    frames = FrameReader()
    frames.receive(garbage)
    try:
        while (payload := frames.next_payload()) is not None:
            decode_request(payload)
    except FrameError:
        pass
    else:
        assert b"xL".startswith(garbage[:2])


def test_garbage_is_recognised_by_its_first_byte() -> None:
    frames = FrameReader()
    frames.receive(b"G")
    with pytest.raises(FrameError, match="does not speak the xllm channel protocol"):
        frames.next_payload()


def test_another_protocol_version_is_named() -> None:
    frames = FrameReader()
    frames.receive(b"xL\x09\x00\x00\x00\x00\x00")
    with pytest.raises(FrameError, match=r"speaks version 9 .* this side version 1"):
        frames.next_payload()


def test_a_long_frame_is_refused_by_its_header_alone() -> None:
    frames = FrameReader(max_frame_bytes=100)
    frames.receive(b"xL\x01\x00\x00\x00\x00\x65")
    with pytest.raises(FrameError, match="101 bytes was announced; at most 100"):
        frames.next_payload()


def test_a_long_message_is_refused_before_it_is_sent() -> None:
    with pytest.raises(FrameError, match="over the limit of 50 bytes"):
        encode_frame(Request(id=1, call="x" * 100), max_frame_bytes=50)


def test_what_msgpack_has_no_form_for_is_misuse() -> None:
    with pytest.raises(MisuseError, match="cannot be sent"):
        encode_frame(Request(id=1, call="c", args={"x": object()}))
    with pytest.raises(MisuseError, match="result cannot be sent"):
        encode_reply(1, object())


def payload_of(frame: bytes) -> bytes:
    frames = FrameReader()
    frames.receive(frame)
    payload = frames.next_payload()
    assert payload is not None
    return payload


def test_snapshot_and_its_sections_survive_the_way() -> None:
    sent = make_snapshot(sections={"predictor": Forecast(12.5), "plain": {"a": [1, 2]}})
    got = result_of(payload_of(encode_reply(7, sent)), 7, Snapshot)
    assert got.section("predictor", Forecast) == Forecast(12.5)
    assert got.section("absent", Forecast) is None
    assert got.sections["plain"] == {"a": [1, 2]}
    assert got.load == sent.load
    assert sent.section("predictor", Forecast) is sent.sections["predictor"]


def test_a_section_of_another_form_is_an_error() -> None:
    with pytest.raises(ChannelError, match="does not fit Forecast"):
        make_snapshot(sections={"predictor": {"ttft_ms": "soon"}}).section("predictor", Forecast)


def test_an_older_client_reads_a_newer_engine_and_the_reverse() -> None:
    plain = msgspec.to_builtins(make_snapshot())
    newer = plain | {"schema": 9, "colour": "red", "load": plain["load"] | {"num_moons": 2}}
    assert msgspec.convert(newer, Snapshot).load == EngineLoad()
    older = plain | {"load": {"num_running": 3}}
    assert msgspec.convert(older, Snapshot).load == EngineLoad(num_running=3)


def test_kv_usage_is_a_share_and_zero_without_cache() -> None:
    assert EngineLoad(num_blocks_total=8, num_blocks_free=2).kv_usage == 0.75
    assert EngineLoad().kv_usage == 0.0


def test_age_is_never_negative() -> None:
    assert make_snapshot().age_s(12.5) == 2.5
    assert make_snapshot().age_s(9.0) == 0.0


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_of_ours_arrives_as_itself(name: str) -> None:
    kind = getattr(errors, name)
    failure = Failure.from_error(kind("why"))
    arrived = failure.as_error()
    assert type(arrived) is kind
    assert str(arrived) == "why"


def test_private_and_unknown_kinds_arrive_as_their_nearest_known() -> None:
    assert type(Failure.from_error(FrameError("x")).as_error()) is ChannelError
    unknown: XllmError = Failure(kind="FutureError", message="x").as_error()
    assert type(unknown) is ChannelError
    assert "FutureError: x" in str(unknown)


def test_a_reply_to_another_request_is_refused() -> None:
    with pytest.raises(FrameError, match="reply to request 2, expected that to 1"):
        result_of(payload_of(encode_reply(2, None)), 1, Any)  # type: ignore[arg-type]


def test_a_result_of_another_kind_is_refused() -> None:
    with pytest.raises(FrameError, match="is no Snapshot"):
        result_of(payload_of(encode_reply(1, [1])), 1, Snapshot)
