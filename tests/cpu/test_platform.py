"""The CPU platform: vLLM's own with ours in front, and MLA kept off a wrong operator."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm_plugin import shims
from xllm_plugin.cpu.threads import OpenMPEnvironment, ThreadPlan
from xllm_plugin.errors import ConfigError, PlatformError

pytestmark = pytest.mark.engine  # imports vLLM, some seconds


@pytest.fixture(scope="module", autouse=True)
def platform() -> Any:
    shims.install()
    pytest.importorskip("vllm")
    from xllm_plugin.cpu import platform

    return platform


def test_it_is_vllm_s_cpu_platform_with_ours_in_front(platform: Any) -> None:
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import PlatformEnum

    ours = platform.XllmCpuPlatform
    assert issubclass(ours, CpuPlatform)
    assert ours._enum is PlatformEnum.CPU
    assert ours.__mro__.index(platform.XllmPlatformMixin) < ours.__mro__.index(CpuPlatform)
    assert ours.xllm_worker_cls == "xllm_plugin.cpu.worker.XllmCpuWorker"


@pytest.mark.parametrize(
    ("custom_ops", "expected"),
    [
        ([], ["-rotary_embedding"]),
        (["none"], ["none", "-rotary_embedding"]),
        (["+rotary_embedding", "+rms_norm"], ["+rms_norm", "-rotary_embedding"]),
        (["-rotary_embedding"], ["-rotary_embedding"]),
    ],
)
def test_the_rotary_operator_is_switched_off(
    platform: Any, custom_ops: list[str], expected: list[str]
) -> None:
    platform.disable_rotary_operator(custom_ops)
    assert custom_ops == expected


@given(st.lists(st.sampled_from(["+rotary_embedding", "-rotary_embedding", "all", "+rms_norm"])))
def test_switching_off_is_final_and_touches_no_other_operator(custom_ops: list[str]) -> None:
    from xllm_plugin.cpu.platform import disable_rotary_operator

    others = [name for name in custom_ops if "rotary" not in name]
    disable_rotary_operator(custom_ops)
    assert "+rotary_embedding" not in custom_ops
    assert "-rotary_embedding" in custom_ops
    assert [name for name in custom_ops if "rotary" not in name] == others
    once = list(custom_ops)
    disable_rotary_operator(custom_ops)
    assert custom_ops == once


@pytest.mark.parametrize(
    ("model_config", "is_off"),
    [
        (None, False),
        (SimpleNamespace(use_mla=False, enable_sleep_mode=False), False),
        (SimpleNamespace(use_mla=True, enable_sleep_mode=False), True),
    ],
)
def test_only_mla_models_lose_it(
    platform: Any, monkeypatch: pytest.MonkeyPatch, model_config: Any, is_off: bool
) -> None:
    # What vLLM's own class does with a whole VllmConfig is vLLM's to test.
    monkeypatch.setattr(platform, "choose_graphs", lambda _: None)
    monkeypatch.setattr(
        platform.CpuPlatform, "check_and_update_config", classmethod(lambda cls, _: None)
    )
    vllm_config = SimpleNamespace(
        additional_config={},
        parallel_config=SimpleNamespace(
            worker_cls="auto", distributed_executor_backend="mp", nnodes=1
        ),
        kv_transfer_config=None,
        ec_transfer_config=None,
        cache_config=SimpleNamespace(kv_offloading_size=None),
        use_v2_model_runner=False,
        scheduler_config=SimpleNamespace(async_scheduling=False, scheduler_cls=None),
        diffusion_config=None,
        model_config=model_config,
        compilation_config=SimpleNamespace(custom_ops=[]),
    )
    platform.XllmCpuPlatform.check_and_update_config(vllm_config)
    assert ("-rotary_embedding" in vllm_config.compilation_config.custom_ops) is is_off
    assert vllm_config.parallel_config.worker_cls == "xllm_plugin.cpu.worker.XllmCpuWorker"


def alone(**changes: Any) -> SimpleNamespace:
    """A configuration whose only rank can live in the engine's process, but for `changes`."""
    parallel = {
        "distributed_executor_backend": "uni",
        "world_size": 1,
        "data_parallel_size": 1,
        "nnodes": 1,
    }
    connectors = {
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        "cache_config": SimpleNamespace(kv_offloading_size=None),
    }
    for name, value in changes.items():
        (connectors if name in connectors else parallel)[name] = value
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        **connectors,
    )


def test_a_single_rank_computes_in_the_engine(platform: Any) -> None:
    assert platform.computes_alone(alone(), 1)
    again = alone(distributed_executor_backend=platform.EXECUTORS["uni"])
    assert platform.computes_alone(again, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"distributed_executor_backend": "mp"},
        {"distributed_executor_backend": "ray"},
        {"world_size": 2},
        {"data_parallel_size": 2},
        {"nnodes": 2},
        {"kv_transfer_config": object()},
        {"cache_config": SimpleNamespace(kv_offloading_size=1.0)},
        {"ec_transfer_config": object()},
    ],
)
def test_otherwise_each_rank_has_a_process(platform: Any, changes: dict[str, Any]) -> None:
    assert not platform.computes_alone(alone(**changes), 1)


def engine_config(backend: str, *, is_async: bool, **changes: Any) -> SimpleNamespace:
    config = alone(distributed_executor_backend=backend, pipeline_parallel_size=1)
    config.scheduler_config = SimpleNamespace(async_scheduling=is_async)
    config.speculative_config = None
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("is_async", [False, True])
def test_the_executor_is_the_one_for_the_scheduling(platform: Any, is_async: bool) -> None:
    expected = platform.ASYNC_EXECUTOR if is_async else platform.EXECUTORS["uni"]
    # As a program that is its own engine has it, and as the hook finds it when it runs again.
    for backend in (platform.EXECUTORS["uni"], expected):
        config = engine_config(backend, is_async=is_async)
        assert platform.computes_alone(config, 1)
        environ: dict[str, str] = {}
        platform.compute_in_the_engine(config, OpenMPEnvironment(environ))
        assert config.parallel_config.distributed_executor_backend == expected
        assert environ == {}


@pytest.mark.parametrize(("asked", "expected"), [(True, True), (False, False), (None, False)])
def test_scheduling_ahead_is_what_was_asked(
    platform: Any, asked: bool | None, expected: bool
) -> None:
    config = engine_config("mp", is_async=False)  # as vLLM's own hook leaves it
    platform.XllmCpuPlatform.choose_async_scheduling(config, asked)
    assert config.scheduler_config.async_scheduling is expected


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("is_drafting", [True, False])
def test_what_does_not_go_with_scheduling_ahead_is_refused_if_asked(
    platform: Any, asked: bool, is_drafting: bool
) -> None:
    config = engine_config("mp", is_async=False)
    if is_drafting:
        config.speculative_config, name = object(), "speculative decoding"
    else:
        config.parallel_config.pipeline_parallel_size, name = 2, "pipeline parallelism"
    if asked:
        with pytest.raises(PlatformError, match=f"{name} on the CPU.*--no-async-scheduling"):
            platform.XllmCpuPlatform.choose_async_scheduling(config, asked)
    else:
        platform.XllmCpuPlatform.choose_async_scheduling(config, asked)
        assert config.scheduler_config.async_scheduling is False


def test_nothing_asked_is_a_no_and_a_yes_is_still_told_from_it(platform: Any) -> None:
    from vllm.config import SchedulerConfig

    class Config(SchedulerConfig):
        """Its own, so that the class all tests share keeps its hook."""

    platform.default_to_synchronous(Config)
    platform.default_to_synchronous(Config)
    decided = {
        asked: Config(max_model_len=64, is_encoder_decoder=False, async_scheduling=asked)
        for asked in (None, True, False)
    }
    assert {asked: made.async_scheduling for asked, made in decided.items()} == {
        None: False,
        True: True,
        False: False,
    }
    assert decided[None].max_num_encoder_input_tokens == decided[None].max_num_batched_tokens


def test_several_memory_nodes_keep_one_process_a_rank(platform: Any) -> None:
    assert not platform.computes_alone(alone(), 2)


def test_openmp_is_bound_once_for_a_process_that_starts_later(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "plan_here", lambda: ThreadPlan(2, (0, 1)))
    environ: dict[str, str] = {}
    openmp = OpenMPEnvironment(environ)
    config = engine_config("mp", is_async=False)  # as vLLM's own hook leaves it
    platform.compute_in_the_engine(config, openmp)
    assert config.parallel_config.distributed_executor_backend == platform.EXECUTORS["uni"]
    assert environ["OMP_NUM_THREADS"] == "2"
    # In the child the hook finds the class path, and a narrower affinity that is not planned again.
    in_child: dict[str, str] = {}
    platform.compute_in_the_engine(config, OpenMPEnvironment(in_child))
    assert in_child == {}


def test_an_engine_with_other_processes_does_not_inherit_the_binding(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"OMP_PLACES": "{0}"}
    openmp = OpenMPEnvironment(environ)
    openmp.bind(ThreadPlan(2, (0, 1)))
    monkeypatch.setattr(platform, "openmp", openmp)
    monkeypatch.setattr(platform, "choose_graphs", lambda _: None)
    monkeypatch.setattr(
        platform.CpuPlatform, "check_and_update_config", classmethod(lambda cls, _: None)
    )
    monkeypatch.setattr(platform.XllmPlatformMixin, "check_and_update_config", lambda *_: None)
    config = alone(world_size=2)
    config.use_v2_model_runner, config.model_config = False, None
    config.additional_config = {}
    platform.XllmCpuPlatform.check_and_update_config(config)
    assert environ == {"OMP_PLACES": "{0}"}


@pytest.fixture
def compiles(platform: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A configuration that vLLM would compile, of a model that native code runs."""
    from vllm.config import CompilationMode

    monkeypatch.setattr(platform, "native_refusal", lambda _: None)
    monkeypatch.setattr(platform.background, "refusal", lambda _: "it is quantised")
    mode = CompilationMode.DYNAMO_TRACE_ONCE
    return SimpleNamespace(compilation_config=SimpleNamespace(mode=mode))


def test_a_model_that_native_code_runs_is_not_compiled(
    platform: Any, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "built_library", lambda: None)
    platform.choose_graphs(compiles)
    assert compiles.compilation_config.mode.name == "NONE"


def test_kernels_that_cannot_be_built_leave_vllm_s_compilation(
    platform: Any, compiles: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise platform.NativeBuildError("no C++ compiler was found")

    monkeypatch.setattr(platform, "built_library", refuse)
    with caplog.at_level(logging.WARNING, logger="vllm.xllm_plugin"):
        platform.choose_graphs(compiles)
    assert compiles.compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
    assert "no C++ compiler was found" in caplog.text


def test_a_model_without_native_layers_starts_eager(
    platform: Any, compiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "native_refusal", lambda _: "it is no Llama")
    monkeypatch.setattr(platform.background, "refusal", lambda _: None)
    compiles.compilation_config.custom_ops = ["none"]
    platform.choose_graphs(compiles)
    assert compiles.compilation_config.mode.name == "NONE"
    assert compiles.compilation_config.custom_ops == ["all"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mode": "off"}, "graph.mode is off"),
        ({"native_layers": False}, "graph.native_layers is off"),
    ],
)
def test_a_setting_switches_native_code_off(
    platform: Any, settings: dict[str, Any], reason: str
) -> None:
    config = SimpleNamespace(additional_config={"xllm": {"graph": settings}})
    assert platform.native_refusal(config) == reason


def test_a_model_s_class_is_looked_at_in_this_process(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models import registry

    monkeypatch.setattr(registry, "_run_in_subprocess", registry._run_in_subprocess)
    platform.XllmCpuPlatform.pre_register_and_update()
    monkeypatch.setattr(
        registry._LazyRegisteredModel, "_load_modelinfo_from_cache", lambda *_: None
    )
    monkeypatch.setattr(registry._LazyRegisteredModel, "_save_modelinfo_to_cache", lambda *_: None)
    monkeypatch.setattr(registry, "_SUBPROCESS_COMMAND", ["false"])
    model = registry._LazyRegisteredModel("vllm.model_executor.models.llama", "LlamaForCausalLM")
    assert model.inspect_model_cls().is_text_generation_model


@pytest.fixture
def armed(platform: Any, monkeypatch: pytest.MonkeyPatch) -> list[ThreadPlan]:
    """The plans for which a fork was prepared, by a platform whose rank computes alone."""
    found: list[ThreadPlan] = []
    monkeypatch.setattr(platform, "engine_fork", SimpleNamespace(arm=found.append))
    monkeypatch.setattr(platform, "computes_alone", lambda *_: True)
    monkeypatch.setattr(platform, "plan_here", lambda: ThreadPlan(2, (0, 1)))
    monkeypatch.setattr(platform, "openmp", OpenMPEnvironment({}))
    monkeypatch.setattr(platform, "choose_graphs", lambda _: None)
    monkeypatch.setattr(platform.fork, "refusal", lambda *_: None)
    monkeypatch.setattr(platform.XllmPlatformMixin, "check_and_update_config", lambda *_: None)
    return found


def check(platform: Any, backend: str) -> None:
    config = alone(distributed_executor_backend=backend)
    config.use_v2_model_runner, config.model_config = False, None
    config.additional_config = {}
    platform.XllmCpuPlatform.check_and_update_config(config)


def test_a_server_forks_its_engine(
    platform: Any, armed: list[ThreadPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "m"])
    check(platform, "mp")
    assert armed == [ThreadPlan(2, (0, 1))]
    check(platform, platform.EXECUTORS["uni"])  # vLLM asks again in the engine's process
    assert len(armed) == 1


def test_another_program_s_engine_is_a_new_process(
    platform: Any, armed: list[ThreadPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["vllm", "bench", "latency"])
    check(platform, "mp")
    assert armed == []


def test_a_server_says_why_it_does_not_fork(
    platform: Any,
    armed: list[ThreadPlan],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("sys.argv", ["vllm", "serve", "m"])
    monkeypatch.setattr(platform.fork, "refusal", lambda *_: "engine.fork is off")
    monkeypatch.setattr(platform.logger, "propagate", True)
    with caplog.at_level(logging.INFO, platform.logger.name):
        check(platform, "mp")
    assert armed == []
    assert "not forked: engine.fork is off" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_transfer_config": object()}, "connector"),
        ({"scheduler_config": SimpleNamespace(scheduler_cls="a.Scheduler")}, "--scheduler-cls a.S"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline parallelism"),
    ],
)
def test_elastic_memory_is_refused_beside_what_holds_on_to_the_kv_cache(
    platform: Any, changes: dict[str, Any], message: str
) -> None:
    settings = {
        "additional_config": {"xllm": {"xtensor": {"enabled": True}}},
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        "cache_config": SimpleNamespace(kv_offloading_size=None),
        "scheduler_config": SimpleNamespace(
            scheduler_cls="xllm_plugin.scheduler.scheduler.XllmScheduler"
        ),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
    }
    platform.check_elastic_memory(SimpleNamespace(**settings))
    with pytest.raises(ConfigError, match=message):
        platform.check_elastic_memory(SimpleNamespace(**settings | changes))
    fixed = {"additional_config": {}}
    platform.check_elastic_memory(SimpleNamespace(**settings | changes | fixed))


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        ({"scheduler": {"policy": "slo"}}, {}, "scheduler.policy=slo"),
        ({}, {"speculative_config": object()}, "speculative decoding"),
    ],
)
def test_contiguous_requests_are_refused_beside_what_they_do_not_go_with(
    platform: Any, own: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    def settings(form: str, own: dict[str, Any]) -> dict[str, Any]:
        return {
            "additional_config": {"xllm": {"xtensor": {"enabled": True, "form": form}, **own}},
            "kv_transfer_config": None,
            "ec_transfer_config": None,
            "cache_config": SimpleNamespace(kv_offloading_size=None),
            "scheduler_config": SimpleNamespace(
                scheduler_cls="xllm_plugin.scheduler.scheduler.XllmScheduler"
            ),
            "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
            "speculative_config": None,
        }

    platform.check_elastic_memory(SimpleNamespace(**settings("contiguous", {})))
    platform.check_elastic_memory(SimpleNamespace(**settings("paged", own) | changes))
    with pytest.raises(ConfigError, match=rf"form=contiguous does not go with {message}"):
        platform.check_elastic_memory(SimpleNamespace(**settings("contiguous", own) | changes))


def test_ranks_that_share_each_layer_cannot_be_in_a_pool(platform: Any) -> None:
    def check_with(tensor_parallel_size: int) -> None:
        platform.check_elastic_memory(
            SimpleNamespace(
                additional_config={"xllm": {"xtensor": {"enabled": True, "pool": "box"}}},
                kv_transfer_config=None,
                ec_transfer_config=None,
                cache_config=SimpleNamespace(kv_offloading_size=None),
                scheduler_config=SimpleNamespace(
                    scheduler_cls="xllm_plugin.scheduler.scheduler.XllmScheduler"
                ),
                parallel_config=SimpleNamespace(
                    pipeline_parallel_size=1, tensor_parallel_size=tensor_parallel_size
                ),
            )
        )

    check_with(1)
    with pytest.raises(ConfigError, match=r"pool=box and tensor parallelism"):
        check_with(2)


def test_weights_that_are_to_stay_are_refused_for_they_would_not(platform: Any) -> None:
    def check_with(*, can_sleep: bool) -> None:
        model = SimpleNamespace(
            enable_sleep_mode=can_sleep, sleep_preserve_parameter_names=["*.embed"]
        )
        platform.check_sleep_mode(SimpleNamespace(model_config=model))

    check_with(can_sleep=False)
    with pytest.raises(ConfigError, match=r"--sleep-preserve-parameter-names \['\*.embed'\]"):
        check_with(can_sleep=True)


def test_an_engine_may_be_started_to_sleep(platform: Any) -> None:
    assert platform.XllmCpuPlatform().is_sleep_mode_available()
