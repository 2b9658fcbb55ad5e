"""The memory benchmark in small: what may be resident, what a log tells, checks that can fail."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from xllm_plugin.bench import readme, schema
from xllm_plugin.bench.open_loop import BacklogTally, Sent
from xllm_plugin.bench.promises import Outcome
from xllm_plugin.bench.traces import Lengths, Vocabulary
from xllm_plugin.errors import NotNowError
from xllm_plugin.xtensor.layout import Column, KVLayout

FOLDER = Path(__file__).parents[2] / "benchmarks" / "xtensor_memory"
SLAB = 10
MIB = 2**20
LAYOUT = KVLayout(96, (Column(0, MIB),))
LOG = """\
(Engine) xllm-plugin: asleep at level 1: KV cache away in 31 ms, 256.5 MiB of weights in 400 ms.
(APIServer) wake up the engine with tags: ['weights']
(Engine) xllm-plugin: weights awake: weights in 120 ms, KV cache in 0 ms.
(Engine) xllm-plugin: kv_cache awake: weights in 0 ms, KV cache in 4 ms.
"""


def sample(
    bench: ModuleType,
    at_s: float,
    live: int,
    kv: int,
    *,
    told: int = 0,
    requests: int = 0,
    dropped: int = 0,
) -> Any:
    return bench.Sample(
        at_s=at_s,
        told=told,
        live_bytes=live,
        slab_bytes=SLAB,
        num_dropped_slabs=dropped,
        num_requests=requests,
        kv_bytes=kv,
        all_bytes=1000,
    )


def sent(received: int = 9) -> Sent:
    outcome = Outcome(
        trace="", due_s=0.0, prompt_tokens=3, output_tokens=9, received_tokens=received, status=200
    )
    return Sent((outcome,), BacklogTally(), 1.0, 0.1)


def hour(bench: ModuleType, kv: int = 110, end: int = 1000, received: int = 9) -> Any:
    samples = [
        sample(bench, 0.0, live=0, kv=10, told=1),
        sample(bench, 1.0, live=100, kv=kv, told=2),
        sample(bench, 9.0, live=0, kv=10, told=3),
    ]
    start = sample(bench, 0.0, live=0, kv=10)
    return bench.Hour(start, start, samples, replace(start, all_bytes=end), sent(received))


def slept(bench: ModuleType, **changes: Any) -> Any:
    values = {
        "kv_bytes": 100 * MIB,
        "weight_bytes": 200 * MIB,
        "freed_bytes": 300 * MIB,
        "kv_away_ms": 40.0,
        "kv_back_ms": 5.0,
        "weights_away_ms": 400.0,
        "weights_back_ms": 110.0,
        "read_ms": 100.0,
    }
    return bench.sleeping.Sleep(**values | changes)


def test_what_was_live_a_moment_ago_may_still_be_resident(bench: ModuleType) -> None:
    reserve_s = bench.RESERVE_S
    samples = [
        sample(bench, 0.0, live=100, kv=0, requests=2),
        sample(bench, reserve_s, live=0, kv=0),
        sample(bench, 2 * reserve_s + 0.1, live=30, kv=0),
        sample(bench, 9 * reserve_s, live=0, kv=0),
    ]
    slabs = bench.PREMAP_SLABS
    assert bench.allowed_bytes(samples, 1) == 100 + (2 + slabs) * SLAB
    assert bench.allowed_bytes(samples, 2) == 30 + (2 + slabs) * SLAB, "the cache has their last"
    assert bench.allowed_bytes(samples, 3) == slabs * SLAB


def test_what_a_step_takes_is_told_of_when_it_ends(bench: ModuleType) -> None:
    samples = [sample(bench, 0.3 * n, live=0, kv=50, told=7) for n in range(20)]
    assert bench.excess_bytes(samples) == 50 - bench.PREMAP_SLABS * SLAB
    samples.append(sample(bench, 9.0, live=50, kv=50, told=8))
    assert bench.excess_bytes(samples) == -bench.PREMAP_SLABS * SLAB


def test_what_the_cache_dropped_between_two_samples_was_live_between_them(
    bench: ModuleType,
) -> None:
    slabs = bench.PREMAP_SLABS
    samples = [
        sample(bench, 0.0, live=30, kv=30, told=1),
        sample(bench, 0.3, live=30, kv=50, told=1),  # a step has taken 20 beside them
        sample(bench, 0.6, live=20, kv=50, told=3, dropped=3),
        sample(bench, 9.0, live=20, kv=20, told=4, dropped=3),
    ]
    assert bench.allowed_bytes(samples, 1) == 20 + 3 * SLAB + slabs * SLAB
    assert bench.allowed_bytes(samples, 2) == 20 + 3 * SLAB + slabs * SLAB
    assert bench.allowed_bytes(samples, 3) == 20 + slabs * SLAB


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, True, True]),
        ({"kv": 111}, [False, True, True]),
        ({"end": 1051}, [True, False, True]),
        ({"received": 8}, [True, True, False]),
    ],
)
def test_memory_that_does_not_follow_fails_the_run(
    bench: ModuleType, changes: dict[str, Any], passed: list[bool]
) -> None:
    assert [check.passed for check in bench.checks(hour(bench, **changes))] == passed


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, True, True]),
        ({"kv_away_ms": 96.0}, [False, True, True]),
        ({"weights_back_ms": 126.0}, [True, False, True]),
        ({"freed_bytes": 280 * MIB}, [True, True, False]),
    ],
)
def test_a_sleep_that_is_slow_or_keeps_memory_fails_the_run(
    bench: ModuleType, changes: dict[str, Any], passed: list[bool]
) -> None:
    *found, answered = bench.sleeping.checks([slept(bench, **changes)] * 3, sent())
    assert [check.passed for check in found] == passed
    assert answered.passed
    assert not bench.sleeping.checks([slept(bench)], sent(received=3))[-1].passed


def test_the_log_tells_of_the_last_sleep(bench: ModuleType) -> None:
    before = LOG.replace("31 ms", "99 ms").replace("120 ms", "99 ms")
    found = bench.sleeping.told(before + LOG)
    assert found == (round(256.5 * MIB), 31.0, 400.0, 4.0, 120.0)
    for log in ("", LOG[: LOG.rindex("awake")]):
        with pytest.raises(NotNowError, match="no sleep and two wakings"):
            bench.sleeping.told(log)


def test_a_read_from_the_page_cache_takes_time_and_leaves_no_file(
    bench: ModuleType, tmp_path: Path
) -> None:
    assert bench.sleeping.page_cache_read_ms(tmp_path, bench.sleeping.CHUNK_BYTES + 5) > 0
    assert not list(tmp_path.iterdir())


def test_traffic_is_the_same_each_time_and_fits_the_model(bench: ModuleType) -> None:
    lengths = [Lengths(n, 2000) for n in range(1, 3000)]
    found = bench.traffic(lengths, Vocabulary(500), 20.0)
    assert found == bench.traffic(lengths, Vocabulary(500), 20.0)
    assert len(found) == round(20 * bench.REQUESTS_PER_S)
    assert max(one.output_tokens for one in found) == bench.MAX_OUTPUT
    assert max(len(one.prompt) for one in found) == bench.MAX_INPUT


def test_the_load_outlives_its_sleeps_and_fits_the_model(bench: ModuleType) -> None:
    (one, *_) = bench.sleeping.requests(Vocabulary(500), bench.SLEEPS)
    assert len(one.prompt) + one.output_tokens <= 2048
    assert bench.sleeping.STEPS_BEFORE_SLEEP * 2 < bench.sleeping.TOKENS_PER_SLEEP


def test_the_tables_and_the_picture(bench: ModuleType, tmp_path: Path) -> None:
    found, sleeps = hour(bench), [slept(bench)] * 3
    plan = bench.Plan(tmp_path, Vocabulary(10), (), 180.0, 3)
    run = schema.begin(bench.NAME, question=bench.QUESTION, command="xllm bench xtensor_memory")
    result = run.finish(
        peers=[bench.peer("/m").record("/m")],
        rows=[
            *bench.rows(found),
            *bench.sleeping.figures(sleeps),
            *bench.set_up.figures(set_ups(bench), LAYOUT),
        ],
        checks=[*bench.checks(found), *bench.sleeping.checks(sleeps, sent())],
        notes=bench.notes(plan),
        not_shown=bench.NOT_SHOWN,
    )
    text = readme.render(result)
    assert "| KV cache away | 100 | 40 | 410 |" in text
    assert "| as much, read from the page cache | 200 | 100 | 512 |" in text
    assert "XLLM_XTENSOR__CACHE_IDLE_S=3 " in text
    assert "**KV set-up at start, 0.1 GiB**" in text
    assert "| elastic | 5 | 1 |" in text
    assert bench.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_costs_no_result(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("no matplotlib")

    monkeypatch.setattr(bench, "plot_over_time", absent)
    assert not bench.draw(hour(bench), tmp_path / "x.png")


def set_ups(bench: ModuleType, ours_ms: float = 5.0, ours_bytes: int = MIB) -> Any:
    stock = bench.set_up.SetUp([100.0, 120.0, 90.0], [LAYOUT.num_bytes] * 3)
    ours = bench.set_up.SetUp([ours_ms] * 3, [ours_bytes] * 3)
    return {form: stock if form == bench.set_up.STOCK else ours for form in bench.set_up.FORMS}


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, True]),
        ({"ours_ms": 5.1}, [False, True]),
        ({"ours_bytes": 5 * MIB}, [True, False]),
    ],
)
def test_a_kv_cache_that_is_written_at_start_fails_the_run(
    bench: ModuleType, changes: dict[str, Any], passed: list[bool]
) -> None:
    found = bench.set_up.checks(set_ups(bench, **changes), LAYOUT)
    assert [check.passed for check in found] == passed


def test_kv_caches_are_set_up_as_workers_do(bench: ModuleType, tmp_path: Path) -> None:
    """As large as the smallest buffer that is not torch's."""
    config = {"num_key_value_heads": 2, "num_hidden_layers": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = bench.set_up.layout_of(tmp_path, 64 * MIB)
    assert layout.columns[1].start_bytes == layout.num_bytes / 4 == 16 * MIB
    found = bench.set_up.measure(layout, 1)
    resident = {form: one.resident_bytes[0] / layout.num_bytes for form, one in found.items()}
    assert resident.pop(bench.set_up.STOCK) > 0.75
    assert max(resident.values()) < 0.25
    assert all(len(one.times_ms) == 1 for one in found.values())


def test_the_readme_has_a_place_for_the_table() -> None:
    assert readme.section((FOLDER / "README.md").read_text(), "xtensor_memory")
