"""Which cores compute: affinity, quota, vLLM's own variables."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin.cpu.threads import (
    BIND_ENV,
    RESERVED_ENV,
    Cpu,
    OpenMPEnvironment,
    ThreadPlan,
    plan_threads,
    quota_cpus,
)
from xllm_plugin.errors import ConfigError

# Four physical cores with two threads each: 0 and 4 are on core 0, and so on.
SMT = [Cpu(id=n, physical_core=n % 4, numa_node=0) for n in range(8)]


def test_one_thread_a_physical_core_and_none_kept_back() -> None:
    assert plan_threads(SMT, None, {}).cores == (4, 5, 6, 7)


def test_cores_of_two_memory_nodes_may_have_the_same_number() -> None:
    cpus = [Cpu(0, 0, 0), Cpu(1, 0, 1)]
    assert plan_threads(cpus, None, {}).cores == (0, 1)


@pytest.mark.parametrize(
    ("quota", "num_threads"), [(2.0, 2), (2.9, 2), (0.5, 1), (16.0, 4), (None, 4)]
)
def test_a_container_s_quota_limits_the_threads_and_not_where_they_run(
    quota: float | None, num_threads: int
) -> None:
    """Containers of one machine would otherwise all sit on its first cores."""
    plan = plan_threads(SMT, quota, {})
    assert plan.num_threads == num_threads
    assert plan.cores == (4, 5, 6, 7)


def test_reserved_processors_stay_free() -> None:
    assert plan_threads(SMT, None, {RESERVED_ENV: "1"}).cores == (4, 5, 6)


def test_reserving_all_of_them_is_a_warning_as_in_vllm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        assert plan_threads(SMT, None, {RESERVED_ENV: "4"}).cores == (4, 5, 6, 7)
    assert "leaves none of 4 processors" in caplog.text


def test_the_user_s_list_is_taken_as_it_is() -> None:
    assert plan_threads(SMT, 1.0, {BIND_ENV: "0-2,6"}) == ThreadPlan(4, (0, 1, 2, 6))


def test_nobind_leaves_openmp_to_the_user() -> None:
    plan = plan_threads(SMT, None, {BIND_ENV: "nobind"})
    assert plan.cores == ()
    assert plan.environment() == {}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({BIND_ENV: "0-x"}, "not 'auto', 'nobind' or a list"),
        ({BIND_ENV: "3-1"}, "not 'auto', 'nobind' or a list"),
        ({BIND_ENV: "0|1"}, "not 'auto', 'nobind' or a list"),
        ({BIND_ENV: "6-9"}, r"names processors \[8, 9\]"),
        ({RESERVED_ENV: "-1"}, "not a number of processors"),
    ],
)
def test_what_cannot_be_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_threads(SMT, None, environ)


def test_the_environment_has_one_place_of_all_cores() -> None:
    assert ThreadPlan(1, (0, 2)).environment() == {
        "OMP_NUM_THREADS": "1",
        "OMP_PLACES": "{0,2}",
        "OMP_PROC_BIND": "true",
    }


def test_intel_s_library_is_kept_from_spinning_as_vllm_does() -> None:
    found = ThreadPlan(1, (0,)).environment("/lib/libiomp5.so:/lib/libtcmalloc.so")
    assert found["KMP_BLOCKTIME"] == "5"
    assert found["KMP_TPAUSE"] == "0"


def test_what_was_in_the_environment_comes_back() -> None:
    before = {"OMP_NUM_THREADS": "1", "PATH": "/bin"}
    environ = dict(before)
    openmp = OpenMPEnvironment(environ)
    openmp.release()
    openmp.bind(ThreadPlan(2, (0, 2)))
    assert environ["OMP_NUM_THREADS"] == "2"
    openmp.bind(ThreadPlan(3, (0, 2, 4)))
    assert environ["OMP_PLACES"] == "{0,2,4}"
    openmp.release()
    assert environ == before
    openmp.bind(ThreadPlan(0, ()))
    assert environ == before


@given(
    st.lists(
        st.builds(Cpu, st.integers(0, 99), st.integers(0, 20), st.just(0)),
        min_size=1,
        unique_by=lambda cpu: cpu.id,
    ),
    st.none() | st.floats(0.01, 200),
)
def test_there_is_always_a_core_and_each_once(cpus: list[Cpu], quota: float | None) -> None:
    plan = plan_threads(cpus, quota, {})
    cores = plan.cores
    assert 1 <= plan.num_threads <= len(cores) == len(set(cores))
    assert set(cores) <= {cpu.id for cpu in cpus}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "what\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_is_read_from_the_control_group(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert quota_cpus(tmp_path) == expected
