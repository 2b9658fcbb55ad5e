"""Every side gets the same requests at the same moments, and no trial another's prompts."""

from __future__ import annotations

import pytest

from xllm_plugin.bench.arrivals import Bursts
from xllm_plugin.bench.open_loop import Sending
from xllm_plugin.bench.promises import Promise
from xllm_plugin.bench.schedulers import Side, choose_sides
from xllm_plugin.bench.traces import Lengths, Vocabulary
from xllm_plugin.bench.traffic import GIVE_UP_MARGIN_S, Traffic
from xllm_plugin.errors import ConfigError

TIGHT, LOOSE = Promise(500, 35), Promise(4000, 100)
FCFS, PRIORITY, SLO = choose_sides("/m", ("fcfs", "priority", "slo"), ())
TRAFFIC = Traffic(
    traces={
        "conv": tuple(Lengths(8 * n, 16 * n) for n in range(1, 30)),
        "code": tuple(Lengths(80 * n, 4) for n in range(1, 30)),
    },
    vocabulary=Vocabulary(50, frozenset({0, 3})),
    shorten=8,
    max_input=100,
    max_output=20,
    bursts=Bursts(),
    window_s=10,
    seed=1,
)


def shapes(sendings: tuple[Sending, ...]) -> list[tuple[float, str, int, int]]:
    return [(one.due_s, one.trace, len(one.prompt), one.output_tokens) for one in sendings]


def prompts(sendings: tuple[Sending, ...]) -> set[tuple[int, ...]]:
    return {one.prompt for one in sendings if len(one.prompt) > 4}


def sendings(
    side: Side = FCFS, rate: float = 4, repeat: int = 0, salt: str = "", promise: Promise = TIGHT
) -> tuple[Sending, ...]:
    return TRAFFIC.sendings(side, rate, repeat, (promise,), salt=salt)


def test_all_sides_get_the_same() -> None:
    fcfs, priority = sendings(FCFS), sendings(PRIORITY)
    assert len(fcfs) == 40
    assert shapes(fcfs) == shapes(priority) == shapes(sendings(SLO))
    assert [one.prompt for one in fcfs] == [one.prompt for one in priority]
    assert [one.extra for one in priority] == [{"priority": len(one.prompt)} for one in priority]


def test_a_higher_rate_adds_requests() -> None:
    few, many = sendings(rate=3), sendings(rate=5)
    assert shapes(many)[: len(few)] == shapes(few)
    assert len(many) == 50


def test_repeats_differ_in_moments_and_salts_in_tokens() -> None:
    assert shapes(sendings(repeat=0)) != shapes(sendings(repeat=1))
    assert shapes(sendings(salt="a")) == shapes(sendings(salt="b"))
    assert not prompts(sendings(salt="a")) & prompts(sendings(salt="b"))
    assert not prompts(sendings(repeat=0)) & prompts(sendings(repeat=1))


def test_a_side_that_is_told_is_told_the_first_promise() -> None:
    first, *_ = TRAFFIC.sendings(SLO, 4, 0, (LOOSE, TIGHT), salt="")
    assert first.extra["vllm_xargs"]["xllm_ttft_ms"] == LOOSE.ttft_ms


def test_lengths_are_shortened_and_bounded() -> None:
    made = sendings(rate=20)
    assert {one.trace for one in made} == {"conv", "code"}
    for one in made:
        assert 1 <= len(one.prompt) <= 100
        assert 1 <= one.output_tokens <= 20
        assert not set(one.prompt) & {0, 3}
        if one.trace == "conv":
            assert one.output_tokens == min(2 * len(one.prompt), 20)
        else:
            assert one.output_tokens == 1  # half a token is one


def test_nothing_is_given_up_that_could_keep_a_promise() -> None:
    for one in TRAFFIC.sendings(FCFS, 4, 0, (TIGHT, LOOSE), salt=""):
        chance_s = one.due_s + LOOSE.latest_end_s(one.output_tokens)
        assert one.give_up_s == pytest.approx(chance_s + GIVE_UP_MARGIN_S)


def test_the_backlog_has_prompts_of_its_own() -> None:
    request = TRAFFIC.offline(SLO, TIGHT, "a")
    made = tuple(request(number) for number in range(40))
    assert made == tuple(request(number) for number in range(40))
    assert {one.extra["vllm_xargs"]["xllm_class"] for one in made} == {"offline"}
    assert not prompts(made) & prompts(sendings(SLO))
    assert not prompts(made) & prompts(
        tuple(TRAFFIC.offline(SLO, TIGHT, "b")(number) for number in range(40))
    )


def test_a_trial_without_requests_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request in 10 s"):
        sendings(rate=0.01)


def test_in_words() -> None:
    text = TRAFFIC.describe("smollm2")
    assert "conv and code, in turn, prompts and outputs divided by 8" in text
