"""Which events of a continued stream the client has already."""

from __future__ import annotations

import msgspec
import pytest

from xllm_plugin.instance.resumption import Finish, Resumption


def resumption(**changes: object) -> Resumption:
    fields = {"path": "/v1/completions", "body": {}, "id": "x", "created": 1, "chunks": []}
    return msgspec.json.decode(msgspec.json.encode(fields | changes), type=Resumption)


@pytest.mark.parametrize(
    ("changes", "num_skipped"),
    [
        ({}, 0),
        ({"num_opening_events": 1}, 1),  # nothing is replayed, so it comes again
        ({"num_opening_events": 1, "chunks": [[1]]}, 0),  # it comes before replayed tokens
        ({"chunks": [[1]], "finish": Finish(finish_reason="stop")}, 0),
        ({"chunks": [[1]], "finish": Finish(finish_reason="stop", num_events=1)}, 1),
    ],
)
def test_events_after_the_replayed_ones(changes: dict[str, object], num_skipped: int) -> None:
    assert resumption(**changes).num_skipped == num_skipped


def test_tokens_are_counted_over_events() -> None:
    assert resumption(chunks=[[1], [], [2, 3]]).num_tokens == 3


def test_other_paths_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="path"):
        resumption(path="/v1/embeddings")
