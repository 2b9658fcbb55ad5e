"""The platform mixin over a stand-in for vLLM's platform class."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from xllm_plugin.accelerator.platform import (
    ASYNC_SCHEDULER,
    EXECUTORS,
    SCHEDULER,
    XllmPlatformMixin,
    add_options,
    allow_own_endpoints,
    check_settings,
    choose_kv_events,
)
from xllm_plugin.errors import ConfigError

LOGGER = "vllm.xllm_plugin"


class VllmPlatform:
    """Chooses what vLLM's own platform would choose."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def pre_register_and_update(cls, parser: Any = None) -> None:
        cls.calls.append(parser)

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        vllm_config.seen_by_vllm = vllm_config.parallel_config.worker_cls
        if vllm_config.parallel_config.distributed_executor_backend is None:
            vllm_config.parallel_config.distributed_executor_backend = "uni"


class Platform(XllmPlatformMixin, VllmPlatform):
    xllm_worker_cls = "toy.Worker"


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLLM_PLATFORM", "XLLM_CONFIG", "VLLM_PLUGINS", "XLLM_CHANNEL__ENABLED"):
        monkeypatch.delenv(name, raising=False)
    # What a call puts there is taken out again.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")


def config(
    *,
    backend: Any = None,
    worker_cls: str = "auto",
    additional_config: Any = None,
    async_scheduling: bool = False,
    scheduler_cls: Any = None,
    diffusion_config: Any = None,
    kv_transfer_config: Any = None,
    nnodes: int = 1,
) -> SimpleNamespace:
    return SimpleNamespace(
        additional_config={} if additional_config is None else additional_config,
        parallel_config=SimpleNamespace(
            worker_cls=worker_cls, distributed_executor_backend=backend, nnodes=nnodes
        ),
        kv_transfer_config=kv_transfer_config,
        cache_config=SimpleNamespace(kv_offloading_size=None),
        ec_transfer_config=None,
        scheduler_config=SimpleNamespace(
            async_scheduling=async_scheduling, scheduler_cls=scheduler_cls
        ),
        diffusion_config=diffusion_config,
    )


def checked(vllm_config: SimpleNamespace) -> SimpleNamespace:
    Platform.check_and_update_config(vllm_config)
    return vllm_config


def test_our_classes_stand_where_vllm_takes_one() -> None:
    result = checked(config())
    assert result.parallel_config.worker_cls == result.seen_by_vllm == "toy.Worker"
    assert result.parallel_config.distributed_executor_backend == EXECUTORS["uni"]
    assert result.scheduler_config.scheduler_cls == SCHEDULER


def test_asynchronous_scheduling_has_its_own_class() -> None:
    result = checked(config(async_scheduling=True, backend="mp"))
    assert result.scheduler_config.scheduler_cls == ASYNC_SCHEDULER
    assert result.parallel_config.distributed_executor_backend == EXECUTORS["mp"]


def test_the_hook_can_run_again_with_another_scheduling() -> None:
    result = checked(config(async_scheduling=True))
    result.scheduler_config.async_scheduling = False
    again = checked(result)
    assert again.scheduler_config.scheduler_cls == SCHEDULER
    assert again.parallel_config.worker_cls == "toy.Worker"
    assert again.parallel_config.distributed_executor_backend == EXECUTORS["uni"]


@pytest.mark.parametrize("backend", ["ray", "external_launcher", object])
def test_other_executors_are_left_alone(backend: Any) -> None:
    assert checked(config(backend=backend)).parallel_config.distributed_executor_backend is backend


def test_a_worker_of_the_user_s_own_is_left_alone() -> None:
    assert checked(config(worker_cls="mine.Worker")).parallel_config.worker_cls == "mine.Worker"


@pytest.mark.parametrize("scheduler_cls", ["mine.Scheduler", dict])
def test_a_scheduler_of_the_user_s_own_is_used_and_said(
    scheduler_cls: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        result = checked(config(scheduler_cls=scheduler_cls))
    assert result.scheduler_config.scheduler_cls is scheduler_cls
    assert "is used as asked" in caplog.text


def test_diffusion_models_keep_vllm_s_scheduler(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, LOGGER):
        result = checked(config(diffusion_config=object()))
    assert result.scheduler_config.scheduler_cls is None
    assert "diffusion" in caplog.text


def test_additional_config_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM hashes it into its compile-cache key, so what the environment says stays out of it."""
    monkeypatch.setenv("XLLM_CHANNEL__INSTANCE_ID", "pod-7")
    given = {"other": 1, "xllm": {"channel": {"snapshot_interval_ms": 5}}}
    assert checked(config(additional_config=given)).additional_config is given
    assert given == {"other": 1, "xllm": {"channel": {"snapshot_interval_ms": 5}}}


def test_a_directory_of_the_user_s_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    given = {"xllm": {"channel": {"directory": str(tmp_path / "file")}}}
    with pytest.raises(ConfigError, match="is no directory"):
        checked(config(additional_config=given))


def test_with_a_connector_vllm_s_own_executor_stays() -> None:
    """Connectors look for "mp" by name."""
    result = checked(config(backend="mp", kv_transfer_config=object()))
    assert result.parallel_config.distributed_executor_backend == "mp"
    result = checked(config(backend="mp", nnodes=2))
    assert result.parallel_config.distributed_executor_backend == "mp"


def test_a_setting_out_of_range_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"channel\.snapshot_interval_ms=-1"):
        checked(config(additional_config={"xllm": {"channel": {"snapshot_interval_ms": -1}}}))


def endpoint_plugin(site: Any, name: str) -> None:
    site.add_distribution(
        f"{name}-dist", entry_points={"vllm.endpoint_plugins": {name: "foreign:make"}}
    )


def test_our_endpoints_are_allowed_with_all_ordinary_plugins_and_no_others(site_here: Any) -> None:
    endpoint_plugin(site_here, "foreign_routes")
    site_here.add_distribution(
        "loggers", entry_points={"vllm.stat_logger_plugins": {"my_logger": "loggers:Logger"}}
    )
    environ: dict[str, str] = {}
    allow_own_endpoints(environ)
    allowed = environ["VLLM_PLUGINS"].split(",")
    assert {"xllm", "my_logger"} <= set(allowed)
    assert "foreign_routes" not in allowed


@pytest.mark.parametrize("value", ["", "mine", "xllm"])
def test_a_list_of_the_user_s_own_is_left_alone(value: str) -> None:
    environ = {"VLLM_PLUGINS": value}
    allow_own_endpoints(environ)
    assert environ == {"VLLM_PLUGINS": value}


def test_no_foreign_routes_slip_in_under_a_shared_name(
    site_here: Any, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint_plugin(site_here, "both")
    site_here.add_distribution(
        "ordinary", entry_points={"vllm.general_plugins": {"both": "ordinary:register"}}
    )
    environ: dict[str, str] = {}
    with caplog.at_level(logging.WARNING, LOGGER):
        allow_own_endpoints(environ)
    assert environ == {}
    assert "['both']" in caplog.text


def test_our_options_are_shown_once_and_only_on_a_parser() -> None:
    parser = argparse.ArgumentParser()
    Platform.pre_register_and_update()
    Platform.pre_register_and_update(parser)
    Platform.pre_register_and_update(parser)
    assert VllmPlatform.calls[-3:] == [None, parser, parser]
    assert parser.format_help().count("--xllm-config FILE") == 1 + 1  # usage and text


def parser_with_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


def test_the_parser_s_default_is_the_platform_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parser_with_options().parse_args([]).platform == "xllm"
    monkeypatch.setenv("XLLM_PLATFORM", "native")
    assert parser_with_options().parse_args([]).platform == "native"


def test_naming_the_platform_in_force_again_is_fine() -> None:
    assert parser_with_options().parse_args(["--platform", "xllm"]).platform == "xllm"


@pytest.mark.parametrize(
    "arguments", [["--platform", "native"], ["--plat=native"], ["--xllm-config", "x.yaml"]]
)
def test_an_option_that_comes_too_late_says_so(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parser_with_options().parse_args(arguments)
    assert caught.value.code == 2
    assert "comes too late here" in capsys.readouterr().err


SLO = {"xllm": {"scheduler": {"policy": "slo"}}}


def slo_config(**changes: Any) -> SimpleNamespace:
    """What vLLM has by default, with the policy slo."""
    made = config(additional_config=SLO, scheduler_cls=changes.pop("scheduler_cls", None))
    values = {"enable_chunked_prefill": True, "policy": "fcfs", "runner_type": "generate"}
    values |= {"pipeline_parallel_size": 1, "disable_chunked_mm_input": False}
    values |= {"is_multimodal_model": True, **changes}
    made.scheduler_config.enable_chunked_prefill = values["enable_chunked_prefill"]
    made.scheduler_config.policy = values["policy"]
    made.parallel_config.pipeline_parallel_size = values["pipeline_parallel_size"]
    made.scheduler_config.disable_chunked_mm_input = values["disable_chunked_mm_input"]
    made.model_config = SimpleNamespace(
        runner_type=values["runner_type"], is_multimodal_model=values["is_multimodal_model"]
    )
    return made


def test_the_policy_slo_goes_with_vllm_s_defaults() -> None:
    assert checked(slo_config()).scheduler_config.scheduler_cls == SCHEDULER


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"enable_chunked_prefill": False}, "chunked prefill is off"),
        ({"policy": "priority"}, "xllm_priority"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"runner_type": "pooling"}, "generates no tokens"),
        ({"disable_chunked_mm_input": True}, "--disable-chunked-mm-input"),
        ({"scheduler_cls": "mine.Scheduler"}, "--scheduler-cls is mine.Scheduler"),
    ],
)
def test_what_the_policy_slo_cannot_serve_stops_the_start(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        checked(slo_config(**changes))


def test_a_server_that_registers_publishes_its_cache_only_if_told_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The event sockets have no key; and what the user's own flag says stays."""
    pytest.importorskip("vllm", reason="the configuration's class is vLLM's")

    def chosen(given: Any = None, *, prefix_caching: bool = True) -> Any:
        vllm_config = SimpleNamespace(
            additional_config=None,
            kv_events_config=given,
            cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
        )
        choose_kv_events(vllm_config)
        return vllm_config.kv_events_config

    monkeypatch.setenv("XLLM_REGISTRATION__KV_EVENTS", "1")
    assert chosen() is None  # it registers nowhere
    monkeypatch.setenv("XLLM_REGISTRATION__URL", "http://service:8001")
    found = chosen()
    assert (found.publisher, found.endpoint, found.replay_endpoint) == (
        "zmq",
        "tcp://*:0",
        "tcp://*:0",
    )
    assert chosen("the user's") == "the user's"
    assert chosen(prefix_caching=False) is None
    assert "of no use without a prefix cache" in caplog.text
    monkeypatch.setenv("XLLM_REGISTRATION__KV_EVENTS", "0")
    assert chosen() is None


def test_refusing_what_is_at_risk_needs_the_policy_that_predicts() -> None:
    settings: dict[str, Any] = {"admission": {"at_risk": "refuse"}}
    with pytest.raises(ConfigError, match=r"admission.at_risk=refuse .* scheduler.policy=slo"):
        check_settings(SimpleNamespace(additional_config={"xllm": settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool_bytes": 1}, r"pool_bytes is set and xtensor\.pool is not"),
        ({"min_bytes": 1}, r"min_bytes is set and xtensor\.pool is not"),
        ({"pool": "box"}, r"pool=box needs xtensor\.enabled=true"),
        (
            {"enabled": True, "pool": "box", "min_bytes": 2, "budget_bytes": 1},
            r"min_bytes=2 is more than xtensor\.budget_bytes=1",
        ),
        ({"enabled": True, "pool": "../box"}, "pattern"),
    ],
)
def test_settings_of_a_pool_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(SimpleNamespace(additional_config={"xllm": {"xtensor": settings}}))
    pool = {"enabled": True, "pool": "box", "min_bytes": 1, "budget_bytes": 2, "pool_bytes": 3}
    check_settings(SimpleNamespace(additional_config={"xllm": {"xtensor": pool}}))
